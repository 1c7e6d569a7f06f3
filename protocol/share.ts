import { createHash, type ECDH } from 'node:crypto'
import { open, seal } from './hpke.ts'
import { Problem } from './problem.ts'
import { Secret } from './secret.ts'

/** One share of what opens the keys of a server, as a person keeps it. */
export interface Share {
  /** Set it was made with, 16 hex digits. */
  readonly set: string
  /** Number within its set, from 1. */
  readonly index: number
  readonly value: Secret
}

/** Bytes of a share's value: 32 of Shamir's polynomials and the place at which they were evaluated. */
export const shareLength = 33
/** Shares of a set. */
export const maxShares = 64

const magic = 'fleetkey-share-1'
const pattern = /^fleetkey-share-1\.([0-9a-f]{16})\.([1-9][0-9]?)\.([0-9a-f]{66})\.([0-9a-f]{8})$/
const checksum = (text: string): string => createHash('sha256').update(text).digest('hex').slice(0, 8)
const malformed = (detail: string, reason: string): Problem => new Problem('malformed', detail, { reason })

/** `fleetkey-share-1.SET.INDEX.VALUE.CHECKSUM`, hexadecimal; the checksum (SHA-256, 4 bytes) covers everything before it. */
export const shareText = ({ set, index, value }: Share): string => {
  const text = `${magic}.${set}.${index}.${Buffer.from(value.bytes()).toString('hex')}`
  return `${text}.${checksum(text)}`
}

/** Reads a share; spaces, lines and capitals do not count. Throws Problem('malformed'): `seal.share.format`, `seal.share.checksum`. */
export const parseShare = (given: string): Share => {
  const text = given.replaceAll(/\s/g, '').toLowerCase()
  const [, set = '', index = '', value = '', sum = ''] = pattern.exec(text) ?? []
  if (set === '' || Number(index) > maxShares) throw malformed('this is no share: it reads fleetkey-share-1.SET.INDEX.VALUE.CHECKSUM', 'seal.share.format')
  if (checksum(text.slice(0, -9)) !== sum)
    throw malformed(`share ${index} of set ${set} does not fit its checksum: it was mistyped or damaged`, 'seal.share.checksum')
  const bytes = Buffer.from(value, 'hex')
  try {
    return { set, index: Number(index), value: new Secret(bytes) }
  } finally {
    bytes.fill(0)
  }
}

/** Which way a share goes: to the process that holds the keys, or from it to the operator who has split them. */
export type ShareWay = 'in' | 'out'

const point = 65
/** A sealed share at most: the point, the text, the tag. */
export const sealedShareMax = 320
const info = (way: ShareWay): Uint8Array => new TextEncoder().encode(`fleetkey/1/share/${way}`)
const none = new Uint8Array(0)

/** A share for one reader only (HPKE, AES-256-GCM): whoever carries it does not read it. `recipient`: 65 bytes of P-256. Throws Problem('malformed') when it is no such point. */
export const sealShare = (recipient: Uint8Array, way: ShareWay, share: Share): Uint8Array => {
  const text = Buffer.from(shareText(share))
  try {
    const { enc, ciphertext } = seal('aes-256-gcm', recipient, info(way), none, text)
    return new Uint8Array(Buffer.concat([enc, ciphertext]))
  } catch (cause) {
    throw new Problem('malformed', 'this is no key to seal a share to', { reason: 'seal.recipient', cause })
  } finally {
    text.fill(0)
  }
}

/** Opens what `sealShare` made for this key. Throws Problem('malformed'): reason `seal.recipient` when it was sealed for another, else as `parseShare`. */
export const openSealedShare = (key: ECDH, way: ShareWay, sealed: Uint8Array): Share => {
  const [enc, ciphertext] = [sealed.subarray(0, point), sealed.subarray(point)]
  let text: Uint8Array | undefined
  try {
    const dh = key.computeSecret(enc)
    text = open('aes-256-gcm', dh, key.getPublicKey(), info(way), none, { enc, ciphertext })
    dh.fill(0)
  } catch {
    text = undefined
  }
  if (text === undefined) throw malformed('this share was sealed for another process: ask for its key again', 'seal.recipient')
  try {
    return parseShare(Buffer.from(text).toString('latin1'))
  } finally {
    text.fill(0)
  }
}
