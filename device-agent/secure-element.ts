import { createPrivateKey, createPublicKey, sign, type KeyObject } from 'node:crypto'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'

/**
 * A secure element with a factory identity (IEEE 802.1AR): the little that the agent needs of it. What stands behind it, a PKCS#11 token, a driver or a key file,
 * is its maker's matter.
 */
export interface SecureElement {
  /** IDevID certificate, then what leads to its root (which need not be there), DER. */
  readonly chain: readonly Uint8Array[]
  /** SubjectPublicKeyInfo of the IDevID key, as its certificate has it. */
  readonly spki: Uint8Array
  /** ECDSA by the IDevID key over `data`, raw r‖s: P-256 with SHA-256, P-384 with SHA-384. */
  sign(data: Uint8Array): Promise<Uint8Array>
}

const unusable = (what: string): Problem => new Problem('unsupported', `secure element: ${what}`, { reason: 'secure-element' })

const hashes: Readonly<Record<string, string>> = { prime256v1: 'sha256', secp384r1: 'sha384' }

const hashOf = (key: KeyObject): string => {
  const curve = key.asymmetricKeyDetails?.namedCurve ?? ''
  const hash = key.asymmetricKeyType === 'ec' && Object.hasOwn(hashes, curve) ? hashes[curve] : undefined
  if (hash === undefined) throw unusable('its key is not of P-256 or P-384')
  return hash
}

/** The same in software: the key in memory, as a file or a simulator gives it. Throws Problem('unsupported') when key and certificate do not belong together. */
export const softwareSecureElement = (key: KeyObject, chain: readonly Uint8Array[]): SecureElement => {
  const [leaf] = chain
  if (leaf === undefined) throw unusable('it has no certificate')
  const { spki, native } = parseCertificate(leaf)
  const hash = hashOf(key)
  if (!createPublicKey(key).equals(native.publicKey)) throw unusable('its certificate is for another key')
  return { chain, spki, sign: async (data) => new Uint8Array(sign(hash, data, { key, dsaEncoding: 'ieee-p1363' })) }
}

/** A private key as PEM text (PKCS #8 or SEC 1). */
export const privateKeyOf = (pem: string): KeyObject => {
  try {
    return createPrivateKey(pem)
  } catch (cause) {
    throw new Problem('unsupported', 'secure element: its key file is no private key', { reason: 'secure-element', cause })
  }
}
