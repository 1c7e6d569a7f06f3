import { createPublicKey, generateKeyPairSync, randomBytes } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { rawSignature } from '@fleetkey/protocol/signed.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { checkRequests } from '@fleetkey/server/attestation/requests.ts'
import { defaultProfiles, requestPolicyOf } from '@fleetkey/server/ca/profiles.ts'
import { certificateOf } from '@fleetkey/server/ca/tbs.ts'
import { claimSpki, prepareCertificates, recordIssued, type Order } from '@fleetkey/server/flows/issue.ts'
import { perform, type Intent } from '@fleetkey/server/flows/perform.ts'
import { testContext, type TestContext } from './harness.ts'
import { bits, commonName, extension, further, generated, honest, integer, named, oid, selfSigned, seq, setOf, text, tlv, utf8 } from './hostile-requests.ts'
import { outcome } from './mutations.ts'

/** What went wrong in others: one test for each pattern that touches requests and certificates, by the name of its advisory. */

const root = new URL('..', import.meta.url)
const policy = requestPolicyOf(defaultProfiles['device-identity'], { tenant: 'plant', subject: 'gw-1' })
const judged = (bytes: Uint8Array): string => outcome((of) => judgeRequest(of, policy), new Uint8Array(bytes))
const made = (name: string): Buffer => [...generated, ...further].find((one) => one.name === name)?.make() ?? Buffer.alloc(0)
const requestFor = (...extensions: readonly Uint8Array[]): Buffer => selfSigned({ attributes: [seq(oid('1.2.840.113549.1.9.14'), setOf(seq(...extensions)))] })

const spki = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).publicKey.export({ format: 'der', type: 'spki' })
const hex = (digits: string): Buffer => Buffer.from(digits, 'hex')

/** A certificate around these parts; nobody signed it. */
const certificate = (
  of: { readonly spki?: Uint8Array; readonly subject?: Uint8Array; readonly extensions?: readonly Uint8Array[]; readonly after?: Uint8Array } = {},
): Uint8Array => {
  const algorithm = seq(oid('1.2.840.10045.4.3.2'))
  const tbs = seq(
    hex('a003020102'),
    integer(0x40n),
    algorithm,
    seq(commonName(utf8('ca'))),
    seq(text(0x17, '270101000000Z'), text(0x17, '280101000000Z')),
    of.subject ?? named('gw-1'),
    of.spki ?? spki,
    tlv(0xa3, seq(...(of.extensions ?? [extension('2.5.29.19', seq(), true)]))),
  )
  return Buffer.concat([certificateOf(tbs, seq(integer(1n), integer(1n))), of.after ?? Buffer.alloc(0)])
}
const read = (bytes: Uint8Array): string => outcome(parseCertificate, new Uint8Array(bytes))

test('the certificate that the others are made from is read', () => expect(read(certificate())).toBe('accepted'))

