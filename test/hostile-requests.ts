import { checkPrimeSync, constants, createHash, generateKeyPairSync, generatePrimeSync, randomBytes, sign, type KeyObject } from 'node:crypto'

/** DER by a builder of its own, so that the reader is not judged by its own writer; it also writes what DER forbids. */
export const tlv = (tag: number, ...contents: readonly Uint8Array[]): Buffer => {
  const content = Buffer.concat(contents)
  const { length } = content
  const size =
    length < 0x80
      ? [length]
      : length < 0x100
        ? [0x81, length]
        : length < 0x1_0000
          ? [0x82, length >> 8, length & 0xff]
          : [0x83, length >> 16, (length >> 8) & 0xff, length & 0xff]
  return Buffer.concat([Buffer.from([tag, ...size]), content])
}
export const seq = (...contents: readonly Uint8Array[]): Buffer => tlv(0x30, ...contents)
export const setOf = (...contents: readonly Uint8Array[]): Buffer => tlv(0x31, ...contents)
const hex = (text: string): Buffer => Buffer.from(text, 'hex')
export const bits = (content: Uint8Array, unused = 0): Buffer => tlv(0x03, Buffer.from([unused]), content)
export const text = (tag: number, value: string | Uint8Array): Buffer => tlv(tag, typeof value === 'string' ? Buffer.from(value, 'utf8') : value)
export const utf8 = (value: string | Uint8Array): Buffer => text(0x0c, value)
const oid = (dotted: string): Buffer => {
  const [first = 0, second = 0, ...rest] = dotted.split('.').map(Number)
  const arc = (value: number): number[] => (value < 128 ? [value] : [...arc(Math.floor(value / 128)).map((byte) => byte | 0x80), value % 128])
  return tlv(0x06, Buffer.from([first * 40 + second, ...rest.flatMap(arc)]))
}
export { oid }
export const integer = (value: bigint): Buffer => {
  const digits = value.toString(16)
  const bytes = hex(digits.padStart(digits.length + (digits.length % 2), '0'))
  return tlv(0x02, (bytes[0] ?? 0) >= 0x80 ? Buffer.concat([Buffer.from([0]), bytes]) : bytes)
}

const id = {
  commonName: '2.5.4.3',
  extensionRequest: '1.2.840.113549.1.9.14',
  challengePassword: '1.2.840.113549.1.9.7',
  ecdsaSha1: '1.2.840.10045.4.1',
  ecdsaSha256: '1.2.840.10045.4.3.2',
  ecdsaSha384: '1.2.840.10045.4.3.3',
  rsaSha256: '1.2.840.113549.1.1.11',
  dsaSha256: '2.16.840.1.101.3.4.3.2',
  ed25519: '1.3.101.112',
  basicConstraints: '2.5.29.19',
  keyUsage: '2.5.29.15',
  extKeyUsage: '2.5.29.37',
  subjectAltName: '2.5.29.17',
} as const

export const attribute = (type: string, value: Uint8Array): Buffer => seq(oid(type), value)
export const commonName = (value: Uint8Array): Buffer => setOf(attribute(id.commonName, value))
export const named = (value: string): Buffer => seq(commonName(utf8(value)))
export const extension = (type: string, value: Uint8Array, critical = false): Buffer => seq(oid(type), ...(critical ? [hex('0101ff')] : []), tlv(0x04, value))
const requested = (...extensions: readonly Uint8Array[]): Buffer => seq(oid(id.extensionRequest), setOf(seq(...extensions)))

const algorithm = (dotted: string, ...parameters: readonly Uint8Array[]): Buffer => seq(oid(dotted), ...parameters)
const null_ = hex('0500')

interface Request {
  readonly version?: Uint8Array
  readonly subject?: Uint8Array
  readonly spki: Uint8Array
  readonly attributes?: readonly Uint8Array[]
  /** AlgorithmIdentifier of the signature. */
  readonly algorithm?: Uint8Array
  readonly sign: (info: Uint8Array) => Uint8Array
}

export const request = ({
  version = hex('020100'),
  subject = named('gw-1'),
  spki,
  attributes = [],
  algorithm: of = algorithm(id.ecdsaSha256),
  sign: by,
}: Request): Buffer => {
  const info = seq(version, subject, spki, tlv(0xa0, ...attributes))
  return seq(info, of, bits(by(info)))
}

