import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { credentialFile, endorsementsOf } from '@fleetkey/cli/offline/attest.ts'
import { checkKey } from '@fleetkey/server/attestation/keys.ts'
import { appraiseOffline, withoutSize, type OfflineEvidence } from '@fleetkey/server/attestation/offline.ts'
import { OfflinePolicy } from '@fleetkey/server/attestation/offline-policy.ts'
import { fromPem } from '@fleetkey/protocol/x509/pem.ts'
import type { Problem } from '@fleetkey/protocol/problem.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { hasProgram } from './programs.ts'
import { caseTitles, flip, nonce, openWorkshop, random, type Workshop } from './evidence.ts'

const here = hasProgram('swtpm') && hasProgram('tpm2_quote') && hasProgram('openssl')
const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
// Certificates are made while the tests run: they are judged an hour later.
const now = Date.now() + 3_600_000
const year = 31_557_600_000
const sha256 = { hash: alg.sha256, pcrs: [0, 1, 2, 3, 4, 5, 7] }
const restricted = 'restricted|sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth'

let shop: Workshop

/** Makes an attestation key, and a quote with it: PCRs as told. */
const akOf = async (name: string, algorithm: string, attributes = restricted, ...more: string[]): Promise<void> =>
  void (await shop.tpm('tpm2_createprimary', '-C', 'e', '-G', algorithm, '-a', attributes, '-c', `${name}.ctx`, ...more)).concat(
    await shop.tpm('tpm2_readpublic', '-c', `${name}.ctx`, '-o', `${name}.pub`),
  )
const quoteWith = async (ak: string, name: string, pcrs = 'sha256:0,1,2,3,4,5,7', ...more: string[]): Promise<void> =>
  void (await shop.tpm('tpm2_quote', '-c', `${ak}.ctx`, '-l', pcrs, '-q', hex(nonce), '-m', `${name}.msg`, '-s', `${name}.sig`, ...more))

const evidence = (ak = 'ak', quote = ak): OfflineEvidence => ({
  ak: shop.bytes(`${ak}.pub`),
  quote: shop.bytes(`${quote}.msg`),
  signature: shop.bytes(`${quote}.sig`),
  nonce,
  selection: sha256,
})
const judge = (change: Partial<OfflineEvidence> = {}, of = evidence(), at = now) => appraiseOffline({ ...of, ...change }, at)
const refused = (reason: string) => ({ verdict: 'refused', reason, claims: null })

/** A CA of openssl, and EK certificates of swtpm's EK. */
const makeCa = async (name: string, subject: string, by?: string): Promise<void> => {
  await shop.openssl('ecparam', '-name', 'prime256v1', '-genkey', '-noout', '-out', `${name}.key`)
  shop.write(
    `${name}.cnf`,
    `basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n${by === undefined ? '' : 'authorityKeyIdentifier=keyid\n'}`,
  )
  const signer = by === undefined ? ['-signkey', `${name}.key`] : ['-CA', `${by}.pem`, '-CAkey', `${by}.key`]
  await shop.openssl('req', '-new', '-key', `${name}.key`, '-subj', subject, '-out', `${name}.csr`)
  await shop.openssl('x509', '-req', '-in', `${name}.csr`, ...signer, '-days', '9000', '-extfile', `${name}.cnf`, '-set_serial', '77', '-out', `${name}.pem`)
}
const profile = {
  basicConstraints: 'critical,CA:FALSE',
  keyUsage: 'critical,keyAgreement',
  extendedKeyUsage: '2.23.133.8.1',
  subjectAltName: 'critical,dirName:tpm',
  authorityKeyIdentifier: 'keyid',
}
const tpmName = '1.2.23.133.2.1=id:49465800\n2.2.23.133.2.2=SLB 9672\n3.2.23.133.2.3=id:00070055\n'
const makeEk = async (
  name: string,
  of: { by?: string; extensions?: Readonly<Record<string, string | undefined>>; tpm?: string; subject?: string; key?: string; more?: string } = {},
): Promise<Uint8Array> => {
  const lines = Object.entries({ ...profile, ...of.extensions }).flatMap(([key, value]) => (value === undefined ? [] : [`${key}=${value}`]))
  shop.write(`${name}.cnf`, `${lines.join('\n')}\n${of.more ?? ''}\n[tpm]\n${of.tpm ?? tpmName}`)
  const by = of.by ?? 'maker'
  const key = ['-force_pubkey', of.key ?? 'ek.pem']
  const subject = ['-subj', of.subject ?? '/']
  await shop.openssl(
    'x509',
    '-new',
    ...key,
    ...subject,
    '-CA',
    `${by}.pem`,
    '-CAkey',
    `${by}.key`,
    '-days',
    '2000000',
    '-extfile',
    `${name}.cnf`,
    '-set_serial',
    '4660',
    '-out',
    `${name}.pem`,
  )
  return fromPem('CERTIFICATE', Buffer.from(shop.bytes(`${name}.pem`)).toString())[0] ?? new Uint8Array()
}
const roots = (...names: string[]) =>
  endorsementsOf(names.map((name) => Buffer.from(shop.bytes(name)).toString()).join('\n')).map((ca) => ({ ...ca, test: false }))