describe('a request', () => {
  test('step-ca #1265: a request for another key than the attested one', () => {
    const attested = createPublicKey({ key: spki, format: 'der', type: 'spki' })
    const answer = { csr: { ldevid: honest(), tls: honest() }, challenge: randomBytes(16), binding: randomBytes(64) } as unknown as BodyOf<'answer'>
    expect(outcome(() => checkRequests(answer, { spki: new Uint8Array(spki), object: attested }, 'plant'), new Uint8Array())).toBe('csr.ldevid.other-key')
  })

  test('OpenBao GHSA-g892-p242-8g86: addresses in the request, which policy restricts', () => {
    for (const [tag, value] of [
      [0x87, Buffer.from([10, 0, 0, 1])],
      [0x82, 'admin.example'],
      [0x81, 'root@example.org'],
    ] as const)
      expect(judged(requestFor(extension('2.5.29.17', seq(text(tag, value)))))).toBe('csr.name.kind')
  })

  test('OpenBao CVE-2026-39388, SPIRE CVE-2021-27098: the name of another in an own request', () => {
    expect(judged(selfSigned({ subject: named('gw-2') }))).toBe('csr.subject.other')
    for (const uri of ['spiffe://plant/device/gw-2', 'spiffe://plant/device/GW-1', 'spiffe://other/device/gw-1', 'spiffe://plant/station/gw-1'])
      expect(judged(requestFor(extension('2.5.29.17', seq(text(0x86, uri)))))).toBe('csr.name.other')
  })

  test('SPIRE CVE-2021-27099: names that are the same only once they are normalised', () => {
    for (const uri of [
      'spiffe://plant/device/../device/gw-1',
      'spiffe://plant//device/gw-1',
      'spiffe://plant/device/gw%2d1',
      'spiffe://plant/device/gw-1/',
      'SPIFFE://plant/device/gw-1',
    ])
      expect(judged(requestFor(extension('2.5.29.17', seq(text(0x86, uri)))))).toBe('csr.name.other')
  })

  test('OpenBao CVE-2025-55001 and its like: another case, another blank is another name', () => {
    for (const name of ['GW-1', 'gw-1 ', ' gw-1', 'gw–1']) expect(judged(selfSigned({ subject: named(name) }))).toMatch(/^csr\.subject\.(other|script)$/)
  })

  test('CVE-2009-2408: NUL in a name', () => {
    expect(judged(made('nul-in-common-name'))).toBe('csr.subject.control')
    expect(judged(made('nul-in-alt-name'))).toBe('csr.name.control')
  })

  test('CVE-2020-0601: explicit curve parameters, which node would import', () => {
    const bytes = made('explicit-parameters')
    expect(judged(bytes)).toBe('csr.ec.explicit')
  })

  test('CVE-2017-15361: the fingerprint of ROCA', () => expect(judged(made('roca'))).toBe('csr.rsa.roca'))
  test('CVE-2022-20866 and its like: primes too close to each other', () => expect(judged(made('close-primes'))).toBe('csr.rsa.close-primes'))
  test('CVE-2022-24771: a forged PKCS #1 signature under a small exponent', () => expect(judged(made('rsa-e1-forged'))).toBe('csr.rsa.exponent'))
  test('CVE-2022-21449: a signature of two zeros', () => expect(judged(made('zero-signature'))).toBe('csr.signature.range'))

  test('step-ca CVE-2026-40097: an empty extended key usage is refused, in a request and in a certificate', () => {
    expect(judged(requestFor(extension('2.5.29.37', seq())))).toBe('csr.extension.value')
    expect(read(certificate({ extensions: [extension('2.5.29.37', seq())] }))).toBe('x509.certificate')
    expect(read(certificate({ extensions: [extension('2.5.29.37', Buffer.alloc(0))] }))).toBe('x509.der')
  })

  test('CVE-2024-48080 and its like: what is announced is not allocated, what is nested is not followed', () => {
    expect(judged(made('one-mebibyte'))).toBe('csr.size')
    expect(judged(made('nested-3000'))).toBe('csr.der.depth')
    expect(judged(Buffer.from([0x30, 0x83, 0xff, 0xff, 0xff]))).toBe('csr.der')
  })
})

describe('a certificate', () => {
  test('node-forge CVE-2025-12816: two readings of one structure', () => {
    expect(read(certificate({ after: Buffer.from([0x30, 0x00]) }))).toBe('x509.der')
    expect(read(certificate({ extensions: [extension('2.5.29.19', seq(), true), extension('2.5.29.19', seq(Buffer.from([1, 1, 0xff])), true)] }))).toBe(
      'x509.certificate',
    )
    expect(read(certificate({ extensions: [seq(oid('2.5.29.19'), Buffer.from([1, 1, 0]), tlv(0x04, seq()))] }))).toBe('x509.certificate')
  })

  test('node-forge CVE-2022-24773 and its like: a signature has one encoding', () => {
    const padded = seq(tlv(0x02, Buffer.from([0, 1])), tlv(0x02, Buffer.from([1])))
    expect(outcome(rawSignature, new Uint8Array(padded))).toBe('signature.der')
    expect(outcome(rawSignature, new Uint8Array(seq(integer(1n), integer(1n))))).toBe('accepted')
  })

  test('CVE-2009-2408: NUL in the subject', () => expect(read(certificate({ subject: named('gw-1\0.example') }))).toMatch(/^x509\./))

  test('a key that has two encodings is read as what it is, and never issued', () => {
    const point = spki.subarray(27)
    const compressed = seq(
      seq(oid('1.2.840.10045.2.1'), oid('1.2.840.10045.3.1.7')),
      bits(Buffer.concat([Buffer.from([2 + ((point.at(-1) ?? 0) & 1)]), point.subarray(0, 32)])),
    )
    expect(judged(selfSigned({ spki: compressed }))).toBe('csr.ec.compressed')
  })
})