const spkiOf = (key: KeyObject): Buffer => key.export({ format: 'der', type: 'spki' })
const ec = (namedCurve: string, paramEncoding: 'named' | 'explicit' = 'named') => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve, paramEncoding })
  return { spki: spkiOf(publicKey), sign: (info: Uint8Array): Buffer => sign('sha256', info, privateKey), privateKey }
}

/** RSA by hand: any exponent, any primes. */
const power = (base: bigint, exponent: bigint, modulus: bigint): bigint => {
  let result = 1n
  for (let [square, left] = [base % modulus, exponent]; left > 0n; left >>= 1n, square = (square * square) % modulus)
    if (left & 1n) result = (result * square) % modulus
  return result
}
const inverse = (value: bigint, modulus: bigint): bigint => {
  let [a, b, x, y] = [value % modulus, modulus, 1n, 0n]
  while (a > 1n) [a, b, x, y] = [b, a % b, y, x - (a / b) * y]
  return ((x % modulus) + modulus) % modulus
}
const rsaSpki = (n: Uint8Array, e: bigint): Buffer => seq(algorithm('1.2.840.113549.1.1.1', null_), bits(seq(n, integer(e))))
const padded = (info: Uint8Array, length: number): bigint => {
  const digestInfo = Buffer.concat([hex('3031300d060960864801650304020105000420'), createHash('sha256').update(info).digest()])
  return BigInt(`0x${Buffer.concat([hex('0001'), Buffer.alloc(length - digestInfo.length - 3, 0xff), hex('00'), digestInfo]).toString('hex')}`)
}
const lengthOf = (n: bigint): number => Math.ceil(n.toString(2).length / 8)
const fixed = (value: bigint, length: number): Buffer => hex(value.toString(16).padStart(2 * length, '0'))

const rsaOf = (p: bigint, q: bigint, e = 65_537n) => {
  const n = p * q
  const d = inverse(e, (p - 1n) * (q - 1n))
  return {
    spki: rsaSpki(integer(n), e),
    algorithm: algorithm(id.rsaSha256, null_),
    sign: (info: Uint8Array): Buffer => fixed(power(padded(info, lengthOf(n)), d, n), lengthOf(n)),
  }
}
const rsa = (modulusLength: number, publicExponent = 65_537) => {
  const { privateKey, publicKey } = generateKeyPairSync('rsa', { modulusLength, publicExponent })
  return { spki: spkiOf(publicKey), algorithm: algorithm(id.rsaSha256, null_), sign: (info: Uint8Array): Buffer => sign('sha256', info, privateKey) }
}
const prime = (size: number): bigint => generatePrimeSync(size, { bigint: true })
const nextPrime = (from: bigint): bigint => {
  for (let candidate = from + 2n; ; candidate += 2n) if (checkPrimeSync(candidate)) return candidate
}
const bigOdd = (size: number): bigint => BigInt(`0x${randomBytes(size / 8).toString('hex')}`) | 1n | (1n << BigInt(size - 1))

/** A prime with the structure of CVE-2017-15361: k·M + (65537^a mod M). */
const rocaPrime = (): bigint => {
  const m = Array.from({ length: 168 }, (_, n) => n)
    .filter((n) => n > 1 && Array.from({ length: n }, (_, d) => d).every((d) => d < 2 || n % d !== 0))
    .reduce((product, n) => product * BigInt(n), 1n)
  for (;;) {
    const a = BigInt(`0x${randomBytes(8).toString('hex')}`)
    const k = BigInt(`0x${randomBytes(5).toString('hex')}`) | (1n << 36n)
    const candidate = k * m + power(65_537n, a, m)
    if (checkPrimeSync(candidate)) return candidate
  }
}

