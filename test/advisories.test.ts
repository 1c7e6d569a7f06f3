import { createPublicKey, generateKeyPairSync, randomBytes, X509Certificate } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { connect as connectTls } from 'node:tls'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { rawSignature, verifySignature } from '@fleetkey/protocol/signed.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { importSpki } from '@fleetkey/protocol/x509/public-key.ts'
import { actions } from '@fleetkey/server/access/authorise.ts'
import { estServer } from '@fleetkey/server/api/est.ts'
import { checkRequests } from '@fleetkey/server/attestation/requests.ts'
import { defaultProfiles, requestPolicyOf } from '@fleetkey/server/ca/profiles.ts'
import { certificateOf } from '@fleetkey/server/ca/tbs.ts'
import { serverTls } from '@fleetkey/server/flows/authority.ts'
import { admitConnection } from '@fleetkey/server/flows/connect.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { createTokens } from '@fleetkey/server/flows/enrolment-token.ts'
import { estEnrol, estReenrol, type EstRequest } from '@fleetkey/server/flows/est.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { claimSpki, prepareCertificates, recordIssued, type Order } from '@fleetkey/server/flows/issue.ts'
import { perform, type Intent } from '@fleetkey/server/flows/perform.ts'
import { addStation, parsePublicKey } from '@fleetkey/server/flows/station.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'
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

  test('SPIRE 1.14.2: a proof that costs the one who checks it', () => {
    const begun = performance.now()
    expect(judged(made('rsa-16384'))).toBe('csr.rsa.long')
    expect(performance.now() - begun).toBeLessThan(2_000)
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

  test('CVE-2020-0601: a key that describes its curve, though it be the true one, in a certificate and by itself', () => {
    const explicit = (curve: string): Buffer =>
      generateKeyPairSync('ec', { namedCurve: curve, paramEncoding: 'explicit' }).publicKey.export({ format: 'der', type: 'spki' })
    const point = bits(spki.subarray(26))
    const keys = [
      explicit('prime256v1'),
      explicit('secp384r1'),
      seq(seq(oid('1.2.840.10045.2.1'), hex('0500')), point),
      seq(seq(oid('1.2.840.10045.2.1')), point),
    ]
    for (const key of keys) {
      expect(read(certificate({ spki: key }))).toBe('key.explicit-curve')
      expect(outcome(importSpki, new Uint8Array(key))).toBe('key.explicit-curve')
      expect(outcome(() => verifySignature(key, Buffer.from('x'), Buffer.alloc(64)), new Uint8Array())).toBe('key.explicit-curve')
      expect(outcome(() => parsePublicKey(key.toString('base64')), new Uint8Array())).toBe('key.explicit-curve')
      expect(outcome(() => parsePublicKey(toPem('PUBLIC KEY', key)), new Uint8Array())).toBe('key.explicit-curve')
    }
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
      'flows/station-certificate.ts',
    ])
    // The one of a server that is sealed is its own: no CA's key is open then.
    expect(using('tbsOf')).toEqual(['ca/check-profiles.ts', 'ca/template.ts', 'sealing.ts'])
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

describe('who gets a certificate, and by which', () => {
  let ctx: TestContext
  /** Boards with a secure element, each with its factory certificate, and a maker that nobody has imported. */
  let maker: ReturnType<typeof makeIdevidCa>
  let factory: ReturnType<typeof station>
  const elements = new Map<string, Uint8Array>()
  beforeEach(async () => {
    ctx = await testContext()
    maker = makeIdevidCa(ctx.clock.now)
    factory = station()
    await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
    await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', maker.certificate), test: true, for: 'idevid' })
    const made = ['SE-1', 'SE-2'].map((serial) => ({ serial, ...makeElement(maker, serial, ctx.clock.now) }))
    for (const { serial, certificate: der } of made) elements.set(serial, der)
    await enlist('b1', [...made.map(({ serial, spki: idevid }) => ({ serial, idevid })), { serial: 'PL-1' }])
  })
  afterEach(async () => await ctx.close())

  const enlist = async (batch: string, rows: Parameters<typeof manifestJson>[1]): Promise<void> =>
    void (await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch, model: 'gateway', station: factory.id }, rows)), format: 'json' }))
  const ask = async (of: Partial<EstRequest>, id: string, key = newTlsKey()): Promise<Uint8Array> =>
    await estEnrol(ctx, { chain: [], basic: null, csr: await tlsCsr(key, id), from: '192.0.2.0/24', ...of })
  const reason = async (act: Promise<unknown>): Promise<string> =>
    await act.then(
      () => 'done',
      (thrown: unknown) => (thrown instanceof Problem ? (thrown.reason ?? thrown.code) : String(thrown)),
    )
  const element = (serial: string): Uint8Array => elements.get(serial) ?? new Uint8Array()
  const rows = async () => await Promise.all((['intent', 'certificate', 'challenge'] as const).map(async (table) => await ctx.store.count(table)))
  const token = async (): Promise<string> => {
    const [one] = await createTokens(ctx, operator(), { batch: 'b1', count: 1, life: 3_600_000 })
    return new TextDecoder().decode(one?.text.bytes())
  }

  test('Keylime #1820 (CVE-2025-13609): an identity is not bound to other hardware', async () => {
    await ask({ chain: [element('SE-1')] }, 'se-1')
    const other = makeElement(maker, 'SE-1', ctx.clock.now)
    expect(await reason(ask({ chain: [other.certificate] }, 'se-1'))).toBe('manifest.unknown-idevid')
    expect(await reason(enlist('b2', [{ serial: 'SE-1', idevid: other.spki }]))).not.toBe('done')
    expect(await reason(ask({ chain: [other.certificate] }, 'se-1'))).toBe('manifest.unknown-idevid')
    const basic = { user: 'pl-1', password: await token() }
    await ask({ basic }, 'pl-1')
    expect(await reason(ask({ basic: { ...basic, password: await token() } }, 'pl-1'))).toBe('token.identity-exists')
  })

  test('Keylime #679: who vouches for the hardware is judged before anything is on record', async () => {
    const before = await rows()
    const foreign = makeElement(makeIdevidCa(ctx.clock.now), 'SE-1', ctx.clock.now)
    expect(await reason(ask({ chain: [foreign.certificate] }, 'se-1'))).toMatch(/^idevid\./)
    expect(await rows()).toEqual(before)
    expect((await ctx.store.get('device', 'se-1'))?.state).toBe('registered')
  })

  test('SPIRE 1.14.6 and 1.15.1, CVE-2020-16250: of a chain the first certificate counts, which TLS has proven, and no other is looked for in it', async () => {
    const foreign = makeElement(makeIdevidCa(ctx.clock.now), 'SE-1', ctx.clock.now).certificate
    for (const chain of [
      [foreign, element('SE-1')],
      [foreign, element('SE-1'), maker.certificate],
      [foreign, maker.certificate, element('SE-1')],
    ])
      expect(await reason(ask({ chain }, 'se-1'))).toMatch(/^idevid\./)
    const own = await ask({ chain: [element('SE-1')] }, 'se-1')
    const again = async (chain: readonly Uint8Array[]): Promise<string> =>
      await reason(estReenrol(ctx, { chain, basic: null, csr: await tlsCsr(newTlsKey(), 'se-1'), from: '192.0.2.0/24' }))
    expect(await again([element('SE-1'), own])).toBe('certificate.unknown')
    expect(await again([own, element('SE-2')])).toBe('done')
  })

  test('Keylime CVE-2026-1709: no certificate, a foreign, an expired, one of another role, one of another device', async () => {
    const own = await ask({ chain: [element('SE-1')] }, 'se-1')
    const other = await ask({ chain: [element('SE-2')] }, 'se-2')
    const { roles, issuing, root } = ctx.authority
    const tls = await serverTls(ctx, ctx.authority, [])
    const server = new Uint8Array(new X509Certificate(tls.cert).raw)
    const foreign = makeElement(makeIdevidCa(ctx.clock.now), 'se-1', ctx.clock.now).certificate
    const connect = async (peer: Uint8Array | null): Promise<string> => {
      const clientId = 'se-1'
      // A record takes a refusal every five seconds.
      ctx.clock.now += 6_000
      const admitted = await admitConnection(ctx, {
        clientId,
        username: clientId,
        password: undefined,
        certificate: peer,
        exporter: randomBytes(32),
        from: '192.0.2.0/24',
      })
      return 'refused' in admitted ? admitted.refused : `device ${String(admitted.device)}`
    }
    const renew = async (peer: Uint8Array | null): Promise<string> =>
      await reason(estReenrol(ctx, { chain: peer === null ? [] : [peer], basic: null, csr: await tlsCsr(newTlsKey(), 'se-1'), from: '192.0.2.0/24' }))
    expect([await connect(null), await renew(null)]).toEqual(['unauthenticated', 'est.no-certificate'])
    for (const peer of [foreign, element('SE-1'), roles.delivery.certificate, roles.challenge.certificate, server, issuing, root])
      expect([await connect(peer), await renew(peer)]).toEqual(['unauthenticated', 'certificate.unknown'])
    expect([await connect(other), await renew(other)]).toEqual(['forbidden', 'est.subject'])
    // The right one is held up by the proof alone that the group's policy asks for.
    expect(await connect(own)).toBe('unauthenticated')
    expect((await ctx.store.get('device', 'se-1'))?.lastRefusal?.reason).toBe('connect.no-proof')
    ctx.clock.now += 49 * 3_600_000
    expect([await connect(own), await renew(own)]).toEqual(['expired', 'certificate.expired'])
  })

  test('AWS claim provisioning: what lets devices in lets one in, of its batch', async () => {
    const password = await token()
    await ask({ basic: { user: 'pl-1', password } }, 'pl-1')
    await enlist('b2', [{ serial: 'PL-2' }])
    for (const user of ['pl-1', 'pl-2']) expect(await reason(ask({ basic: { user, password } }, user))).toMatch(/^token\./)
  })

  test('CVE-2025-52894, CVE-2026-5807: what changes the CA is begun, approved and ended by owners alone', () => {
    const others = Object.entries(actions).filter(([action, allowed]) => /^(ca|approval)\./.test(action) && String(allowed) !== 'owner')
    expect(others).toEqual([['ca.settle', ['system']]])
  })

  test('SPIRE 1.14.3 (#6715): EST resumes no session; what a device may that resumes one is decided as ever (resumed-sessions.test.ts)', async () => {
    const http = estServer(ctx, await serverTls(ctx, ctx.authority, []))
    await new Promise<void>((resolve) => http.listen(0, '127.0.0.1', resolve))
    try {
      const { port } = http.address() as AddressInfo
      for (const maxVersion of ['TLSv1.3', 'TLSv1.2'] as const) {
        const session = await new Promise<Buffer | undefined>((resolve, reject) => {
          let given: Buffer | undefined
          const socket = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, maxVersion }, () => void setTimeout(() => socket.destroy(), 300))
          socket.on('session', (bytes: Buffer) => (given = bytes))
          socket.on('close', () => resolve(given))
          socket.on('error', reject)
        })
        const again = await new Promise<boolean>((resolve, reject) => {
          const socket = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, maxVersion, ...(session === undefined ? {} : { session }) }, () => {
            resolve(socket.isSessionReused())
            socket.destroy()
          })
          socket.on('error', reject)
        })
        expect(again).toBe(false)
      }
    } finally {
      http.closeAllConnections()
      await new Promise((resolve) => void http.close(resolve))
    }
  })
})

