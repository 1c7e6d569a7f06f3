import { createHash, generateKeyPairSync, randomBytes } from 'node:crypto'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { checkProfiles } from '@fleetkey/server/ca/check-profiles.ts'
import { lint, lintRules, requireClean, type LintRule, type ToBeSigned } from '@fleetkey/server/ca/lint/lint.ts'
import { ProfileSettings, profilesOf, type ProfileSettings as Settings } from '@fleetkey/server/ca/profile-settings.ts'
import { defaultProfiles, profileNames, validityOf, type Profile } from '@fleetkey/server/ca/profiles.ts'
import { fillTemplate } from '@fleetkey/server/ca/template.ts'
import { serialOf, signatureAlgorithm, statusValues, tbsOf, type CertificateOrder, type StatusPlaces } from '@fleetkey/server/ca/tbs.ts'
import { attribute, bits, commonName, extension, integer, oid, seq, setOf, text, tlv, utf8 } from './hostile-requests.ts'

const hex = (digits: string): Buffer => Buffer.from(digits, 'hex')
const spkiOf = (namedCurve: string): Buffer => generateKeyPairSync('ec', { namedCurve }).publicKey.export({ format: 'der', type: 'spki' })
const now = Date.UTC(2027, 0, 1)
const issuerName = seq(commonName(utf8('ca')))
const issuer = { subject: new Uint8Array(issuerName), spki: new Uint8Array(spkiOf('prime256v1')), until: Date.UTC(2029, 0, 1) }
const key = spkiOf('prime256v1')
const serial = serialOf(randomBytes(12), Date.now())
const ecdsa = seq(oid('1.2.840.10045.4.3.2'))
const identifier = (spki: Uint8Array): Buffer => createHash('sha256').update(spki).digest().subarray(0, 20)
const utc = (digits: string): Buffer => text(0x17, digits)

/** One certificate as the profile would have it, part by part; each test puts another part in its place. */
interface Parts {
  readonly version?: Uint8Array
  readonly serial?: Uint8Array
  readonly signature?: Uint8Array
  readonly issuer?: Uint8Array
  readonly validity?: Uint8Array
  readonly subject?: Uint8Array
  readonly spki?: Uint8Array
  readonly unique?: Uint8Array
  /** In the place of the extension of this name; null leaves it out. */
  readonly basic?: Uint8Array | null
  readonly usage?: Uint8Array | null
  readonly purpose?: Uint8Array | null
  readonly names?: Uint8Array | null
  readonly subjectKey?: Uint8Array | null
  readonly authorityKey?: Uint8Array | null
  readonly more?: readonly Uint8Array[]
  readonly extensions?: Uint8Array
}

const uri = (value: string | Uint8Array): Buffer => text(0x86, value)
const basic = (value: Uint8Array, critical = true): Buffer => extension('2.5.29.19', value, critical)
const usage = (digits: string, critical = true): Buffer => extension('2.5.29.15', hex(digits), critical)
const purpose = (...oids: readonly string[]): Buffer => extension('2.5.29.37', seq(...oids.map(oid)))
const names = (...all: readonly Uint8Array[]): Buffer => extension('2.5.29.17', seq(...all))
const subjectKey = (value: Uint8Array, critical = false): Buffer => extension('2.5.29.14', tlv(0x04, value), critical)
const authorityKey = (value: Uint8Array, critical = false): Buffer => extension('2.5.29.35', seq(value), critical)
const clientAuth = '1.3.6.1.5.5.7.3.2'
const notBefore = utc('270101000000Z')
const notAfter = utc('270102000000Z')

