import { createCipheriv, createDecipheriv, type KeyObject } from 'node:crypto'

const format = 1
const overhead = 1 + 12 + 16

/**
 * AES-256-GCM (SP 800-38D): 1 byte format ‖ 12 bytes nonce ‖ ciphertext ‖ 16 bytes tag. `context` is authenticated, not stored:
 * a cell opens only in the place it was made for. With random nonces a key may seal 2^32 cells (SP 800-38D §8.3).
 */
export const seal = (key: KeyObject, plaintext: Uint8Array, context: Uint8Array, nonce: Uint8Array): Uint8Array => {
  const cipher = createCipheriv('aes-256-gcm', key, nonce, { authTagLength: 16 }).setAAD(context)
  const body = cipher.update(plaintext)
  cipher.final()
  return new Uint8Array(Buffer.concat([Uint8Array.of(format), nonce, body, cipher.getAuthTag()]))
}

/** The plaintext; undefined when the cell was changed, or made with another key or for another context. */
export const open = (key: KeyObject, cell: Uint8Array, context: Uint8Array): Uint8Array | undefined => {
  if (cell.length < overhead || cell[0] !== format) return undefined
  const decipher = createDecipheriv('aes-256-gcm', key, cell.subarray(1, 13), { authTagLength: 16 })
  decipher.setAAD(context).setAuthTag(cell.subarray(cell.length - 16))
  const plaintext = decipher.update(cell.subarray(13, cell.length - 16))
  try {
    decipher.final()
    return plaintext
  } catch {
    plaintext.fill(0)
    return undefined
  }
}