describe('issuing', () => {
  let ctx: TestContext
  beforeAll(async () => {
    ctx = await testContext()
  })
  afterAll(async () => await ctx.close())

  test('step-ca CVE-2026-30836: every door to the CA is known, and there is one issuing function', () => {
    const flows = readdirSync(new URL('server', root), { recursive: true, encoding: 'utf8' }).filter(
      (name) => name.endsWith('.ts') && !name.endsWith('.test.ts'),
    )
    const using = (word: string): string[] =>
      flows.filter((name) => new RegExp(`\\b${word}\\(`).test(readFileSync(new URL(`server/${name}`, root), 'utf8'))).toSorted()
    // A new door is added here by whoever has thought about who may come through it.
    expect(using('prepareCertificates')).toEqual([
      'flows/authority.ts',
      'flows/enrol.ts',
      'flows/est.ts',
      'flows/ocsp.ts',
      'flows/own-certificates.ts',
      'flows/renew.ts',
    ])
    expect(using('tbsOf')).toEqual(['ca/check-profiles.ts', 'ca/template.ts'])
    expect(using('writeClean')).toEqual(['flows/issue.ts'])
  })

  test('SPIRE 1.14.6: 64 devices claim one key at the same time, one has it', async () => {
    const key = new Uint8Array(generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).publicKey.export({ format: 'der', type: 'spki' }))
    const claim = async (id: string): Promise<string> => {
      const intent: Intent = { caller: { kind: 'device', id: DeviceId.parse(id), from: '127.0.0.0/24' }, action: 'enrol.issue', subject: id }
      const order: Order = { profile: 'device-tls', subject: id, spki: key, device: DeviceId.parse(id) }
      const [one] = await prepareCertificates(ctx, ctx.authority, intent, [order])
      if (one === undefined) return 'nothing'
      try {
        await perform(ctx, intent, async (tx) => {
          await claimSpki(ctx, tx, one)
          recordIssued(tx, one)
        })
        return 'issued'
      } catch (error) {
        return error instanceof Problem ? (error.reason ?? error.code) : String(error)
      }
    }
    const results = await Promise.all(Array.from({ length: 64 }, async (_, at) => await claim(`gw-${at}`)))
    expect(results.filter((result) => result === 'issued')).toHaveLength(1)
    expect(results.filter((result) => result !== 'issued').every((result) => result === 'key.reused' || result === 'conflict.certificate.spkiHash')).toBe(true)
  })

  test.each(['gw+1', 'gw/1', 'gw,1', 'gw*', '#', '../gw', 'GW', 'e-1', ''])(
    'OpenBao GHSA-59w7-v8rr-pr4p: %j is no identity, not even when it is ordered',
    async (id) => {
      const key = new Uint8Array(generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).publicKey.export({ format: 'der', type: 'spki' }))
      const intent: Intent = { caller: { kind: 'device', id: DeviceId.parse('gw'), from: '127.0.0.0/24' }, action: 'enrol.issue', subject: 'gw' }
      expect(DeviceId.safeParse(id).success).toBe(false)
      const work = prepareCertificates(ctx, ctx.authority, intent, [{ profile: 'device-identity', subject: id, spki: key, device: null }])
      await expect(work).rejects.toMatchObject({ code: 'internal', reason: id === '' ? 'lint.subject.length' : 'lint.subject.id' })
    },
  )
})