const own = ec('prime256v1')
const other = ec('prime256v1')
const point = own.spki.subarray(27)
const flipped = (bytes: Uint8Array, at: number): Buffer => {
  const copy = Buffer.from(bytes)
  copy[at] = (copy[at] ?? 0) ^ 1
  return copy
}
export const selfSigned = (more: Partial<Request>): Buffer => request({ spki: own.spki, sign: own.sign, ...more })
const asking = (...extensions: readonly Uint8Array[]): Buffer => selfSigned({ attributes: [requested(...extensions)] })
const altName = (tag: number, value: string | Uint8Array): Uint8Array => extension(id.subjectAltName, seq(text(tag, value)))
const compressed = Buffer.concat([Buffer.from([2 + ((point.at(-1) ?? 0) & 1)]), point.subarray(0, 32)])
const ecSpki = (publicPoint: Uint8Array, unused = 0): Buffer => seq(seq(oid('1.2.840.10045.2.1'), oid('1.2.840.10045.3.1.7')), bits(publicPoint, unused))
/** The signature's two integers, so that they can be written otherwise. */
const numbers = (signature: Uint8Array): readonly [Buffer, Buffer] => {
  const first = 4 + (signature[3] ?? 0)
  return [Buffer.from(signature.subarray(4, first)), Buffer.from(signature.subarray(first + 2))]
}
const nested = (depth: number): Buffer => {
  let inner = null_
  for (let level = 0; level < depth; level++) inner = seq(inner)
  return inner
}
/** The outermost length written in one byte more than it needs. */
const longLength = (bytes: Buffer): Buffer => Buffer.concat([hex('3083'), hex((bytes.length - 4).toString(16).padStart(6, '0')), bytes.subarray(4)])
const indefinite = (bytes: Buffer): Buffer => Buffer.concat([hex('3080'), bytes.subarray(4), hex('0000')])

const dsa = () => {
  const { privateKey, publicKey } = generateKeyPairSync('dsa', { modulusLength: 2048, divisorLength: 256 })
  return { spki: spkiOf(publicKey), algorithm: algorithm(id.dsaSha256), sign: (info: Uint8Array): Buffer => sign('sha256', info, privateKey) }
}
const evenModulus = rsaSpki(integer(bigOdd(2048) - 1n), 65_537n)
const lowOrder = (): Request => ({
  spki: seq(algorithm(id.ed25519), bits(Buffer.concat([hex('01'), Buffer.alloc(31)]))),
  algorithm: algorithm(id.ed25519),
  // R = A = the neutral element and s = 0 satisfy the equation for every message.
  sign: () => Buffer.concat([hex('01'), Buffer.alloc(63)]),
})
const e1 = (): Request => {
  const n = bigOdd(2048)
  return { spki: rsaSpki(integer(n), 1n), algorithm: algorithm(id.rsaSha256, null_), sign: (info) => fixed(padded(info, 256), 256) }
}
const closePrimes = (): Request => {
  const p = prime(1024)
  return rsaOf(p, nextPrime(p + (1n << 400n)))
}

export interface HostileRequest {
  readonly number: number
  readonly name: string
  readonly make: () => Buffer
  readonly reason: string
}

