import {
  checkPrimeSync,
  constants,
  createPrivateKey,
  createPublicKey,
  privateDecrypt,
  privateEncrypt,
  publicDecrypt,
  publicEncrypt,
  type KeyObject,
} from 'node:crypto'
import { concat, sameBytes, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { digest, hashName } from '@fleetkey/tpm2/kdf.ts'
import { big, bytesOf, inverse } from './ecc.ts'
import { rc, Refusal } from './refusal.ts'

/** RSA as a TPM keeps it: modulus and one prime; everything else follows. */
export interface RsaNumbers {
  readonly modulus: Uint8Array
  readonly exponent: number
}

const text = (value: bigint, length: number): string => Buffer.from(bytesOf(value, length)).toString('base64url')
const exponentBytes = (exponent: number): Uint8Array => {
  const bytes = u32(exponent)
  return bytes.subarray(bytes.findIndex((byte) => byte !== 0))
}

export const rsaExponent = (exponent: number): number => (exponent === 0 ? 65_537 : exponent)

/** Prime of half the key's size with its two highest bits set, from a stream of key material: the same stream, the same prime. */
const primeFrom = (bits: number, exponent: number, more: (length: number) => Uint8Array): bigint => {
  for (;;) {
    const candidate = more(bits / 8)
    candidate[0] = (candidate[0] ?? 0) | 0xc0
    candidate[candidate.length - 1] = (candidate.at(-1) ?? 0) | 1
    const value = big(candidate)
    if (value % BigInt(exponent) === 1n || [3n, 5n, 7n, 11n, 13n, 17n, 19n, 23n].some((small) => value % small === 0n)) continue
    if (checkPrimeSync(value)) return value
  }
}

/** A key pair from a stream of key material. */
export const makeRsa = (bits: number, exponent: number, more: (length: number) => Uint8Array): { modulus: Uint8Array; prime: Uint8Array } => {
  const p = primeFrom(bits / 2, exponent, more)
  for (;;) {
    const q = primeFrom(bits / 2, exponent, more)
    if (q !== p) return { modulus: bytesOf(p * q, bits / 8), prime: bytesOf(p, bits / 16) }
  }
}

/** Whether this prime divides the modulus and leaves another of its size. */
export const isRsaPrime = ({ modulus }: RsaNumbers, prime: Uint8Array): boolean => {
  const p = big(prime)
  return p > 1n && big(modulus) % p === 0n
}

/** The private key for node:crypto. */
export const rsaPrivateKey = ({ modulus, exponent }: RsaNumbers, prime: Uint8Array): KeyObject => {
  const [n, p, e] = [big(modulus), big(prime), BigInt(exponent)]
  const q = n / p
  const d = inverse(e, (p - 1n) * (q - 1n))
  const half = modulus.length / 2
  const jwk = {
    kty: 'RSA',
    n: text(n, modulus.length),
    e: Buffer.from(exponentBytes(exponent)).toString('base64url'),
    d: text(d, modulus.length),
    p: text(p, half),
    q: text(q, half),
    dp: text(d % (p - 1n), half),
    dq: text(d % (q - 1n), half),
    qi: text(inverse(q, p), half),
  }
  try {
    return createPrivateKey({ key: jwk, format: 'jwk' })
  } catch {
    throw new Refusal(rc.binding)
  }
}

export const rsaPublicKey = ({ modulus, exponent }: RsaNumbers): KeyObject => {
  const encoded = { kty: 'RSA', n: Buffer.from(modulus).toString('base64url'), e: Buffer.from(exponentBytes(exponent)).toString('base64url') }
  try {
    return createPublicKey({ key: encoded, format: 'jwk' })
  } catch {
    throw new Refusal(rc.key)
  }
}

/** DER of DigestInfo up to the digest (RFC 8017 §9.2 note 1). */
const digestInfo = new Map<number, Uint8Array>([
  [alg.sha1, new Uint8Array(Buffer.from('3021300906052b0e03021a05000414', 'hex'))],
  [alg.sha256, new Uint8Array(Buffer.from('3031300d060960864801650304020105000420', 'hex'))],
  [alg.sha384, new Uint8Array(Buffer.from('3041300d060960864801650304020205000430', 'hex'))],
  [alg.sha512, new Uint8Array(Buffer.from('3051300d060960864801650304020305000440', 'hex'))],
])

const mask = (hash: number, seed: Uint8Array, length: number): Uint8Array => {
  const parts: Uint8Array[] = []
  for (let at = 0; at * hashName(hash).size < length; at++) parts.push(digest(hash, seed, u32(at)))
  return concat(...parts).subarray(0, length)
}
const xored = (a: Uint8Array, b: Uint8Array): Uint8Array => a.map((byte, at) => byte ^ (b[at] ?? 0))

/** EMSA-PSS of a digest (RFC 8017 §9.1.1), salt as long as the digest. */
const pssEncode = (hash: number, hashed: Uint8Array, salt: Uint8Array, length: number): Uint8Array => {
  const h = digest(hash, new Uint8Array(8), hashed, salt)
  const db = concat(new Uint8Array(length - h.length - salt.length - 2), Uint8Array.of(1), salt)
  const masked = xored(db, mask(hash, h, db.length))
  masked[0] = (masked[0] ?? 0) & 0x7f
  return concat(masked, h, Uint8Array.of(0xbc))
}

export const signRsa = (
  key: KeyObject,
  of: { scheme: number; hash: number; digest: Uint8Array; length: number; random: (length: number) => Uint8Array },
): Uint8Array => {
  if (of.scheme === alg.rsassa)
    return new Uint8Array(privateEncrypt({ key, padding: constants.RSA_PKCS1_PADDING }, concat(digestInfo.get(of.hash) ?? new Uint8Array(0), of.digest)))
  const encoded = pssEncode(of.hash, of.digest, of.random(hashName(of.hash).size), of.length)
  return new Uint8Array(privateEncrypt({ key, padding: constants.RSA_NO_PADDING }, encoded))
}

export const verifyRsa = (key: KeyObject, of: { scheme: number; hash: number; digest: Uint8Array; signature: Uint8Array }): boolean => {
  try {
    if (of.scheme === alg.rsassa) {
      const opened = publicDecrypt({ key, padding: constants.RSA_PKCS1_PADDING }, of.signature)
      return sameBytes(new Uint8Array(opened), concat(digestInfo.get(of.hash) ?? new Uint8Array(0), of.digest))
    }
    const encoded = new Uint8Array(publicDecrypt({ key, padding: constants.RSA_NO_PADDING }, of.signature))
    const size = hashName(of.hash).size
    const h = encoded.subarray(encoded.length - size - 1, -1)
    const db = xored(encoded.subarray(0, encoded.length - size - 1), mask(of.hash, h, encoded.length - size - 1))
    db[0] = (db[0] ?? 0) & 0x7f
    return sameBytes(encoded, pssEncode(of.hash, of.digest, db.subarray(db.length - size), encoded.length))
  } catch {
    return false
  }
}

const oaep = (key: KeyObject, hash: number, label: string): { key: KeyObject; padding: number; oaepHash: string; oaepLabel: Buffer } => ({
  key,
  padding: constants.RSA_PKCS1_OAEP_PADDING,
  oaepHash: hashName(hash).name,
  // The label is a string with its terminator (Part 1 Annex B.4).
  oaepLabel: Buffer.from(`${label}\0`),
})

/** Seed of a secret that another encrypted to this key. Refuses with VALUE. */
export const openOaep = (key: KeyObject, hash: number, label: string, secret: Uint8Array): Uint8Array => {
  try {
    return new Uint8Array(privateDecrypt(oaep(key, hash, label), secret))
  } catch {
    throw new Refusal(rc.value)
  }
}

export const sealOaep = (key: KeyObject, hash: number, label: string, seed: Uint8Array): Uint8Array =>
  new Uint8Array(publicEncrypt(oaep(key, hash, label), seed))
