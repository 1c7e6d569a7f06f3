import { createPrivateKey, createPublicKey, generateKeyPairSync, sign, type KeyObject } from 'node:crypto'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { makeCsr } from '@fleetkey/protocol/x509/csr.ts'

/** The software key of TLS client authentication. It is worth nothing without the TPM's connection proof. */
export interface TlsKey {
  readonly private: KeyObject
  /** DER SubjectPublicKeyInfo. */
  readonly spki: Uint8Array
}

const spkiOf = (key: KeyObject): Uint8Array => new Uint8Array(createPublicKey(key).export({ format: 'der', type: 'spki' }))

/** A fresh P-256 key. */
export const newTlsKey = (): TlsKey => {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  return { private: privateKey, spki: spkiOf(privateKey) }
}

/** PKCS #8 DER, to be encrypted before it is stored. */
export const exportTlsKey = (key: TlsKey): Secret => {
  const der = key.private.export({ format: 'der', type: 'pkcs8' })
  const secret = new Secret(der)
  der.fill(0)
  return secret
}

/** The key from its PKCS #8 DER. Throws when it is none. */
export const importTlsKey = (pkcs8: Uint8Array): TlsKey => {
  const key = createPrivateKey({ key: Buffer.from(pkcs8), format: 'der', type: 'pkcs8' })
  return { private: key, spki: spkiOf(key) }
}

/** Certification request of the key for `subject`. */
export const tlsCsr = async (key: TlsKey, subject: string): Promise<Uint8Array> =>
  await makeCsr({ subject, spki: key.spki, sign: async (data) => sign('sha256', data, { key: key.private, dsaEncoding: 'ieee-p1363' }) })
