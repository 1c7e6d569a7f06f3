import { createPublicKey, type KeyObject } from 'node:crypto'
import { concat, parseAll, sized, TpmFormatError, u16, u32, u8, type Reader } from './bytes.ts'
import { alg, curve } from './constants.ts'

/** TPMT_SYM_DEF_OBJECT: AES in CFB mode; null for TPM_ALG_NULL. */
export interface Symmetric {
  readonly algorithm: number
  readonly keyBits: number
  readonly mode: number
}

/** A signing or keyed-hash scheme with its hash; null for TPM_ALG_NULL. */
export interface Scheme {
  readonly scheme: number
  readonly hash: number
}

interface PublicCommon {
  readonly nameAlg: number
  readonly attributes: number
  readonly authPolicy: Uint8Array
}

export interface RsaPublic extends PublicCommon {
  readonly type: typeof alg.rsa
  readonly symmetric: Symmetric | null
  readonly scheme: Scheme | null
  readonly keyBits: number
  /** 0 stands for 65537. */
  readonly exponent: number
  readonly modulus: Uint8Array
}

export interface EccPublic extends PublicCommon {
  readonly type: typeof alg.ecc
  readonly symmetric: Symmetric | null
  readonly scheme: Scheme | null
  readonly curve: number
  readonly x: Uint8Array
  readonly y: Uint8Array
}

export interface KeyedHashPublic extends PublicCommon {
  readonly type: typeof alg.keyedhash
  readonly scheme: Scheme | null
  readonly unique: Uint8Array
}

/** TPMT_PUBLIC (Part 2 §12.2.4) of the object types that Fleetkey knows. */
export type Public = RsaPublic | EccPublic | KeyedHashPublic

const hashes: ReadonlySet<number> = new Set([alg.sha1, alg.sha256, alg.sha384, alg.sha512])

export const readHash = (reader: Reader): number => {
  const hash = reader.u16()
  if (!hashes.has(hash)) throw new TpmFormatError(`hash algorithm ${hash.toString(16)}`)
  return hash
}

const readSymmetric = (reader: Reader): Symmetric | null => {
  const algorithm = reader.u16()
  if (algorithm === alg.null) return null
  if (algorithm !== alg.aes) throw new TpmFormatError(`symmetric algorithm ${algorithm.toString(16)}`)
  return { algorithm, keyBits: reader.u16(), mode: reader.u16() }
}

const signing: ReadonlySet<number> = new Set([alg.rsassa, alg.rsapss, alg.ecdsa, alg.ecdh, alg.oaep, alg.hmac])

const readScheme = (reader: Reader): Scheme | null => {
  const scheme = reader.u16()
  if (scheme === alg.null) return null
  if (!signing.has(scheme)) throw new TpmFormatError(`scheme ${scheme.toString(16)}`)
  return { scheme, hash: readHash(reader) }
}

/** Reads one TPMT_PUBLIC. */
export const readPublic = (reader: Reader): Public => {
  const type = reader.u16()
  const common = { nameAlg: readHash(reader), attributes: reader.u32(), authPolicy: reader.sized(64) }
  switch (type) {
    case alg.rsa:
      return {
        type: alg.rsa,
        ...common,
        symmetric: readSymmetric(reader),
        scheme: readScheme(reader),
        keyBits: reader.u16(),
        exponent: reader.u32(),
        modulus: reader.sized(512),
      }
    case alg.ecc: {
      const parameters = { symmetric: readSymmetric(reader), scheme: readScheme(reader), curve: reader.u16() }
      if (reader.u16() !== alg.null) throw new TpmFormatError('a key derivation scheme')
      return { type: alg.ecc, ...common, ...parameters, x: reader.sized(66), y: reader.sized(66) }
    }
    case alg.keyedhash:
      return { type: alg.keyedhash, ...common, scheme: readScheme(reader), unique: reader.sized(64) }
    default:
      throw new TpmFormatError(`object type ${type.toString(16)}`)
  }
}

/** Parses a TPMT_PUBLIC; throws TpmFormatError, also for trailing bytes. */
export const parsePublic = (bytes: Uint8Array): Public => parseAll(bytes, readPublic)

export const marshalSymmetric = (symmetric: Symmetric | null): Uint8Array =>
  symmetric === null ? u16(alg.null) : concat(u16(symmetric.algorithm), u16(symmetric.keyBits), u16(symmetric.mode))
export const marshalScheme = (scheme: Scheme | null): Uint8Array => (scheme === null ? u16(alg.null) : concat(u16(scheme.scheme), u16(scheme.hash)))

/** TPMT_PUBLIC bytes. */
export const marshalPublic = (of: Public): Uint8Array => {
  const head = concat(u16(of.type), u16(of.nameAlg), u32(of.attributes), sized(of.authPolicy))
  switch (of.type) {
    case alg.rsa:
      return concat(head, marshalSymmetric(of.symmetric), marshalScheme(of.scheme), u16(of.keyBits), u32(of.exponent), sized(of.modulus))
    case alg.ecc:
      return concat(head, marshalSymmetric(of.symmetric), marshalScheme(of.scheme), u16(of.curve), u16(alg.null), sized(of.x), sized(of.y))
    case alg.keyedhash:
      return concat(head, marshalScheme(of.scheme), sized(of.unique))
  }
}

