import { createCipheriv, createDecipheriv, createHmac } from 'node:crypto'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'

/** Where a ciphertext stands; authenticated, so that a cell moved to another row does not open. */
export interface Place {
  readonly tenant: string
  readonly table: string
  readonly row: string
  readonly column: string
}

const nonceLength = 12
const tagLength = 16

const associated = (of: Place): Uint8Array => encode(['fleetkey/1/at-rest', of.tenant, of.table, of.row, of.column])

/** AES-256-GCM under a data key: nonce (12 bytes, random) ‖ ciphertext ‖ tag (16). One data key serves at most 2³² cells (SP 800-38D §8.3). */
export const sealCell = (key: Secret, place: Place, plaintext: Secret, nonce: Uint8Array): Uint8Array => {
  const cipher = createCipheriv('aes-256-gcm', key.bytes(), nonce, { authTagLength: tagLength })
  cipher.setAAD(associated(place))
  return Buffer.concat([nonce, cipher.update(plaintext.bytes()), cipher.final(), cipher.getAuthTag()])
}

/** Opens a cell in its own place. Throws Problem('internal') when it is damaged or was moved. */
export const openCell = (key: Secret, place: Place, cell: Uint8Array): Secret => {
  const refused = (cause?: unknown): Problem =>
    new Problem('internal', `the cell ${place.table}/${place.row}/${place.column} does not open`, { reason: 'at-rest.open', cause })
  // Of a shorter one OpenSSL would take what there is for a nonce and a tag, and a short tag is soon guessed.
  if (cell.length < nonceLength + tagLength) throw refused()
  const decipher = createDecipheriv('aes-256-gcm', key.bytes(), cell.subarray(0, nonceLength), { authTagLength: tagLength })
  decipher.setAAD(associated(place))
  decipher.setAuthTag(cell.subarray(-tagLength))
  try {
    const plaintext = Buffer.concat([decipher.update(cell.subarray(nonceLength, -tagLength)), decipher.final()])
    const secret = new Secret(plaintext)
    plaintext.fill(0)
    return secret
  } catch (cause) {
    throw refused(cause)
  }
}

/** Key check value: 8 bytes, hex, of an HMAC under the key itself. Tells that two openings agree; says nothing else about a 256-bit key. */
export const checkValueOf = (material: Secret): string => createHmac('sha256', material.bytes()).update('fleetkey/1/check').digest('hex').slice(0, 16)