describe('the table of docs/threat-model.md', () => {
  const at = (path: string): string => readFileSync(new URL(path, root), 'utf8')
  const [, part = ''] = at('docs/threat-model.md').split('## What went wrong elsewhere')
  const rows = (part.split('\n## ')[0] ?? '')
    .split('\n')
    .filter((line) => line.startsWith('| '))
    .slice(1)
    .map((line) => line.slice(2, -2).split(' | '))
  const files = (here: string): string[] => [...here.matchAll(/`(test\/[a-z0-9-]+\.test\.ts)`/g)].map(([, name]) => name ?? '')

  // A row that begins with a test names one that is called after its first advisory.
  const tested = rows.filter(([, , here = '']) => here.startsWith('`test/') && !here.includes('row by row'))

  test('has every pattern', () => expect(rows.length).toBeGreaterThanOrEqual(40))
  test.each(tested)('%s: each file that it names is there, the first one with its advisory', (_what, ids = '', here = '') => {
    const [first = ''] = files(here).map(at)
    expect((ids.match(/CVE-\d{4}-\d+|GHSA-[a-z0-9-]+|SPIRE \d[\d.]+|#\d+|AWS claim provisioning/g) ?? []).filter((name) => first.includes(name))).not.toEqual(
      [],
    )
  })
})

test('none of the libraries that went wrong is installed', () => {
  const { packages } = JSON.parse(readFileSync(new URL('package-lock.json', root), 'utf8')) as { packages: Record<string, unknown> }
  const installed = Object.keys(packages).map((path) => path.split('node_modules/').at(-1))
  expect(installed.length).toBeGreaterThan(50)
  for (const name of ['node-forge', 'jsonwebtoken', 'jws', 'jsrsasign', 'elliptic']) expect(installed).not.toContain(name)
})
