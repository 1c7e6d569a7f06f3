import { createCipheriv, createDecipheriv, createECDH, createHmac } from 'node:crypto'

/**
 * HPKE base mode (RFC 9180 §5.1.1, §6.1) with DHKEM(P-256, HKDF-SHA256) and HKDF-SHA256. Synchronous on node:crypto. The AEAD is a parameter because
 * the RFC's vectors for this KEM come with AES-128-GCM and ChaCha20-Poly1305; Fleetkey uses suite HPKE-7 only (AES-256-GCM, wrap.ts).
 */
export const aeads = {
  'aes-128-gcm': { id: 1, key: 16 },
  'aes-256-gcm': { id: 2, key: 32 },
  'chacha20-poly1305': { id: 3, key: 32 },
} as const
export type Aead = keyof typeof aeads

const kem = 0x0010
const kdf = 0x0001
const text = new TextEncoder()
const none = new Uint8Array(0)

const i2osp = (value: number): Uint8Array => Uint8Array.of(value >> 8, value & 0xff)
const hmac = (key: Uint8Array, ...data: readonly Uint8Array[]): Uint8Array => {
  const mac = createHmac('sha256', key)
  for (const part of data) mac.update(part)
  return mac.digest()
}

/** LabeledExtract (RFC 9180 §4). */
const extract = (suite: Uint8Array, salt: Uint8Array, label: string, ikm: Uint8Array): Uint8Array =>
  hmac(salt.length === 0 ? new Uint8Array(32) : salt, text.encode('HPKE-v1'), suite, text.encode(label), ikm)

/** LabeledExpand (RFC 9180 §4), at most one block. */
const expand = (suite: Uint8Array, prk: Uint8Array, label: string, info: Uint8Array, length: number): Uint8Array =>
  hmac(prk, i2osp(length), text.encode('HPKE-v1'), suite, text.encode(label), info, Uint8Array.of(1)).subarray(0, length)

const kemSuite = Buffer.concat([text.encode('KEM'), i2osp(kem)])

/** Shared secret of Encap and Decap (RFC 9180 §4.1) from the Diffie-Hellman result `dh` (x coordinate, 32 bytes). */
const sharedSecret = (dh: Uint8Array, enc: Uint8Array, recipient: Uint8Array): Uint8Array =>
  expand(kemSuite, extract(kemSuite, none, 'eae_prk', dh), 'shared_secret', Buffer.concat([enc, recipient]), 32)

/** Key schedule of base mode (RFC 9180 §5.1): key and nonce of the first and only message. */
const schedule = (aead: Aead, secret: Uint8Array, info: Uint8Array): { key: Uint8Array; nonce: Uint8Array } => {
  const suite = Buffer.concat([text.encode('HPKE'), i2osp(kem), i2osp(kdf), i2osp(aeads[aead].id)])
  const context = Buffer.concat([Uint8Array.of(0), extract(suite, none, 'psk_id_hash', none), extract(suite, none, 'info_hash', info)])
  const prk = extract(suite, secret, 'secret', none)
  return { key: expand(suite, prk, 'key', context, aeads[aead].key), nonce: expand(suite, prk, 'base_nonce', context, 12) }
}

export interface Sealed {
  /** Ephemeral public key, 65 bytes uncompressed. */
  readonly enc: Uint8Array
  /** Ciphertext and 16-byte tag. */
  readonly ciphertext: Uint8Array
}

/** Single-shot SealBase to a P-256 point (65 bytes uncompressed; throws when it is not on the curve). `ephemeral`: private scalar, for vectors only. */
export const seal = (aead: Aead, recipient: Uint8Array, info: Uint8Array, aad: Uint8Array, plaintext: Uint8Array, ephemeral?: Uint8Array): Sealed => {
  // OpenSSL takes compressed and hybrid points too, which are other bytes of the same key (RFC 9180 §7.1.1: uncompressed).
  if (recipient.length !== 65 || recipient[0] !== 4) throw new Error('not an uncompressed point of P-256')
  const pair = createECDH('prime256v1')
  if (ephemeral === undefined) pair.generateKeys()
  else pair.setPrivateKey(ephemeral)
  const enc = new Uint8Array(pair.getPublicKey())
  const dh = pair.computeSecret(recipient)
  const { key, nonce } = schedule(aead, sharedSecret(dh, enc, recipient), info)
  dh.fill(0)
  const cipher = createCipheriv(aead, key, nonce, { authTagLength: 16 } as never) as ReturnType<typeof createCipheriv> & {
    setAAD(aad: Uint8Array): void
    getAuthTag(): Buffer
  }
  cipher.setAAD(aad)
  const body = Buffer.concat([cipher.update(plaintext), cipher.final()])
  return { enc, ciphertext: Buffer.concat([body, cipher.getAuthTag()]) }
}

/** Single-shot OpenBase, given the Diffie-Hellman result of `enc` with the recipient's private key (x coordinate). Undefined when it does not authenticate. */
export const open = (aead: Aead, dh: Uint8Array, recipient: Uint8Array, info: Uint8Array, aad: Uint8Array, sealed: Sealed): Uint8Array | undefined => {
  const { key, nonce } = schedule(aead, sharedSecret(dh, sealed.enc, recipient), info)
  const { ciphertext } = sealed
  if (ciphertext.length < 16) return undefined
  const decipher = createDecipheriv(aead, key, nonce, { authTagLength: 16 } as never) as ReturnType<typeof createDecipheriv> & {
    setAAD(aad: Uint8Array): void
    setAuthTag(tag: Uint8Array): void
  }
  decipher.setAAD(aad)
  decipher.setAuthTag(ciphertext.subarray(-16))
  try {
    return Buffer.concat([decipher.update(ciphertext.subarray(0, -16)), decipher.final()])
  } catch {
    return undefined
  }
}