const tbs = (parts: Parts = {}): Buffer => {
  const { spki = key } = parts
  const part = (given: Uint8Array | null | undefined, usual: Uint8Array): readonly Uint8Array[] => (given === null ? [] : [given ?? usual])
  return seq(
    parts.version ?? hex('a003020102'),
    parts.serial ?? integer(BigInt(`0x${serial}`)),
    parts.signature ?? ecdsa,
    parts.issuer ?? issuerName,
    parts.validity ?? seq(notBefore, notAfter),
    parts.subject ?? seq(commonName(utf8('gw-1'))),
    spki,
    ...(parts.unique === undefined ? [] : [parts.unique]),
    parts.extensions ??
      tlv(
        0xa3,
        seq(
          ...part(parts.basic, basic(seq())),
          ...part(parts.usage, usage('03020780')),
          ...part(parts.purpose, purpose(clientAuth)),
          ...part(parts.names, names(uri('spiffe://plant/device/gw-1'))),
          ...part(parts.subjectKey, subjectKey(identifier(spki))),
          ...part(parts.authorityKey, authorityKey(tlv(0x80, identifier(issuer.spki)))),
          ...(parts.more ?? []),
        ),
      ),
  )
}

/** What was ordered, where a test needs that to be odd as well, so that it breaks the one rule and no other. */
interface Odd {
  readonly order?: Partial<CertificateOrder>
  readonly profile?: Partial<Profile>
  readonly serial?: string
  readonly algorithm?: Uint8Array
  readonly issuer?: Uint8Array
  readonly status?: StatusPlaces
}

const linted = (bytes: Uint8Array, odd: Odd = {}): ToBeSigned => ({
  tbs: bytes,
  algorithm: odd.algorithm ?? signatureAlgorithm,
  profile: { ...defaultProfiles['device-tls'], ...odd.profile },
  order: { profile: 'device-tls', subject: 'gw-1', spki: new Uint8Array(key), ...odd.order },
  issuer: { ...issuer, ...(odd.issuer === undefined ? {} : { spki: odd.issuer }), status: odd.status },
  of: { tenant: 'plant', serial: odd.serial ?? serial, notBefore: now, notAfter: now + 86_400_000 },
  now,
})

const named = (...values: readonly Uint8Array[]): Parts => ({ subject: seq(...values) })
const point = key.subarray(26)
const ec = (parameters: Uint8Array, bitString: Uint8Array): Buffer => seq(seq(oid('1.2.840.10045.2.1'), parameters), bitString)
const p256 = oid('1.2.840.10045.3.1.7')
const offCurve = ec(p256, bits(Buffer.concat([point.subarray(0, -1), Buffer.from([(point.at(-1) ?? 0) ^ 1])])))
const compressed = ec(p256, bits(Buffer.concat([Buffer.from([2]), point.subarray(1, 33)])))
const unused = ec(p256, bits(point, 1))
const explicit: Buffer = generateKeyPairSync('ec', { namedCurve: 'prime256v1', paramEncoding: 'explicit' }).publicKey.export({ format: 'der', type: 'spki' })
const p384 = spkiOf('secp384r1')
const rsa: Buffer = generateKeyPairSync('rsa', { modulusLength: 2048 }).publicKey.export({ format: 'der', type: 'spki' })
const long = 'g'.repeat(65)
const hostUri = 'spiffe://plant/device/'
const hosts: Partial<Profile> = { names: 'hosts' }
const host = (...all: readonly string[]): Odd => ({ profile: hosts, order: { names: all } })
/** The same element with its length in one byte more, and with an indefinite length. */
const longLength = (bytes: Buffer): Buffer => Buffer.concat([bytes.subarray(0, 1), Buffer.from([0x81]), bytes.subarray(1)])
const indefinite = (bytes: Buffer): Buffer => Buffer.concat([bytes.subarray(0, 1), Buffer.from([0x80]), bytes.subarray(2), Buffer.alloc(2)])
const many = Array.from({ length: 600 }, (_, at) => `host-${at}.example`)
const validity = (from: Uint8Array, to: Uint8Array): Parts => ({ validity: seq(from, to) })
const asSerial = (digits: string): Parts => ({ serial: tlv(0x02, hex(digits)) })
const ipName = tlv(0x87, Buffer.from([10, 0, 0]))

const status: StatusPlaces = { crl: (of) => `http://ca.example/${of.slice(-1)}`, ocsp: 'http://ca.example/ocsp', issuer: 'http://ca.example/ca.cer' }
const offered: Odd = { profile: { status: true }, status }
const places = statusValues(status, serial)
const points = extension('2.5.29.31', places.crl)
const access = extension('1.3.6.1.5.5.7.1.1', places.access)
const noCheck = '1.3.6.1.5.5.7.48.1.5'