/** The 37 requests of the acceptance list that are made as files, in its order. */
export const generated: readonly HostileRequest[] = (
  [
    [
      'flipped-signature',
      'csr.signature',
      () => {
        const made = selfSigned({})
        return flipped(made, made.length - 1)
      },
    ],
    ['signed-by-another-key', 'csr.signature', () => selfSigned({ sign: other.sign })],
    ['off-curve', 'csr.ec.off-curve', () => selfSigned({ spki: flipped(own.spki, own.spki.length - 1) })],
    ['infinity', 'csr.ec.infinity', () => selfSigned({ spki: ecSpki(Buffer.from([0])) })],
    ['p-224', 'csr.key.curve', () => request(ec('secp224r1'))],
    ['secp256k1', 'csr.key.curve', () => request(ec('secp256k1'))],
    ['explicit-parameters', 'csr.ec.explicit', () => request(ec('prime256v1', 'explicit'))],
    ['rsa-1024', 'csr.rsa.short', () => request(rsa(1024))],
    ['rsa-512', 'csr.rsa.short', () => request(rsa(512))],
    ['rsa-e3', 'csr.rsa.exponent', () => request(rsa(2048, 3))],
    ['rsa-e1-forged', 'csr.rsa.exponent', () => request(e1())],
    ['rsa-even-modulus', 'csr.rsa.even', () => request({ spki: evenModulus, algorithm: algorithm(id.rsaSha256, null_), sign: () => randomBytes(256) })],
    [
      'rsa-16384',
      'csr.rsa.long',
      () => request({ spki: rsaSpki(integer(bigOdd(16_384)), 65_537n), algorithm: algorithm(id.rsaSha256, null_), sign: () => randomBytes(2048) }),
    ],
    ['sha-1', 'csr.signature.hash', () => selfSigned({ algorithm: algorithm(id.ecdsaSha1), sign: (info) => sign('sha1', info, own.privateKey) })],
    ['ca-true', 'csr.extension.ca', () => asking(extension(id.basicConstraints, seq(hex('0101ff')), true))],
    ['key-cert-sign', 'csr.usage.ca', () => asking(extension(id.keyUsage, hex('03020186'), true))],
    ['name-of-another-device', 'csr.name.other', () => asking(altName(0x86, 'spiffe://default/device/gw-2'))],
    ['nul-in-alt-name', 'csr.name.control', () => asking(altName(0x86, 'spiffe://default/device/gw-1\0.example'))],
    ['nul-in-common-name', 'csr.subject.control', () => selfSigned({ subject: named('gw-1\0.example') })],
    ['bad-utf-8', 'csr.subject.encoding', () => selfSigned({ subject: seq(commonName(utf8(hex('67772dc3283100')))) })],
    ['two-common-names', 'csr.subject.names', () => selfSigned({ subject: seq(commonName(utf8('gw-1')), commonName(utf8('gw-2'))) })],
    ['duplicate-extension', 'csr.extension.duplicate', () => asking(extension(id.keyUsage, hex('03020780')), extension(id.keyUsage, hex('03020780')))],
    [
      'two-extension-requests',
      'csr.attribute.duplicate',
      () => selfSigned({ attributes: [requested(extension(id.keyUsage, hex('03020780'))), requested(extension(id.keyUsage, hex('03020780')))] }),
    ],
    ['trailing-bytes', 'csr.der.trailing', () => Buffer.concat([selfSigned({}), hex('deadbeef')])],
    ['indefinite-length', 'csr.der.indefinite', () => indefinite(asking(extension(id.keyUsage, hex('03020780')), extension('1.2.3.4', randomBytes(100))))],
    ['long-length', 'csr.der.length', () => longLength(asking(extension(id.keyUsage, hex('03020780')), extension('1.2.3.4', randomBytes(100))))],
    ['version-1', 'csr.version', () => selfSigned({ version: hex('020101') })],
    ['rsa-oid-on-ec-key', 'csr.key.encoding', () => selfSigned({ spki: seq(algorithm('1.2.840.113549.1.1.1', null_), bits(own.spki.subarray(26))) })],
    ['empty-subject', 'csr.subject.empty', () => selfSigned({ subject: seq() })],
    ['one-mebibyte', 'csr.size', () => asking(extension('1.2.3.4', Buffer.alloc(1 << 20)))],
    ['nested-3000', 'csr.der.depth', () => selfSigned({ attributes: [seq(oid('1.2.3.4'), setOf(nested(3000)))] })],
    [
      'padded-signature',
      'csr.signature.encoding',
      () =>
        selfSigned({
          sign: (info) => {
            const [r, s] = numbers(own.sign(info))
            return seq(tlv(0x02, Buffer.from([0, 0]), r), tlv(0x02, s))
          },
        }),
    ],
    ['zero-signature', 'csr.signature.range', () => selfSigned({ sign: () => seq(hex('020100'), hex('020100')) })],
    ['ed25519-low-order', 'csr.key.algorithm', () => request(lowOrder())],
    ['compressed-point', 'csr.ec.compressed', () => selfSigned({ spki: ecSpki(compressed) })],
    ['dsa', 'csr.key.algorithm', () => request(dsa())],
    ['close-primes', 'csr.rsa.close-primes', () => request(closePrimes())],
  ] as const
).map(([name, reason, make], at) => ({ number: at + 1, name, reason, make }))

const asn1 = (name: string, reason: string, number: number, make: () => Buffer): HostileRequest => ({ number, name, reason, make })
const p384 = () => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'secp384r1' })
  return { spki: spkiOf(publicKey), algorithm: algorithm(id.ecdsaSha384), sign: (info: Uint8Array): Buffer => sign('sha384', info, privateKey) }
}
const pss = (): Request => {
  const { privateKey, publicKey } = generateKeyPairSync('rsa', { modulusLength: 3072 })
  const of = algorithm('1.2.840.113549.1.1.10')
  return {
    spki: seq(of, bits(publicKey.export({ format: 'der', type: 'pkcs1' }))),
    algorithm: of,
    sign: (info) => sign('sha256', info, { key: privateKey, padding: constants.RSA_PKCS1_PSS_PADDING, saltLength: 32 }),
  }
}
const x25519 = (): Request => ({ spki: spkiOf(generateKeyPairSync('x25519').publicKey), sign: own.sign })
const kem = (): Request => ({ spki: seq(algorithm('2.16.840.1.101.3.4.4.2'), bits(randomBytes(1184))), sign: own.sign })
const sharedPrime = (): Request => {
  const p = prime(1536)
  return rsaOf(p, prime(1536))
}

