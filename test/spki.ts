import { generateKeyPairSync } from 'node:crypto'

/** A fresh P-256 public key, DER SubjectPublicKeyInfo. */
export const spkiPair = (): Uint8Array =>
  new Uint8Array(generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).publicKey.export({ format: 'der', type: 'spki' }))