const organisation = (name: string): Buffer => setOf(attribute('2.5.4.10', utf8(name)))
const organised = (name: string): Odd => ({ profile: { attributes: { O: name } } })
const pattern: Profile['patterns'][number] = { kind: 'DNS', text: '{id}.plant.example', parts: ['{id}', 'plant', 'example'] }
const [own, dns] = [uri('spiffe://plant/device/gw-1'), (name: string): Buffer => text(0x82, name)]
/** A purpose that no profile may have beside its own: whatever its profile says. */
const foreign = (...more: readonly string[]): readonly [Parts, Odd] => [{ purpose: purpose(clientAuth, ...more) }, { profile: { purposes: more } }]

type Violation = readonly [rule: LintRule, name: string, parts: Parts | Uint8Array, odd?: Odd]
const violations: readonly Violation[] = [
  ['tbs.structure', 'no structure', Buffer.from([0x30, 3, 1, 1])],
  ['tbs.structure', 'a field too many', Buffer.concat([Buffer.from([0x30, 5]), Buffer.from([0x02, 1, 1, 0x05, 0])])],
  ['der.length', 'a long length in the subject', named(setOf(attribute('2.5.4.3', longLength(utf8('gw-1')))))],
  ['der.definite', 'an indefinite sequence of dates', { validity: indefinite(seq(notBefore, notAfter)) }],
  ['der.trailing', 'bytes behind the value of an extension', { usage: usage('0302078000') }],
  ['der.trailing', 'bytes behind the whole', Buffer.concat([tbs(), Buffer.from([5, 0])])],
  ['der.integer', 'a serial with a zero too many', { serial: tlv(0x02, Buffer.concat([Buffer.from([0]), hex(serial)])) }],
  ['der.boolean', 'true as 01', { basic: seq(oid('2.5.29.19'), hex('010101'), tlv(0x04, seq())) }],
  ['der.default', 'critical FALSE written out', { purpose: seq(oid('2.5.29.37'), hex('010100'), tlv(0x04, seq(oid(clientAuth)))) }],
  ['der.default', 'cA FALSE written out', { basic: basic(seq(hex('010100'))) }],
  ['der.bits', 'a zero bit at the end', { usage: usage('03020680') }],
  [
    'der.oid',
    'an arc with a zero too many',
    { purpose: extension('2.5.29.37', seq(tlv(0x06, hex('2b0601050507808003').subarray(0, 6), hex('800302'.slice(0, 4)), hex('02')))) },
  ],
  ['tbs.size', 'six hundred names', { names: names(...many.map((one) => text(0x82, one))) }, host(...many)],
  ['tbs.unique-ids', 'a subjectUniqueID', { unique: tlv(0x82, hex('0001')) }],
  ['version.three', 'version 1', { version: Buffer.alloc(0) }],
  ['version.three', 'version 2', { version: hex('a003020101') }],
  ['serial.positive', 'a negative serial', asSerial('9000000000000000000000000000ff01'), { serial: '9000000000000000000000000000ff01' }],
  ['serial.length', '21 bytes', asSerial('40'.repeat(21)), { serial: '40'.repeat(21) }],
  ['serial.entropy', '7 bytes', asSerial('41424344454647'), { serial: '41424344454647' }],
  ['serial.intent', 'another serial', { serial: tlv(0x02, hex('41'.repeat(16))) }],
  ['signature.same', 'SHA-384 outside', {}, { algorithm: seq(oid('1.2.840.10045.4.3.3')) }],
  ['signature.allowed', 'SHA-1', { signature: seq(oid('1.2.840.10045.4.1')) }, { algorithm: seq(oid('1.2.840.10045.4.1')) }],
  ['signature.parameters', 'NULL', { signature: seq(oid('1.2.840.10045.4.3.2'), hex('0500')) }, { algorithm: seq(oid('1.2.840.10045.4.3.2'), hex('0500')) }],
  ['issuer.name', 'another issuer', { issuer: seq(commonName(utf8('CA'))) }],
  ['issuer.name', 'the same name in another string type', { issuer: seq(commonName(text(0x13, 'ca'))) }],
  ['validity.form', 'no seconds', validity(utc('2701010000Z'), notAfter)],
  ['validity.form', 'an offset', validity(utc('270101000000+0000'), notAfter)],
  ['validity.form', 'a fraction', validity(text(0x18, '20500101000000.5Z'), notAfter)],
  ['validity.date', 'the thirteenth month', validity(notBefore, utc('271301000000Z'))],
  ['validity.date', '30 February', validity(notBefore, utc('270230000000Z'))],
  ['validity.utc-time', 'GeneralizedTime in 2027', validity(notBefore, text(0x18, '20270102000000Z'))],
  ['validity.order', 'an end before the beginning', validity(notBefore, utc('261231000000Z'))],
  ['validity.endless', 'no end', validity(notBefore, text(0x18, '99991231235959Z'))],
  ['validity.life', 'a year where two days belong', validity(notBefore, utc('280101000000Z'))],
  ['validity.issuer', 'a second longer than its issuer', validity(notBefore, utc('290101000001Z')), { profile: { life: 3 * 365 * 86_400_000 } }],
  ['validity.backdate', 'from next week', validity(utc('270108000000Z'), utc('270109000000Z'))],
  ['validity.backdate', 'from last week', validity(utc('261225000000Z'), utc('261226000000Z'))],
  ['subject.present', 'an empty subject', { subject: seq(), names: extension('2.5.29.17', seq(uri('spiffe://plant/device/gw-1')), true) }],
  ['alt-name.empty', 'an empty list', { names: names() }],
  ['subject.one-name', 'two common names', named(commonName(utf8('gw-1')), commonName(utf8('gw-1')))],
  ['subject.attributes', 'an organisation', named(commonName(utf8('gw-1')), setOf(attribute('2.5.4.10', utf8('Plant'))))],
  ['subject.attributes', 'none where the profile has one', {}, organised('Plant')],
  ['subject.attributes', 'another organisation', named(organisation('Works'), commonName(utf8('gw-1'))), organised('Plant')],
  ['subject.attributes', 'the organisation behind the common name', named(commonName(utf8('gw-1')), organisation('Plant')), organised('Plant')],
  [
    'subject.attributes',
    'the organisation in another string type',
    named(setOf(attribute('2.5.4.10', text(0x13, 'Plant'))), commonName(utf8('gw-1'))),
    organised('Plant'),
  ],
  ['subject.bounds', 'an organisation of 65 characters', named(organisation(long), commonName(utf8('gw-1'))), organised(long)],
  ['subject.bounds', 'an empty organisation', named(organisation(''), commonName(utf8('gw-1'))), organised('')],
  [
    'subject.country',
    'a country in small letters',
    named(setOf(attribute('2.5.4.6', text(0x13, 'de'))), commonName(utf8('gw-1'))),
    { profile: { attributes: { C: 'de' } } },
  ],
  ['subject.rdn', 'a relative name without attribute', named(commonName(utf8('gw-1')), setOf())],
  ['subject.length', '65 characters', { ...named(commonName(utf8(long))), names: null }, { profile: { names: null }, order: { subject: long } }],
  [
    'subject.id',
    'another path',
    { ...named(commonName(utf8('gw-1/../gw-2'))), names: names(uri(`${hostUri}gw-1/../gw-2`)) },
    { order: { subject: 'gw-1/../gw-2' } },
  ],
  ['subject.string', 'IA5String', named(commonName(text(0x16, 'gw-1')))],
  ['subject.encoding', 'bad UTF-8', { ...named(commonName(utf8(hex('67fe')))), names: null }, { profile: { names: null }, order: { subject: 'g\uFFFD' } }],
  ['subject.control', 'NUL', { ...named(commonName(utf8('g\0w'))), names: null }, { profile: { names: null }, order: { subject: 'g\0w' } }],
  ['subject.order', 'another name', named(commonName(utf8('gw-2')))],
  ['key.allowed', 'P-384', { spki: p384 }, { order: { spki: new Uint8Array(p384) } }],
  ['key.allowed', 'RSA', { spki: rsa }, { order: { spki: new Uint8Array(rsa) } }],
  ['key.named-curve', 'explicit parameters', { spki: explicit }, { order: { spki: new Uint8Array(explicit) } }],
  ['key.uncompressed', 'a compressed point', { spki: compressed }, { order: { spki: new Uint8Array(compressed) } }],
  ['key.bits', 'unused bits', { spki: unused }, { order: { spki: new Uint8Array(unused) } }],
  ['key.on-curve', 'a point beside the curve', { spki: offCurve }, { order: { spki: new Uint8Array(offCurve) } }],
  ['key.order', 'another key', { spki: spkiOf('prime256v1') }],
  ['key.issuer', 'the key of the CA', { spki: Buffer.from(issuer.spki) }, { order: { spki: issuer.spki } }],
  ['extension.unique', 'key usage twice', { more: [usage('03020780')] }],
  ['extension.known', 'a policy', { more: [extension('2.5.29.32', seq(seq(oid('1.2.3.4'))))] }],
  ['extension.known', 'name constraints', { more: [extension('2.5.29.30', seq(), true)] }],
  ['extension.value', 'key usage as NULL in the place of the policy', { subjectKey: extension('2.5.29.14', Buffer.from([0xff])) }],
  ['basic-constraints.present', 'none', { basic: null }],
  ['basic-constraints.critical', 'not critical', { basic: basic(seq(), false) }],
  ['basic-constraints.ca', 'a CA', { basic: basic(seq(hex('0101ff'))) }],
  ['basic-constraints.path', 'a path length without CA', { basic: basic(seq(hex('020100'))) }],
  ['key-usage.present', 'none', { usage: null }],
  ['key-usage.critical', 'not critical', { usage: usage('03020780', false) }],
  ['key-usage.profile', 'keyAgreement besides', { usage: usage('03020388') }],
  [
    'key-usage.ca',
    'a profile that signs certificates without being a CA',
    { usage: usage('03020284') },
    { profile: { usages: ['digitalSignature', 'keyCertSign'] } },
  ],
  ['ext-key-usage.present', 'none', { purpose: null }],
  ['ext-key-usage.present', 'one where the profile has none', {}, { profile: { eku: null } }],
  ['ext-key-usage.critical', 'critical', { purpose: extension('2.5.29.37', seq(oid(clientAuth)), true) }],
  ['ext-key-usage.profile', 'serverAuth', { purpose: purpose('1.3.6.1.5.5.7.3.1') }],
  ['ext-key-usage.profile', 'serverAuth besides', { purpose: purpose(clientAuth, '1.3.6.1.5.5.7.3.1') }],
  ['ext-key-usage.any', 'a profile for anything', { purpose: purpose('2.5.29.37.0') }, { profile: { eku: '2.5.29.37.0' } }],
  ['ext-key-usage.profile', 'not the one that the profile has besides', {}, { profile: { purposes: ['1.3.6.1.5.5.7.3.14'] } }],
  ['ext-key-usage.bounds', 'serverAuth beside clientAuth', ...foreign('1.3.6.1.5.5.7.3.1')],
  ['ext-key-usage.bounds', 'OCSPSigning', ...foreign('1.3.6.1.5.5.7.3.9')],
  ['ext-key-usage.bounds', 'a role of the server', ...foreign('1.3.6.1.4.1.58888.1.2')],
  ['ext-key-usage.bounds', 'the identity of a device', ...foreign('1.3.6.1.4.1.58888.1.16')],
  ['ext-key-usage.bounds', 'codeSigning', ...foreign('1.3.6.1.5.5.7.3.3')],
  ['ext-key-usage.bounds', 'an agent of Microsoft’s that enrols others', ...foreign('1.3.6.1.4.1.311.20.2.1')],
  ['ext-key-usage.unique', 'clientAuth twice', { purpose: purpose(clientAuth, clientAuth) }],
  ['ext-key-usage.usage', 'a TLS profile that cannot sign', { usage: usage('03020308') }, { profile: { usages: ['keyAgreement'] } }],
  ['subject-key.present', 'none', { subjectKey: null }],
  ['subject-key.critical', 'critical', { subjectKey: subjectKey(identifier(key), true) }],
  ['subject-key.value', 'the hash of another key', { subjectKey: subjectKey(randomBytes(20)) }],
  ['authority-key.present', 'none', { authorityKey: null }],
  ['authority-key.critical', 'critical', { authorityKey: authorityKey(tlv(0x80, identifier(issuer.spki)), true) }],
  [
    'authority-key.form',
    'with the serial of the issuer',
    { authorityKey: extension('2.5.29.35', seq(tlv(0x80, identifier(issuer.spki)), tlv(0x82, hex('01')))) },
  ],
  ['authority-key.value', 'the hash of another key', { authorityKey: authorityKey(tlv(0x80, randomBytes(20))) }],
  ['alt-name.present', 'none', { names: null }],
  ['alt-name.present', 'some where the profile has none', {}, { profile: { names: null } }],
  ['alt-name.critical', 'critical beside a subject', { names: extension('2.5.29.17', seq(uri('spiffe://plant/device/gw-1')), true) }],
  ['alt-name.kind', 'a mail address besides', { names: names(uri('spiffe://plant/device/gw-1'), text(0x81, 'a@b.example')) }],
  ['alt-name.kind', 'a host name where the profile has none', { names: names(own, dns('gw-1.plant.example')) }],
  ['alt-name.order', 'not the host name that the profile has', {}, { profile: { patterns: [pattern] } }],
  ['alt-name.order', 'the host name of another', { names: names(own, dns('gw-2.plant.example')) }, { profile: { patterns: [pattern] } }],
  ['alt-name.uri', 'a space', { names: names(uri('spiffe://plant/device/gw-1'), uri('spiffe://plant/device/gw 1')) }],
  ['alt-name.dns', 'a wildcard', { names: names(text(0x82, '*.plant.example')) }, host('*.plant.example')],
  ['alt-name.dns', 'an underscore', { names: names(text(0x82, 'a_b.example')) }, host('a_b.example')],
  ['alt-name.ip', 'three bytes', { names: names(text(0x82, 'a.example'), ipName) }, host('a.example')],
  ['alt-name.unique', 'a name twice', { names: names(text(0x82, 'a.example'), text(0x82, 'a.example')) }, host('a.example')],
  ['status.present', 'none where the server offers it', {}, offered],
  ['status.present', 'a distribution point alone', { more: [points] }, offered],
  ['status.present', 'both where the profile has none', { more: [points, access] }, { status }],
  ['status.critical', 'a critical distribution point', { more: [extension('2.5.29.31', places.crl, true), access] }, offered],
  ['status.places', 'the list of another serial', { more: [extension('2.5.29.31', statusValues(status, `${serial}x`).crl), access] }, offered],
  [
    'status.places',
    'the responder of another',
    { more: [points, extension('1.3.6.1.5.5.7.1.1', statusValues({ ...status, ocsp: 'http://x' }, serial).access)] },
    offered,
  ],
  ['status.no-check', 'for a device', { more: [extension(noCheck, hex('0500'))] }],
  ['status.no-check', 'not for a responder', {}, { profile: { noCheck: true } }],
  ['status.no-check', 'with another value', { more: [extension(noCheck, seq())] }, { profile: { noCheck: true } }],
  ['alt-name.order', 'the name of another', { names: names(uri('spiffe://plant/device/gw-2')) }],
  ['alt-name.order', 'a name besides', { names: names(uri('spiffe://plant/device/gw-1'), uri('spiffe://plant/device/gw-2')) }],
]

