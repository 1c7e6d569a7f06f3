import { timingSafeEqual } from 'node:crypto'
import { concat, empty, u8 } from './bytes.ts'
import { alg, session as flag } from './constants.ts'
import { cfbDecrypt, cfbEncrypt, digest, hmac, kdfA } from './kdf.ts'

/** A session as the one who uses it keeps it (Part 1 §19). SHA-256, parameter encryption by AES-128-CFB. */
export interface Session {
  readonly handle: number
  /** Empty for an unsalted policy session. */
  readonly key: Uint8Array
  nonceTpm: Uint8Array
  nonceCaller: Uint8Array
}

const keyBits = 128

/** Session key of a salted, unbound session (Part 1 §19.6.8). */
export const sessionKey = (salt: Uint8Array, nonceTpm: Uint8Array, nonceCaller: Uint8Array): Uint8Array =>
  salt.length === 0 ? empty : kdfA(alg.sha256, salt, 'ATH', nonceTpm, nonceCaller, 256)

/** Both ends' parameter encryption (Part 1 §21.3): `newer` and `older` nonce as of the direction. `auth`: value of the entity that the session authorises. */
export const encryptParameter = (key: Uint8Array, auth: Uint8Array, newer: Uint8Array, older: Uint8Array, data: Uint8Array): Uint8Array => {
  const material = kdfA(alg.sha256, concat(key, auth), 'CFB', newer, older, keyBits + 128)
  return cfbEncrypt(material.subarray(0, keyBits / 8), data, material.subarray(keyBits / 8))
}

export const decryptParameter = (key: Uint8Array, auth: Uint8Array, newer: Uint8Array, older: Uint8Array, data: Uint8Array): Uint8Array => {
  const material = kdfA(alg.sha256, concat(key, auth), 'CFB', newer, older, keyBits + 128)
  return cfbDecrypt(material.subarray(0, keyBits / 8), data, material.subarray(keyBits / 8))
}

/** HMAC of a command or response (Part 1 §19.6.5). With neither key nor authorisation value it may be left out (`omitted`), at both ends or at none. */
export const authorisation = (of: {
  omitted: boolean
  key: Uint8Array
  auth: Uint8Array
  /** cpHash or rpHash. */
  hash: Uint8Array
  newer: Uint8Array
  older: Uint8Array
  /** nonceTPM of other sessions that encrypt, in the first session's HMAC only. */
  others?: readonly Uint8Array[]
  attributes: number
}): Uint8Array =>
  of.omitted && of.key.length + of.auth.length === 0
    ? empty
    : hmac(alg.sha256, concat(of.key, of.auth), of.hash, of.newer, of.older, ...(of.others ?? []), u8(of.attributes))

/** Whether two HMACs are the same, in constant time. */
export const sameMac = (a: Uint8Array, b: Uint8Array): boolean => a.length === b.length && timingSafeEqual(a, b)

export const hashOf = (...parts: readonly Uint8Array[]): Uint8Array => digest(alg.sha256, ...parts)
export const isEncrypting = (attributes: number): boolean => (attributes & flag.encrypt) !== 0
export const isDecrypting = (attributes: number): boolean => (attributes & flag.decrypt) !== 0
