import { createHash, generateKeyPairSync } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { hardwareModuleName } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { der, oid, sequence } from '@fleetkey/protocol/x509/der.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import type { EndorsementPolicy } from '@fleetkey/server/attestation/endorsement-policy.ts'
import type { EndorsementCa } from '@fleetkey/server/attestation/endorsements.ts'
import { methodOf } from '@fleetkey/server/attestation/methods.ts'
import { authority, basic, crl, extension, issue, newKey, serialNumber, serialOf, spkiOf, usage, type Authority, type Wanted } from './maker-certificates.ts'
import { random } from './evidence.ts'
import { reasonOf } from './refusals.ts'

const now = Date.UTC(2027, 0, 1)
const root = authority('IDevID root')
const key = newKey()
const honest: Wanted = { subject: serialNumber('SE-1'), key, extensions: [basic(false), usage('digitalSignature')] }
const hash = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex')

interface Case {
  readonly leaf?: Partial<Wanted>
  readonly by?: Authority
  /** The leaf as it is; else one that `by` issues. */
  readonly bytes?: Uint8Array
  readonly brought?: readonly Uint8Array[]
  readonly cas?: readonly EndorsementCa[]
  readonly policy?: Partial<EndorsementPolicy>
}

const trusted = (of: Authority, more: Partial<EndorsementCa> = {}): EndorsementCa => ({
  certificate: of.certificate,
  subject: 'maker',
  purpose: 'idevid',
  test: false,
  ...more,
})

const presented = (of: Case) => {
  const chain = [of.bytes ?? issue(of.by ?? root, { ...honest, ...of.leaf }), ...(of.brought ?? [])]
  const hello: BodyOf<'hello'> = {
    type: 'hello',
    serial: 'SE-1',
    purpose: 'enrol',
    random: random(32),
    agent: 'test',
    presented: { method: 'idevid', chain, ldevid: spkiOf(newKey()), recipient: spkiOf(newKey()) },
  }
  const endorsement = { deny: [], floors: [], updates: [], manufacturers: null, ...of.policy }
  return methodOf(hello.presented).present(hello, of.cas ?? [trusted(root)], { requireEkCertificate: true, endorsement }, now)
}

const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey
const namesake = authority('IDevID root')
const narrow = authority('narrow', { pathLength: 0 })
const below = authority('below', { by: narrow })
const chainOf = (count: number): readonly Authority[] => {
  const all: Authority[] = [root]
  for (let at = 1; at <= count; at++) all.push(authority(`level ${at}`, { by: all.at(-1) ?? root }))
  return all.slice(1)
}
const long = chainOf(7)
const device = { name: serialNumber('SE-0'), key: newKey() }
const notCa = { ...device, spki: spkiOf(device.key), certificate: issue(root, { ...honest, subject: device.name, key: device.key }) }
const dns = (name: string): Uint8Array => der(0x82, new TextEncoder().encode(name))
const constrained = authority('constrained', { more: [extension(oids.nameConstraints, true, sequence(der(0xa0, sequence(dns('example.org')))))] })
const altNames = (...names: readonly Uint8Array[]): Uint8Array => extension(oids.subjectAltName, false, sequence(...names))
const ekCa = authority('EK root')
const modules = [hardwareModuleName('1.2.3', Uint8Array.of(1)), hardwareModuleName('1.2.3', Uint8Array.of(2))] as const