/** A string in pieces is also none of its kind. */
const pieces = tbs({ subjectKey: extension('2.5.29.14', tlv(0x24, tlv(0x04, identifier(key)))) })

describe('every rule is broken by a certificate that breaks nothing else', () => {
  test('one that breaks none', () => {
    expect(lint(linted(tbs()))).toEqual([])
    expect(lint(linted(tbs({ more: [points, access] }), offered))).toEqual([])
    const country = setOf(attribute('2.5.4.6', text(0x13, 'DE')))
    const full: Partial<Profile> = { attributes: { O: 'Plant', C: 'DE' }, patterns: [pattern], purposes: ['1.3.6.1.5.5.7.3.14', '1.3.6.1.4.1.4711.1'] }
    const parts = { names: names(own, dns('gw-1.plant.example')), purpose: purpose(clientAuth, ...(full.purposes ?? [])) }
    expect(lint(linted(tbs({ ...named(country, organisation('Plant'), commonName(utf8('gw-1'))), ...parts }), { profile: full }))).toEqual([])
    expect(lint(linted(tbs({ more: [extension(noCheck, hex('0500'))] }), { profile: { noCheck: true } }))).toEqual([])
  })

  test.each(violations.map(([rule, name, parts, odd]) => [rule, name, parts, odd] as const))('%s: %s', (rule, _, parts, odd) =>
    expect(lint(linted(parts instanceof Uint8Array ? parts : tbs(parts), odd))).toEqual([rule]),
  )

  test('der.string: a string in pieces', () => expect(lint(linted(pieces))).toEqual(['der.string', 'extension.value', 'subject-key.value']))

  test('no rule is without such a certificate; there are at least 40', () => {
    const broken = new Set<LintRule>([...violations.map(([rule]) => rule), 'der.string'])
    const rules = Object.keys(lintRules) as LintRule[]
    process.stdout.write(`lint: ${rules.length} rules, ${violations.length + 1} certificates that break them\n`)
    expect(rules.filter((rule) => !broken.has(rule))).toEqual([])
    expect(rules.length).toBeGreaterThanOrEqual(40)
  })

  test('a broken rule refuses, with its name as reason', () =>
    expect(() => requireClean(linted(tbs({ version: hex('a003020101') })))).toThrow(
      expect.objectContaining({ code: 'internal', reason: 'lint.version.three' }),
    ))
})

