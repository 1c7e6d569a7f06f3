import { createCipheriv, createDecipheriv, createECDH, createHmac, createPublicKey, encapsulate } from 'node:crypto'

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
/** SubjectPublicKeyInfo of a P-256 key, up to its point. */
const spkiHead = Buffer.from('3059301306072a8648ce3d020106082a8648ce3d030107034200', 'hex')

const i2osp = (value: number): Uint8Array => Uint8Array.of(value >> 8, value & 0xff)
const hmac = (key: Uint8Array, ...data: readonly Uint8Array[]): Uint8Array => {
  const mac = createHmac('sha256', key)
  for (const part of data) mac.update(part)
  return mac.digest()
}

const noSalt = new Uint8Array(32)
/** What stands before the input keying material of LabeledExtract (RFC 9180 §4), and before the info of LabeledExpand: the same each time. */
const extracting = (suite: Uint8Array, label: string): Uint8Array => Buffer.concat([text.encode('HPKE-v1'), suite, text.encode(label)])
const expanding = (suite: Uint8Array, label: string, length: number): Uint8Array => Buffer.concat([i2osp(length), extracting(suite, label)])
/** After it: the number of the one block. */
const first = Uint8Array.of(1)

const kemSuite = Buffer.concat([text.encode('KEM'), i2osp(kem)])
const [eaePrk, kemSecret] = [extracting(kemSuite, 'eae_prk'), expanding(kemSuite, 'shared_secret', 32)]

/** Shared secret of Encap and Decap (RFC 9180 §4.1) from the Diffie-Hellman result `dh` (x coordinate, 32 bytes). */
const sharedSecret = (dh: Uint8Array, enc: Uint8Array, recipient: Uint8Array): Uint8Array => hmac(hmac(noSalt, eaePrk, dh), kemSecret, enc, recipient, first)

const scheduleOf = (aead: Aead) => {
  const suite = Buffer.concat([text.encode('HPKE'), i2osp(kem), i2osp(kdf), i2osp(aeads[aead].id)])
  return {
    infoHash: extracting(suite, 'info_hash'),
    secret: extracting(suite, 'secret'),
    key: expanding(suite, 'key', aeads[aead].key),
    nonce: expanding(suite, 'base_nonce', 12),
    /** Base mode, no pre-shared key. */
    context: Buffer.concat([Uint8Array.of(0), hmac(noSalt, extracting(suite, 'psk_id_hash'))]),
  }
}
const schedules: Readonly<Record<Aead, ReturnType<typeof scheduleOf>>> = {
  'aes-128-gcm': scheduleOf('aes-128-gcm'),
  'aes-256-gcm': scheduleOf('aes-256-gcm'),
  'chacha20-poly1305': scheduleOf('chacha20-poly1305'),
}

/** Key schedule of base mode (RFC 9180 §5.1): key and nonce of the first and only message. */
const schedule = (aead: Aead, secret: Uint8Array, info: Uint8Array): { key: Uint8Array; nonce: Uint8Array } => {
  const of = schedules[aead]
  const hash = hmac(noSalt, of.infoHash, info)
  const prk = hmac(secret, of.secret)
  return { key: hmac(prk, of.key, of.context, hash, first).subarray(0, aeads[aead].key), nonce: hmac(prk, of.nonce, of.context, hash, first).subarray(0, 12) }
}

/** Encap (RFC 9180 §4.1), by OpenSSL, which has this KEM whole. Throws for a point that is not on the curve. */
const encap = (recipient: Uint8Array): { readonly secret: Uint8Array; readonly enc: Uint8Array } => {
  const { sharedKey, ciphertext } = encapsulate(createPublicKey({ key: Buffer.concat([spkiHead, recipient]), format: 'der', type: 'spki' }))
  return { secret: sharedKey, enc: ciphertext }
}

/** The same with an ephemeral key of the caller's. */
const encapWith = (recipient: Uint8Array, ephemeral: Uint8Array): ReturnType<typeof encap> => {
  const pair = createECDH('prime256v1')
  pair.setPrivateKey(ephemeral)
  const enc = pair.getPublicKey()
  const dh = pair.computeSecret(recipient)
  const secret = sharedSecret(dh, enc, recipient)
  dh.fill(0)
  return { secret, enc }
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
  const { secret, enc } = ephemeral === undefined ? encap(recipient) : encapWith(recipient, ephemeral)
  const { key, nonce } = schedule(aead, secret, info)
  secret.fill(0)
  const cipher = createCipheriv(aead, key, nonce, { authTagLength: 16 } as never) as ReturnType<typeof createCipheriv> & {
    setAAD(aad: Uint8Array): void
    getAuthTag(): Buffer
  }
  cipher.setAAD(aad)
  return { enc, ciphertext: Buffer.concat([cipher.update(plaintext), cipher.final(), cipher.getAuthTag()]) }
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