/** One list of numbered cases: (number, reason, what the device presents). */
type Row = readonly [number, string, () => ReturnType<typeof appraiseOffline> | Promise<ReturnType<typeof appraiseOffline>>]
const numbered = (rows: readonly Row[]): void => {
  const titles = caseTitles(rows)
  test.each(rows.map(([, reason, make], at) => [titles[at], reason, make] as const))('%s', async (_, reason, make) =>
    expect(await make()).toMatchObject(refused(reason)),
  )
}

describe.skipIf(!here)('evidence of swtpm, tpm2-tools and openssl', () => {
  beforeAll(async () => {
    shop = await openWorkshop()
    await shop.tpm('tpm2_createek', '-G', 'ecc', '-c', 'ek.ctx', '-u', 'ek.pub')
    await shop.tpm('tpm2_readpublic', '-c', 'ek.ctx', '-f', 'pem', '-o', 'ek.pem')
    await shop.tpm('tpm2_createek', '-G', 'rsa', '-c', 'ekrsa.ctx', '-u', 'ekrsa.pub')
    await shop.tpm('tpm2_readpublic', '-c', 'ekrsa.ctx', '-f', 'pem', '-o', 'ekrsa.pem')
    await shop.tpm('tpm2_createak', '-C', 'ek.ctx', '-c', 'ak.ctx', '-u', 'ak.pub')
    await quoteWith('ak', 'ak')
    await akOf('ecc', 'ecc256:ecdsa-sha256:null')
    await quoteWith('ecc', 'ecc')
    await makeCa('maker', '/CN=Maker root')
    await makeCa('twin', '/CN=Maker root')
    await makeCa('inner', '/CN=Maker intermediate', 'maker')
  }, 120_000)
  afterAll(async () => await shop.close())

  describe('accepted', () => {
    test("tpm2_createak's default: RSA, a child of the EK", async () => {
      const values = await shop.tpm('tpm2_pcrread', 'sha256:0,1,2,3,4,5,7')
      const verdict = judge({ pcrValues: values, ek: shop.bytes('ek.pub') })
      expect(verdict).toMatchObject({ verdict: 'accepted', claims: { ak: { algorithm: 'RSA-2048' }, belowEk: true, bank: 'sha256' } })
      expect(Object.keys(verdict.claims?.pcrs ?? {})).toEqual(['0', '1', '2', '3', '4', '5', '7'])
    })
    test.each([
      ['rsa2048:rsapss-sha256:null', 'RSA-2048'],
      ['rsa2048:rsassa-sha384:null', 'RSA-2048'],
      ['ecc256:ecdsa-sha256:null', 'P-256'],
      ['ecc384:ecdsa-sha384:null', 'P-384'],
    ])('%s', async (algorithm, name) => {
      await akOf('other', algorithm)
      const hash = [...(algorithm.includes('384') ? ['-g', 'sha384'] : []), ...(algorithm.includes('pss') ? ['--scheme', 'rsapss'] : [])]
      await quoteWith('other', 'other', 'sha256:0,1,2,3,4,5,7', ...hash)
      const values = await shop.tpm('tpm2_pcrread', 'sha256:0,1,2,3,4,5,7')
      expect(judge({ pcrValues: values }, evidence('other'))).toMatchObject({ verdict: 'accepted', claims: { ak: { algorithm: name } } })
    })
    test('an EK certificate below an intermediate, with an empty CRL', async () => {
      const certificate = await makeEk('good', { by: 'inner' })
      await revoke('inner', [])
      const ekCertificate = { certificate, endorsements: roots('maker.pem', 'inner.pem', 'inner.crl') }
      expect(judge({ ekCertificate })).toMatchObject({
        verdict: 'accepted',
        claims: { belowEk: true, ek: { manufacturer: 'id:49465800', model: 'SLB 9672', version: '7.85', endorsement: 'CN=Maker root' } },
      })
    })
    test('an RSA EK certificate, the AK an endorsement primary', async () => {
      const certificate = await makeEk('rsa', { key: 'ekrsa.pem', extensions: { keyUsage: 'critical,keyEncipherment' } })
      expect(judge({ ekCertificate: { certificate, endorsements: roots('maker.pem') }, ek: shop.bytes('ekrsa.pub') }, evidence('ecc'))).toMatchObject({
        verdict: 'accepted',
      })
    })
  })

  /** A CRL by openssl's own CA, naming these certificates. */
  const revoke = async (by: string, names: readonly string[], days = '30'): Promise<void> => {
    shop.write(`${by}.index`, '')
    shop.write(`${by}.number`, '01\n')
    shop.write(`${by}-ca.cnf`, `[ca]\ndefault_ca=d\n[d]\ndatabase=${shop.at(`${by}.index`)}\ncrlnumber=${shop.at(`${by}.number`)}\ndefault_md=sha256\n`)
    const ca = ['-config', shop.at(`${by}-ca.cnf`), '-cert', `${by}.pem`, '-keyfile', `${by}.key`]
    for (const name of names) await shop.openssl('ca', ...ca, '-revoke', `${name}.pem`)
    await shop.openssl('ca', ...ca, '-gencrl', '-crldays', days, '-out', `${by}.crl`)
  }
  const certified = async (
    name: string,
    of: Parameters<typeof makeEk>[1] = {},
    trusted: readonly string[] = ['maker.pem'],
    at = now,
    more: Partial<OfflineEvidence> = {},
  ) => {
    const certificate = await makeEk(name, of)
    return judge({ ekCertificate: { certificate, endorsements: roots(...trusted) }, ...more }, evidence(), at)
  }
  const denying = (endorsement: object): Partial<OfflineEvidence> => ({ policy: OfflinePolicy.parse({ endorsement }) })

  describe('EK and certificates', () => {
    numbered([
      [
        1,
        'ek.cert.unknown-issuer',
        async () => {
          await makeCa('stranger', '/CN=Somebody')
          return await certified('c1', { by: 'stranger' })
        },
      ],
      [2, 'ek.cert.bad-signature', async () => await certified('c2', { by: 'twin' })],
      [3, 'ek.cert.other-key', async () => await certified('c3', {}, ['maker.pem'], now, { ek: shop.bytes('ekrsa.pub') })],
      [4, 'ek.cert.not-yet-valid', async () => await certified('c4', {}, ['maker.pem'], now - year)],
      [4, 'ek.cert.expired', async () => await certified('c4e', {}, ['maker.pem'], now + 30 * year)],
      [
        4,
        'ek.cert.revoked',
        async () => {
          await makeEk('c4r')
          await revoke('maker', ['c4r'])
          return await certified('c4r', {}, ['maker.pem', 'maker.crl'])
        },
      ],
      [
        4,
        'ek.cert.crl-outdated',
        async () => {
          await revoke('maker', [], '1')
          return await certified('c4o', {}, ['maker.pem', 'maker.crl'], now + 3 * 86_400_000)
        },
      ],
      [
        4,
        'ek.cert.denied',
        async () => {
          const issuer = (await shop.openssl('x509', '-in', 'maker.pem', '-noout', '-fingerprint', '-sha256'))
            .split('=')[1]
            ?.trim()
            .replaceAll(':', '')
            .toLowerCase()
          return await certified('c4d', {}, ['maker.pem'], now, denying({ deny: [{ issuer, serial: '1234' }] }))
        },
      ],
      [
        4,
        'ek.cert.denied',
        async () => {
          const ek = hex(
            new Uint8Array(
              (await import('node:crypto'))
                .createHash('sha256')
                .update(withoutSize(shop.bytes('ek.pub')))
                .digest(),
            ),
          )
          return judge({ ek: shop.bytes('ek.pub'), ...denying({ deny: [{ ek }] }) })
        },
      ],
      [
        4,
        'ek.cert.firmware-denied',
        async () => await certified('c4f', {}, ['maker.pem'], now, denying({ deny: [{ manufacturer: 'id:49465800', firmware: '7.85' }] })),
      ],
      [5, 'ek.cert.usage', async () => await certified('c5', { extensions: { extendedKeyUsage: '2.23.133.8.3' } })],
      [5, 'ek.cert.usage', async () => await certified('c5u', { extensions: { extendedKeyUsage: undefined } })],
      [5, 'ek.cert.is-a-ca', async () => await certified('c5c', { extensions: { basicConstraints: 'critical,CA:TRUE' } })],
      [5, 'ek.cert.key-usage', async () => await certified('c5k', { extensions: { keyUsage: 'critical,keyEncipherment' } })],
      [5, 'ek.cert.key-usage', async () => await certified('c5s', { extensions: { keyUsage: 'critical,keyAgreement,digitalSignature' } })],
      [6, 'ek.cert.unknown-critical-extension', async () => await certified('c6', { more: '1.2.3.4=critical,DER:0500' })],
      [6, 'ek.cert.manufacturer', async () => await certified('c6m', { tpm: tpmName.replace('49465800', '58585858') })],
      [6, 'ek.cert.manufacturer', async () => await certified('c6a', {}, ['maker.pem'], now, denying({ manufacturers: ['id:4E544300'] }))],
      [6, 'ek.cert.san.missing', async () => await certified('c6s', { extensions: { subjectAltName: undefined }, subject: '/CN=ek' })],
      [6, 'ek.cert.san.missing', async () => await certified('c6v', { tpm: tpmName.replace(/3\.2\.23\.133\.2\.3.*\n/, '') })],
      [6, 'ek.cert.san.not-critical', async () => await certified('c6c', { extensions: { subjectAltName: 'dirName:tpm' } })],
      [7, 'ek.attributes.not-restricted', async () => await ekOf('rsa2048', 'sign|decrypt|fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy')],
      [7, 'ek.policy', async () => await ekOf('ecc256:aes128cfb', 'restricted|decrypt|fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy')],
      [8, 'ek.key-size', async () => await ekOf('rsa1024:aes128cfb', 'restricted|decrypt|fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy', 'rsa2048')],
    ])
  })
  /** A primary of these attributes presented as the EK. RSA below 2048 bits: the public area of `instead`, with what it says of its size changed. */
  const ekOf = async (algorithm: string, attributes: string, instead?: string): Promise<ReturnType<typeof appraiseOffline>> => {
    if (instead !== undefined) {
      const ek = Uint8Array.from(withoutSize(shop.bytes('ekrsa.pub')))
      const modulus = ek.length - 256
      const small = Buffer.concat([ek.subarray(0, modulus - 8), Buffer.from('0400000000000080', 'hex'), ek.subarray(modulus, modulus + 128)])
      return judge({ ek: new Uint8Array(small) })
    }
    await shop.tpm('tpm2_createprimary', '-C', 'e', '-G', algorithm, '-a', attributes, '-c', 'wrong.ctx')
    await shop.tpm('tpm2_readpublic', '-c', 'wrong.ctx', '-o', 'wrong.pub')
    return judge({ ek: shop.bytes('wrong.pub') })
  }

  describe('attestation keys', () => {
    const akIs = async (algorithm: string, attributes: string, ...more: string[]): Promise<ReturnType<typeof appraiseOffline>> => {
      await akOf('bad', algorithm, attributes, ...more)
      return judge({ ak: shop.bytes('bad.pub') })
    }
    numbered([
      [11, 'ak.attributes.not-fixed-tpm', async () => await akIs('ecc256:ecdsa-sha256:null', 'restricted|sign|sensitivedataorigin|userwithauth')],
      [14, 'ak.attributes.not-restricted', async () => await akIs('ecc256:ecdsa-sha256:null', restricted.replace('restricted|', ''))],
      [15, 'ak.attributes.not-sign', async () => await akIs('ecc256:aes128cfb', restricted.replace('sign', 'decrypt'))],
      [17, 'ak.scheme', async () => await akIs('ecc256:ecdsa-sha1:null', restricted)],
      [17, 'ak.name-algorithm', async () => await akIs('ecc256:ecdsa-sha256:null', restricted, '-g', 'sha1')],
    ])
    test('case 16: ak.policy', async () => {
      await shop.tpm('tpm2_createpolicy', '--policy-pcr', '-l', 'sha256:0', '-L', 'pcr.policy')
      await akOf('policy', 'ecc256:ecdsa-sha256:null', `${restricted}|noda`, '-L', 'pcr.policy')
      expect(() => checkKey('ak', withoutSize(shop.bytes('policy.pub')))).toThrow(expect.objectContaining({ reason: 'ak.policy' }) as Problem)
      await akOf('plain', 'ecc256:ecdsa-sha256:null', `${restricted}|noda`)
      expect(checkKey('ak', withoutSize(shop.bytes('plain.pub'))).name).toHaveLength(34)
      // The policy that is expected is a parameter: with it the password must not be a way around.
      const policy = shop.bytes('pcr.policy')
      expect(() => checkKey('ak', withoutSize(shop.bytes('policy.pub')), policy)).toThrow(
        expect.objectContaining({ reason: 'ak.attributes.user-with-auth' }) as Problem,
      )
    })
  })

  describe('quotes', () => {
    const quoted = async (pcrs: string, change: Partial<OfflineEvidence> = {}): Promise<ReturnType<typeof appraiseOffline>> => {
      await quoteWith('ecc', 'q', pcrs)
      return judge(change, evidence('ecc', 'q'))
    }
    const values = async (change: (lines: string[]) => string[]): Promise<string> =>
      change(
        (await shop.tpm('tpm2_pcrread', 'sha256:0,1,2,3,4,5,7'))
          .split('\n')
          .filter((line) => line.includes('0x'))
          .map((line) => line.replace(/\s*(\d+)\s*:\s*0x/, '$1 ')),
      ).join('\n')
    numbered([
      [20, 'ak.malformed', () => judge({ ak: Uint8Array.from([...withoutSize(shop.bytes('ak.pub')), 0]) })],
      [20, 'quote.signature.malformed', () => judge({ signature: Uint8Array.from([...shop.bytes('ak.sig'), 0]) })],
      [24, 'quote.signature', () => judge({ signature: flip(shop.bytes('ak.sig')) })],
      [25, 'quote.signature', () => judge({ quote: flip(shop.bytes('ak.msg')) })],
      [28, 'quote.nonce', () => judge({ nonce: random(32) })],
      [28, 'quote.nonce', () => judge({ nonce: nonce.subarray(0, 16) })],
      [28, 'quote.nonce.short', () => judge({ nonce: nonce.subarray(0, 1) })],
      [
        28,
        'quote.nonce',
        async () => {
          await shop.tpm('tpm2_quote', '-c', 'ecc.ctx', '-l', 'sha256:0,1,2,3,4,5,7', '-q', hex(nonce.subarray(0, 1)), '-m', 'q.msg', '-s', 'q.sig')
          return judge({}, evidence('ecc', 'q'))
        },
      ],
      [
        28,
        'quote.nonce',
        async () => {
          await shop.tpm('tpm2_quote', '-c', 'ecc.ctx', '-l', 'sha256:0,1,2,3,4,5,7', '-m', 'q.msg', '-s', 'q.sig')
          return judge({}, evidence('ecc', 'q'))
        },
      ],
      [29, 'quote.selection.missing', async () => await quoted('sha256:0,1,2,3')],
      [30, 'quote.selection.resettable', async () => await quoted('sha256:16,23')],
      [30, 'quote.selection.resettable', async () => await quoted('sha256:16,23', { selection: { hash: alg.sha256, pcrs: [16, 23] } })],
      [31, 'quote.selection.bank', async () => await quoted('sha1:0,1,2,3,4,5,7')],
      [31, 'quote.selection.bank', async () => await quoted('sha1:0,1', { selection: { hash: alg.sha1, pcrs: [0, 1] } })],
      [31, 'quote.selection.bank', async () => await quoted('sha256:0,1', { selection: { hash: alg.sha384, pcrs: [0, 1] } })],
      [32, 'quote.selection.extra-bank', async () => await quoted('sha256:0,1,2,3,4,5,7+sha384:0')],
      [32, 'quote.selection.extra', async () => await quoted('sha256:0,1,2,3,4,5,6,7')],
      [33, 'quote.values.index', async () => judge({ pcrValues: await values((lines) => [...lines.slice(1), `6 ${'00'.repeat(32)}`]) })],
      [33, 'quote.values.index', async () => judge({ pcrValues: await values((lines) => [...lines, lines[0] ?? '']) })],
      [33, 'quote.values.malformed', async () => judge({ pcrValues: await values(([, ...lines]) => ['0 00', ...lines]) })],
      [35, 'quote.values.count', async () => judge({ pcrValues: await values((lines) => lines.slice(1)) })],
      [36, 'quote.signature', () => judge({ quote: shop.bytes('ecc.msg') })],
      [
        37,
        'quote.signer',
        async () => {
          // An AK below a storage key of the owner, shown with the EK of this TPM.
          await shop.tpm('tpm2_createprimary', '-C', 'o', '-G', 'ecc256:aes128cfb', '-c', 'parent.ctx')
          await shop.tpm('tpm2_create', '-C', 'parent.ctx', '-G', 'ecc256:ecdsa-sha256:null', '-a', restricted, '-u', 'child.tpub', '-r', 'child.priv')
          await shop.tpm('tpm2_load', '-C', 'parent.ctx', '-u', 'child.tpub', '-r', 'child.priv', '-c', 'child.ctx')
          await shop.tpm('tpm2_readpublic', '-c', 'child.ctx', '-o', 'child.pub')
          await quoteWith('child', 'child')
          return judge({ ek: shop.bytes('ek.pub') }, evidence('child'))
        },
      ],
      [38, 'tpm.reset-count.lower', () => judge({ policy: OfflinePolicy.parse({ last: { resetCount: 1_000_000 } }) })],
      [38, 'tpm.clock.back', () => judge({ policy: OfflinePolicy.parse({ last: { resetCount: 0, clock: 10 ** 12 } }) })],
      [39, 'tpm.firmware.below-floor', () => judge({ policy: OfflinePolicy.parse({ endorsement: { floors: [{ manufacturer: '*', minimum: '60000.0' }] } }) })],
      [39, 'tpm.firmware.changed', () => judge({ policy: OfflinePolicy.parse({ last: { resetCount: 0, firmware: '1.2.3.4' } }) })],
      [
        40,
        'quote.signature.scheme',
        async () => {
          await akOf('pss', 'rsa2048:rsapss-sha256:null')
          return judge({ ak: shop.bytes('pss.pub') })
        },
      ],
      [
        47,
        'reference.pcr-0',
        async () =>
          judge({ pcrValues: await values((lines) => lines), policy: OfflinePolicy.parse({ releases: [{ id: 'r1', pcrs: { 0: 'ab'.repeat(32) } }] }) }),
      ],
    ])

    test('case 33: quote.digest, the values of two PCRs exchanged', async () => {
      await shop.tpm('tpm2_pcrextend', `0:sha256=${'11'.repeat(32)}`)
      await quoteWith('ecc', 'x')
      const exchanged = await values(([first = '', second = '', ...lines]) => [`0 ${second.slice(2)}`, `1 ${first.slice(2)}`, ...lines])
      expect(judge({ pcrValues: exchanged }, evidence('ecc', 'x'))).toMatchObject(refused('quote.digest'))
      expect(judge({ pcrValues: await values((lines) => lines) }, evidence('ecc', 'x'))).toMatchObject({ verdict: 'accepted' })
      // Lines in another order are the same values: the index counts.
      expect(judge({ pcrValues: await values((lines) => lines.toReversed()) }, evidence('ecc', 'x'))).toMatchObject({ verdict: 'accepted' })
    })
  })

  test.each([
    ['ecc', 'ek.pub', 'ek.ctx'],
    ['rsa', 'ekrsa.pub', 'ekrsa.ctx'],
  ])('tpm2_activatecredential opens what attest make-credential writes, %s EK', async (_, ek, context) => {
    const secret = random(32)
    await shop.tpm('tpm2_createak', '-C', context, '-c', 'act.ctx', '-u', 'act.pub', '-G', 'ecc', '-s', 'ecdsa', '-g', 'sha256')
    shop.write('cred', credentialFile({ ek: shop.bytes(ek), ak: shop.bytes('act.pub'), secret, random }))
    await shop.tpm('tpm2_startauthsession', '--policy-session', '-S', 'session.ctx')
    await shop.tpm('tpm2_policysecret', '-S', 'session.ctx', '-c', 'e')
    await shop.tpm('tpm2_activatecredential', '-c', 'act.ctx', '-C', context, '-i', 'cred', '-o', 'out', '-P', 'session:session.ctx')
    expect(hex(shop.bytes('out'))).toBe(hex(secret))
    await shop.tpm('tpm2_flushcontext', 'session.ctx')
  })

  test('the command: exit codes, JSON, files as the tools write them', () => {
    const main = fileURLToPath(import.meta.resolve('@fleetkey/cli/main.ts'))
    const fleetkey = (...args: string[]) => {
      const { status, stdout, stderr } = spawnSync(process.execPath, [main, 'attest', ...args], { encoding: 'utf8' })
      return { status, stdout, stderr }
    }
    const files = ['--ak', shop.at('ak.pub'), '--quote', shop.at('ak.msg'), '--signature', shop.at('ak.sig'), '--pcrs', 'sha256:0,1,2,3,4,5,7']
    const good = fleetkey('verify', ...files, '--nonce', hex(nonce), '--ek', shop.at('ek.pub'), '--json')
    expect(good).toMatchObject({ status: 0 })
    expect(JSON.parse(good.stdout)).toMatchObject({ verdict: 'accepted', reason: null, claims: { bank: 'sha256', belowEk: true } })
    const bad = fleetkey('verify', ...files, '--nonce', hex(random(32)), '--json')
    expect(bad).toMatchObject({ status: 3 })
    expect(JSON.parse(bad.stdout)).toMatchObject({ verdict: 'refused', reason: 'quote.nonce' })
    expect(fleetkey('verify', ...files, '--nonce', 'xyz')).toMatchObject({ status: 1 })
    expect(fleetkey('verify', ...files.slice(2), '--nonce', hex(nonce))).toMatchObject({ status: 1 })
    expect(fleetkey('verify', ...files, '--nonce', hex(nonce), '--ek-cert', shop.at('maker.pem'))).toMatchObject({ status: 1 })
    const made = fleetkey('make-credential', '--ek', shop.at('ek.pub'), '--ak', shop.at('ak.pub'), '--secret', 'aabbcc', '--out', shop.at('made'))
    expect(made).toMatchObject({ status: 0 })
    expect(hex(new Uint8Array(readFileSync(shop.at('made'))).subarray(0, 8))).toBe('badcc0de00000001')
    expect(fleetkey('make-credential', '--ek', shop.at('ak.pub'), '--ak', shop.at('ak.pub'), '--secret', 'aa', '--json')).toMatchObject({ status: 3 })
  })
})