/** The rest of the list that a request alone can show, and more of its kind. */
export const further: readonly HostileRequest[] = [
  asn1('roca', 'csr.rsa.roca', 38, () => request(rsaOf(rocaPrime(), rocaPrime()))),
  asn1('shared-prime', 'csr.rsa.not-admitted', 39, () => request(sharedPrime())),
  asn1('debian-2008 size', 'csr.rsa.short', 40, () => request(rsa(2048))),
  asn1('close primes, another distance', 'csr.rsa.close-primes', 41, () => {
    const p = prime(1536)
    return request(rsaOf(p, nextPrime(p)))
  }),
  asn1('unused bits of the key', 'csr.key.bits', 45, () => selfSigned({ spki: ecSpki(own.spki.subarray(26), 1) })),
  asn1('zero modulus', 'csr.rsa.modulus', 46, () => selfSigned({ spki: rsaSpki(hex('020100'), 65_537n) })),
  asn1('negative modulus', 'csr.rsa.modulus', 46, () => selfSigned({ spki: rsaSpki(tlv(0x02, Buffer.from([0x80]), randomBytes(255)), 65_537n) })),
  asn1('challengePassword', 'csr.attribute.password', 47, () => selfSigned({ attributes: [seq(oid(id.challengePassword), setOf(utf8('once')))] })),
  asn1('unknown critical extension', 'csr.extension.critical', 48, () => asking(extension('1.2.3.4', null_, true))),
  asn1('wildcard', 'csr.name.kind', 49, () => asking(altName(0x82, '*.plant.example'))),
  asn1('address', 'csr.name.kind', 49, () => asking(altName(0x87, Buffer.from([10, 0, 0, 1])))),
  asn1('mail', 'csr.name.kind', 49, () => asking(altName(0x81, 'root@plant.example'))),
  asn1('Cyrillic look-alike', 'csr.subject.script', 50, () => selfSigned({ subject: named('gаteway-1') })),
  asn1('anyExtendedKeyUsage', 'csr.purpose', 51, () => asking(extension(id.extKeyUsage, seq(oid('2.5.29.37.0'))))),
  asn1('codeSigning', 'csr.purpose', 51, () => asking(extension(id.extKeyUsage, seq(oid('1.3.6.1.5.5.7.3.3'))))),
  asn1('serverAuth', 'csr.purpose', 51, () => asking(extension(id.extKeyUsage, seq(oid('1.3.6.1.5.5.7.3.1'))))),
  asn1('X25519', 'csr.key.agreement', 54, () => request(x25519())),
  asn1('ML-KEM-768', 'csr.key.agreement', 54, () => request(kem())),
  asn1('RSA-4104', 'csr.rsa.long', 55, () => selfSigned({ spki: rsaSpki(integer(bigOdd(4104)), 65_537n) })),
  asn1('flood of attributes', 'csr.attribute.count', 56, () =>
    selfSigned({ attributes: Array.from({ length: 200 }, (_, at) => seq(oid(`1.2.3.${at}`), setOf(null_))) }),
  ),
  asn1('BMPString', 'csr.subject.string', 57, () => selfSigned({ subject: seq(commonName(text(0x1e, hex('006700770031')))) })),
  asn1('TeletexString', 'csr.subject.string', 57, () => selfSigned({ subject: seq(commonName(text(0x14, 'gw-1'))) })),
  asn1('UniversalString', 'csr.subject.string', 57, () => selfSigned({ subject: seq(commonName(text(0x1c, hex('00000067')))) })),
  asn1('65 characters', 'csr.subject.length', 58, () => selfSigned({ subject: named('g'.repeat(65)) })),
  asn1('exponent above 2^32', 'csr.rsa.exponent', 59, () => selfSigned({ spki: rsaSpki(integer(bigOdd(3072)), (1n << 33n) + 1n) })),
  asn1('SHA-384 with P-256', 'csr.signature.algorithm', 60, () =>
    selfSigned({ algorithm: algorithm(id.ecdsaSha384), sign: (info) => sign('sha384', info, own.privateKey) }),
  ),
  asn1('RSA signature algorithm with an EC key', 'csr.signature.algorithm', 60, () => selfSigned({ algorithm: algorithm(id.rsaSha256, null_) })),
  asn1('RSASSA-PSS key', 'csr.key.algorithm', 0, () => request(pss())),
  asn1('RSA-3072 in order', 'csr.rsa.not-admitted', 0, () => request(rsa(3072))),
  asn1('small factor', 'csr.rsa.factor', 0, () => selfSigned({ spki: rsaSpki(integer(bigOdd(3064) * 3n * 5n), 65_537n) })),
  asn1('P-384 where P-256 belongs', 'csr.key.curve', 0, () => request(p384())),
  asn1('hybrid point', 'csr.ec.compressed', 0, () => selfSigned({ spki: ecSpki(Buffer.concat([Buffer.from([6 + ((point.at(-1) ?? 0) & 1)]), point])) })),
  asn1('no curve', 'csr.key.encoding', 0, () => selfSigned({ spki: seq(seq(oid('1.2.840.10045.2.1')), bits(own.spki.subarray(26))) })),
  asn1('short point', 'csr.key.encoding', 0, () => selfSigned({ spki: ecSpki(own.spki.subarray(26, 58)) })),
  asn1('r above the order', 'csr.signature.range', 0, () =>
    selfSigned({ sign: () => seq(tlv(0x02, Buffer.from([0]), Buffer.alloc(32, 0xff)), hex('020101')) }),
  ),
  asn1('negative s', 'csr.signature.encoding', 0, () => selfSigned({ sign: () => seq(hex('020101'), hex('0201ff')) })),
  asn1('parameters of ECDSA', 'csr.signature.parameters', 0, () => selfSigned({ algorithm: algorithm(id.ecdsaSha256, null_) })),
  asn1('another attribute', 'csr.attribute.unknown', 0, () => selfSigned({ attributes: [seq(oid('1.2.3.4'), setOf(null_))] })),
  asn1('attribute without value', 'csr.attribute.duplicate', 0, () => selfSigned({ attributes: [seq(oid(id.extensionRequest), setOf())] })),
  asn1('critical FALSE written out', 'csr.der.value', 0, () => asking(seq(oid('1.2.3.4'), hex('010100'), tlv(0x04, null_)))),
  asn1('constructed string', 'csr.der.value', 0, () => selfSigned({ attributes: [seq(oid('1.2.3.4'), setOf(tlv(0x24, tlv(0x04, null_))))] })),
  asn1('BOOLEAN of 01', 'csr.der.value', 0, () => asking(seq(oid('1.2.3.4'), hex('010101'), tlv(0x04, null_)))),
  asn1('keyAgreement', 'csr.usage', 0, () => asking(extension(id.keyUsage, hex('03020308')))),
  asn1('key usage of no form', 'csr.extension.value', 0, () => asking(extension(id.keyUsage, hex('0500')))),
  asn1('empty alternative names', 'csr.extension.value', 0, () => asking(extension(id.subjectAltName, seq()))),
  asn1('relative URI', 'csr.name', 0, () => asking(altName(0x86, 'gw-1'))),
  asn1('empty relative name', 'csr.subject', 0, () => selfSigned({ subject: seq(setOf()) })),
  asn1('ends early', 'csr.der', 0, () => selfSigned({}).subarray(0, 60)),
  asn1('empty', 'csr.der', 0, () => Buffer.alloc(0)),
  asn1('common name of another', 'csr.subject.other', 0, () => selfSigned({ subject: named('gw-2') })),
]

/** A request in order, as an honest device or another tool makes it. `names`: with what the certificate will carry anyway. */
export const honest = (wished = false): Buffer =>
  wished
    ? selfSigned({
        subject: seq(setOf(attribute('2.5.4.10', utf8('Plant'))), commonName(text(0x13, 'gw-1'))),
        attributes: [
          requested(
            extension(id.basicConstraints, seq(), true),
            extension(id.keyUsage, hex('03020780'), true),
            altName(0x86, 'spiffe://default/device/gw-1'),
            extension('2.5.29.14', tlv(0x04, randomBytes(20))),
          ),
        ],
      })
    : selfSigned({})

/** One that asks for these extensions. */
export const wishing = (...extensions: readonly Uint8Array[]): Buffer => selfSigned({ attributes: [requested(...extensions)] })
export const honestSpki: Uint8Array = Uint8Array.from(own.spki)
export const p384Request = (): Buffer => request(p384())