describe('profiles', () => {
  test('what our own writer makes breaks no rule, at the bounds of the configuration too', () => {
    expect.assertions(2 * profileNames.length)
    for (const bound of [0, 1] as const)
      for (const [name, profile] of Object.entries(defaultProfiles))
        expect(() => checkProfiles({ ...defaultProfiles, [name]: { ...profile, life: profile.lifeBounds[bound], keys: profile.keyBounds } }, now)).not.toThrow()
  })

  test('whatever a configuration may say, three parsers read what comes of it the same', { timeout: 300_000 }, () => {
    const words = fc.string({ unit: fc.constantFrom(...Array.from("aZ09 &'(),./:@_-äßÉ日本עربиक़")), minLength: 1, maxLength: 12 })
    const part = fc.constantFrom('a', 'xn--mnchen-3ya', 'd-1', '9', '{tenant}', '{id}')
    const host = fc.array(part, { minLength: 1, maxLength: 4 }).map((labels) => `DNS:${labels.join('.')}.example`)
    const uri = fc.array(part, { minLength: 1, maxLength: 4 }).map((parts) => `URI:urn:ab:${parts.join(':')}`)
    const few = <T>(of: fc.Arbitrary<T>) => fc.option(fc.array(of, { minLength: 1, maxLength: 3 }), { nil: undefined })
    const maybe = <T>(of: fc.Arbitrary<T>) => fc.option(of, { nil: undefined })
    const settings = fc.record({
      subject: maybe(fc.record({ C: maybe(fc.constantFrom('DE', 'XK')), ST: maybe(words), L: maybe(words), O: maybe(words), OU: maybe(words) })),
      names: few(fc.oneof(host, uri)),
      usages: few(fc.constantFrom('keyAgreement', 'contentCommitment')),
      purposes: few(
        fc.oneof(
          fc.constantFrom('eapOverLAN', 'ipsecIKE', 'eapOverPPP'),
          fc.array(fc.nat(2 ** 31 - 1), { minLength: 2, maxLength: 5 }).map((arcs) => `1.3.6.1.4.1.${arcs.join('.')}`),
        ),
      ),
    })
    let accepted = 0
    fc.assert(
      fc.property(settings, fc.constantFrom('device-tls', 'device-identity', 'station', 'server-tls'), (said, name) => {
        // What is refused is refused; what one field is refused for does not hide the others.
        const kept = Object.fromEntries(Object.entries(said).filter(([field, value]) => ProfileSettings.safeParse({ [name]: { [field]: value } }).success))
        const parsed: Settings | undefined = ProfileSettings.safeParse({ [name]: kept }).data
        if (parsed === undefined) return
        if (Object.keys(kept).length > 1) accepted++
        const profiles = profilesOf(parsed)
        for (const subject of ['a', 'gw-1', 'z'.repeat(63), 'z'.repeat(64), 'xn--a', 'a-']) {
          if (profiles[name].names === 'hosts') continue
          const filling = { profile: profiles[name], order: { profile: name, subject, spki: new Uint8Array(key) }, issuer: { ...issuer, until: Infinity }, now }
          const of = { tenant: 'plant', serial, ...validityOf(profiles[name], now) }
          const made = fillTemplate({ ...filling, of })
          if (made !== undefined) expect(Buffer.from(made)).toEqual(Buffer.from(tbsOf(filling.profile, filling.order, filling.issuer, of)))
          expect(lint({ ...filling, of, algorithm: signatureAlgorithm, tbs: tbsOf(filling.profile, filling.order, filling.issuer, of) })).toEqual([])
        }
        checkProfiles({ ...defaultProfiles, [name]: profiles[name] }, now)
      }),
      { numRuns: process.env['FLEETKEY_LONG'] === '1' ? 300 : 30 },
    )
    expect(accepted).toBeGreaterThan(5)
  })

  test('a profile that contradicts itself is found at start', () => {
    const wrong = { ...defaultProfiles, 'device-tls': { ...defaultProfiles['device-tls'], usages: ['keyCertSign'] as const } }
    expect(() => checkProfiles(wrong, now)).toThrow('certificate profile device-tls breaks key-usage.ca, ext-key-usage.usage')
  })

  test('settings that add nothing change lifetime and keys and nothing else', () => {
    const set = profilesOf({ 'device-tls': { lifetime: 3_600_000, keys: ['p384'] } })
    expect(set).toEqual({ ...defaultProfiles, 'device-tls': { ...defaultProfiles['device-tls'], life: 3_600_000, keys: ['p384'] } })
    const profile = set['device-tls']
    expect(validityOf(profile, now).notAfter - now).toBe(3_600_000)
  })

  const full = profilesOf(
    ProfileSettings.parse({
      'device-tls': {
        subject: { C: 'DE', O: 'Müller & Söhne, GmbH' },
        names: ['DNS:{id}.plant.example', 'URI:urn:plant:{id}'],
        usages: ['keyAgreement'],
        purposes: ['eapOverLAN', '1.3.6.1.4.1.4711.1'],
      },
    }),
  )

  test.each([
    ['as it is', defaultProfiles],
    ['with everything added', full],
  ])('bytes of our own writer, mutated, are refused or the same: a profile %s', (_, { 'device-tls': profile }) => {
    const order: CertificateOrder = { profile: 'device-tls', subject: 'gw-1', spki: new Uint8Array(key) }
    const of = { tenant: 'plant', serial, ...validityOf(profile, now) }
    const good = tbsOf(profile, order, issuer, of)
    const given = { algorithm: signatureAlgorithm, profile, order, issuer, of, now }
    expect(lint({ ...given, tbs: good })).toEqual([])
    // Any single bit, but for those that make another date within the bounds.
    const unseen: number[] = []
    for (let bit = 0; bit < good.length * 8; bit++) {
      const copy = Uint8Array.from(good)
      copy[bit >> 3] = (copy[bit >> 3] ?? 0) ^ (1 << (bit & 7))
      if (lint({ ...given, tbs: copy }).length === 0) unseen.push(bit >> 3)
    }
    const dates = Buffer.from(good).indexOf(Buffer.from([0x30, 0x1e, 0x17, 0x0d]))
    expect([...new Set(unseen)].filter((at) => at < dates || at > dates + 32)).toEqual([])
  })
})
