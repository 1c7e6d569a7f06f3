import { createCipheriv, createDecipheriv, createHmac, hash as oneShot } from 'node:crypto'
import { ascii, concat, TpmFormatError, u32, u8 } from './bytes.ts'
import { alg } from './constants.ts'

/** Name of a TPM hash for node:crypto, and its size in bytes. */
export const hashName = (hash: number): { readonly name: string; readonly size: number } => {
  switch (hash) {
    case alg.sha1:
      return { name: 'sha1', size: 20 }
    case alg.sha256:
      return { name: 'sha256', size: 32 }
    case alg.sha384:
      return { name: 'sha384', size: 48 }
    case alg.sha512:
      return { name: 'sha512', size: 64 }
    default:
      throw new TpmFormatError(`hash algorithm ${hash.toString(16)}`)
  }
}

/** Of what is public: it passes through a string, since a Buffer of its own costs more than the hash. */
export const digest = (hash: number, ...data: readonly Uint8Array[]): Uint8Array => {
  const [only] = data
  const bytes = only !== undefined && data.length === 1 ? only : Buffer.concat(data)
  return new Uint8Array(Buffer.from(oneShot(hashName(hash).name, bytes, 'binary'), 'latin1'))
}

/** Of what nobody may find in memory later. */
const digestOfSecret = (hash: number, ...data: readonly Uint8Array[]): Uint8Array => new Uint8Array(oneShot(hashName(hash).name, concat(...data), 'buffer'))

export const hmac = (hash: number, key: Uint8Array, ...data: readonly Uint8Array[]): Uint8Array => {
  const state = createHmac(hashName(hash).name, key)
  for (const part of data) state.update(part)
  return new Uint8Array(state.digest())
}

/** KDFa (Part 1 §11.4.10.2; SP 800-108 in counter mode): `bits` bits. */
export const kdfA = (hash: number, key: Uint8Array, label: string, contextU: Uint8Array, contextV: Uint8Array, bits: number): Uint8Array => {
  const blocks: Uint8Array[] = []
  for (let done = 0, counter = 1; done < bits / 8; done += hashName(hash).size, counter++)
    blocks.push(hmac(hash, key, u32(counter), ascii(label), u8(0), contextU, contextV, u32(bits)))
  return concat(...blocks).slice(0, bits / 8)
}

/** KDFe (Part 1 §11.4.10.3; SP 800-56A): `z`, `partyU` and `partyV` are x coordinates. */
export const kdfE = (hash: number, z: Uint8Array, label: string, partyU: Uint8Array, partyV: Uint8Array, bits: number): Uint8Array => {
  const blocks: Uint8Array[] = []
  for (let done = 0, counter = 1; done < bits / 8; done += hashName(hash).size, counter++)
    blocks.push(digestOfSecret(hash, u32(counter), z, ascii(label), u8(0), partyU, partyV))
  return concat(...blocks).slice(0, bits / 8)
}

const cfbName = (key: Uint8Array): string => `aes-${key.length * 8}-cfb`

/** AES-CFB as the TPM uses it (Part 1 §11.4.9); the initialisation vector is zero unless given. */
export const cfbEncrypt = (key: Uint8Array, data: Uint8Array, iv: Uint8Array = new Uint8Array(16)): Uint8Array => {
  const cipher = createCipheriv(cfbName(key), key, iv)
  return concat(cipher.update(data), cipher.final())
}

export const cfbDecrypt = (key: Uint8Array, data: Uint8Array, iv: Uint8Array = new Uint8Array(16)): Uint8Array => {
  const decipher = createDecipheriv(cfbName(key), key, iv)
  return concat(decipher.update(data), decipher.final())
}