/** Reason, what is presented. One test for each. */
const cases: readonly (readonly [string, string, Case])[] = [
  ['idevid.cert.unknown-issuer', 'a CA that nobody imported', { by: authority('foreign') }],
  [
    'idevid.cert.unknown-issuer',
    'a CA that was imported for EKs',
    { by: ekCa, cas: [trusted(root), { certificate: ekCa.certificate, subject: 'maker', test: false }] },
  ],
  ['idevid.cert.unknown-issuer', 'a root that the device brought itself', { by: ekCa, brought: [ekCa.certificate] }],
  ['idevid.cert.bad-signature', 'a CA of the same name', { by: namesake }],
  ['idevid.cert.expired', 'past its time', { leaf: { until: now - 86_400_000 } }],
  ['idevid.cert.not-yet-valid', 'ahead of its time', { leaf: { from: now + 86_400_000 } }],
  ['idevid.cert.revoked', 'on the CRL of its maker', { cas: [trusted(root, { crl: crl(root, { revoked: [serialOf(honest)] }) })] }],
  ['idevid.cert.crl-outdated', 'a CRL that is too old', { cas: [trusted(root, { crl: crl(root, { until: now - 86_400_000 }) })] }],
  ['idevid.cert.crl-untrusted', 'a CRL by another key', { cas: [trusted(root, { crl: crl(root, { key: newKey() }) })] }],
  ['idevid.cert.denied', 'its key is denied', { policy: { deny: [{ idevid: hash(spkiOf(key)) }] } }],
  [
    'idevid.cert.denied',
    'its serial is denied',
    { policy: { deny: [{ issuer: hash(root.certificate), serial: Buffer.from(serialOf(honest)).toString('hex') }] } },
  ],
  [
    'idevid.cert.usage',
    'a server certificate of the maker',
    { leaf: { extensions: [...honest.extensions, extension(oids.extKeyUsage, false, sequence(oid(oids.serverAuth)))] } },
  ],
  [
    'idevid.cert.usage',
    'an EK certificate of the maker',
    { leaf: { extensions: [...honest.extensions, extension(oids.extKeyUsage, false, sequence(oid(oids.ekCertificate)))] } },
  ],
  ['idevid.cert.is-a-ca', 'the certificate of a CA', { leaf: { extensions: [basic(true), usage('digitalSignature', 'keyCertSign')] } }],
  ['idevid.cert.key-usage', 'a key for key agreement', { leaf: { extensions: [basic(false), usage('keyAgreement')] } }],
  ['idevid.cert.key-usage', 'a key that signs CRLs', { leaf: { extensions: [basic(false), usage('digitalSignature', 'crlSign')] } }],
  ['idevid.cert.key', 'an RSA key', { leaf: { key: rsa } }],
  ['idevid.cert.key', 'a key of P-521', { leaf: { key: newKey('secp521r1') } }],
  ['idevid.cert.serial-number', 'no serialNumber', { leaf: { subject: nameOf('SE-1') } }],
  ['idevid.cert.serial-number', 'two of them', { leaf: { subject: serialNumber('SE-1', 'SE-2') } }],
  ['idevid.cert.hardware-module-name', 'two of them', { leaf: { extensions: [...honest.extensions, altNames(...modules)] } }],
  [
    'idevid.cert.hardware-module-name',
    'one that is cut short',
    { leaf: { extensions: [...honest.extensions, altNames(der(0xa0, oid(oids.hardwareModuleName), der(0xa0, sequence(oid('1.2.3')))))] } },
  ],
  [
    'idevid.cert.unknown-critical-extension',
    'an extension that nobody knows',
    { leaf: { extensions: [...honest.extensions, extension('1.2.3.4', true, Uint8Array.of(5, 0))] } },
  ],
  ['idevid.cert.malformed', 'no certificate', { bytes: new Uint8Array(100) }],
  ['idevid.cert.malformed', 'a trailing byte', { bytes: Uint8Array.from([...issue(root, honest), 0]) }],
  [
    'idevid.cert.disagree',
    'a name that two parsers read differently',
    { leaf: { extensions: [...honest.extensions, altNames(der(0x86, new TextEncoder().encode('urn:DirName:x')))] } },
  ],
  ['idevid.cert.malformed-extension', 'no key identifiers', { leaf: { bare: true } }],
  [
    'idevid.cert.name-constraints',
    'a name that its CA may not give',
    { by: constrained, cas: [trusted(constrained)], leaf: { extensions: [...honest.extensions, altNames(dns('example.net'))] } },
  ],
  ['idevid.cert.not-a-ca', 'issued by another device', { by: notCa, brought: [notCa.certificate] }],
  ['idevid.cert.path-length', 'below its CA is another', { by: below, brought: [below.certificate], cas: [trusted(narrow)] }],
  ['idevid.cert.too-long', 'seven CAs between', { by: long[6] ?? root, cas: [trusted(root), ...long.map((one) => trusted(one, { intermediate: true }))] }],
  ['idevid.cert.weak-algorithm', 'signed with SHA-1', { leaf: { sha1: true } }],
]

describe('an IDevID certificate that must not count', () => {
  test.each(cases)('%s: %s', (reason, _what, of) => expect(reasonOf(() => presented(of))).toBe(reason))
})

describe('an IDevID certificate that counts', () => {
  test('by an imported root: a factory identity; known by the hash of its key', () =>
    expect(presented({})).toMatchObject({ hardware: `idevid/${hash(spkiOf(key))}`, assurance: 'idevid', endorsedBy: [hash(root.certificate)] }))
  test('by the CA of a simulator: simulated', () => expect(presented({ cas: [trusted(root, { test: true })] }).assurance).toBe('simulated'))
  test('to 99991231235959Z, with a hardwareModuleName, and of P-384', () =>
    expect(presented({ leaf: { key: newKey('secp384r1'), extensions: [...honest.extensions, altNames(modules[0])] } }).assurance).toBe('idevid'))
  test('without key usage, as some makers leave it', () => expect(presented({ leaf: { extensions: [basic(false)] } }).assurance).toBe('idevid'))
  test('through an intermediate that the device brought', () => {
    const between = authority('between', { by: root })
    expect(presented({ by: between, brought: [between.certificate] }).endorsedBy).toEqual([between, root].map(({ certificate }) => hash(certificate)))
  })
  test('a CRL that does not list it', () =>
    expect(presented({ cas: [trusted(root, { crl: crl(root, { revoked: [Uint8Array.of(0x41, 1)] }) })] }).assurance).toBe('idevid'))
})