/** TPMS_ECC_POINT bytes of coordinates. */
export const marshalPoint = (x: Uint8Array, y: Uint8Array): Uint8Array => concat(sized(x), sized(y))

const left = (bytes: Uint8Array, length: number): Uint8Array => {
  if (bytes.length > length) throw new TpmFormatError('a coordinate longer than its field')
  return bytes.length === length ? bytes : concat(new Uint8Array(length - bytes.length), bytes)
}

/** Public point of a P-256 TPMT_PUBLIC: 65 bytes, uncompressed. Whether it lies on the curve shows when it is used. */
export const pointOf = (publicBytes: Uint8Array): Uint8Array => {
  const key = parsePublic(publicBytes)
  if (key.type !== alg.ecc || key.curve !== curve.p256) throw new TpmFormatError('not a P-256 key')
  return concat(u8(4), left(key.x, 32), left(key.y, 32))
}

/** SubjectPublicKeyInfo of an uncompressed point, up to its coordinates (RFC 5480 §2.1.1.1, §2.2). */
const spkiPrefix: ReadonlyMap<number, { readonly size: number; readonly prefix: Uint8Array }> = new Map([
  [curve.p256, { size: 32, prefix: new Uint8Array(Buffer.from('3059301306072a8648ce3d020106082a8648ce3d03010703420004', 'hex')) }],
  [curve.p384, { size: 48, prefix: new Uint8Array(Buffer.from('3076301006072a8648ce3d020106052b8104002203620004', 'hex')) }],
])

/** DER SubjectPublicKeyInfo of an ECC key; whether the point lies on its curve is not looked at. */
export const spkiOfPoint = (key: EccPublic): Uint8Array => {
  const known = spkiPrefix.get(key.curve)
  if (known === undefined) throw new TpmFormatError('not a key of a known curve')
  return concat(known.prefix, left(key.x, known.size), left(key.y, known.size))
}

/** The public key of a TPMT_PUBLIC for node:crypto. Throws TpmFormatError for a point that is not on its curve. */
export const keyObjectOf = (key: Public): KeyObject => {
  const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64url')
  try {
    if (key.type === alg.rsa) {
      const exponent = key.exponent === 0 ? 65_537 : key.exponent
      return createPublicKey({ key: { kty: 'RSA', n: text(key.modulus), e: text(u32(exponent).subarray(exponent < 0x100_0000 ? 1 : 0)) }, format: 'jwk' })
    }
    // Reading the point is what checks that it lies on the curve.
    if (key.type === alg.ecc) return createPublicKey({ key: Buffer.from(spkiOfPoint(key)), format: 'der', type: 'spki' })
  } catch (cause) {
    if (cause instanceof TpmFormatError) throw cause
    throw new TpmFormatError('not a valid public key')
  }
  throw new TpmFormatError('not an asymmetric key of a known curve')
}

/** DER SubjectPublicKeyInfo of a key that was imported already. */
export const spkiOfKey = (key: Public, object: KeyObject): Uint8Array =>
  key.type === alg.ecc ? spkiOfPoint(key) : new Uint8Array(object.export({ format: 'der', type: 'spki' }))

/** DER SubjectPublicKeyInfo of a TPMT_PUBLIC (RSA, P-256, P-384). */
export const spkiOf = (publicBytes: Uint8Array): Uint8Array => {
  const key = parsePublic(publicBytes)
  return spkiOfKey(key, keyObjectOf(key))
}

/** One bank of a TPML_PCR_SELECTION. */
export interface PcrBank {
  readonly hash: number
  readonly pcrs: readonly number[]
}

/** TPML_PCR_SELECTION with three bytes per bank, as every PC client TPM has. */
export const marshalPcrSelection = (banks: readonly PcrBank[]): Uint8Array =>
  concat(
    u32(banks.length),
    ...banks.map(({ hash, pcrs }) => {
      const bits = new Uint8Array(3)
      for (const pcr of pcrs) bits[pcr >> 3] = (bits[pcr >> 3] ?? 0) | (1 << (pcr & 7))
      return concat(u16(hash), u8(3), bits)
    }),
  )

export const readPcrSelection = (reader: Reader): readonly PcrBank[] => {
  const count = reader.u32()
  if (count > 16) throw new TpmFormatError(`${count} PCR banks`, 'quote.selection.size')
  return Array.from({ length: count }, () => {
    const hash = readHash(reader)
    if (reader.u8() !== 3) throw new TpmFormatError('a PCR selection that is not of three bytes', 'quote.selection.size')
    const bits = reader.bytes(3)
    return { hash, pcrs: Array.from({ length: 24 }, (_, pcr) => pcr).filter((pcr) => ((bits[pcr >> 3] ?? 0) >> (pcr & 7)) & 1) }
  })
}
