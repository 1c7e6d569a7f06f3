import { ascii, empty, sameBytes } from './bytes.ts'
import { alg, attribute, curve } from './constants.ts'
import { ekPolicy } from './policies.ts'
import { parsePublic, type EccPublic, type KeyedHashPublic, type Public, type RsaPublic, type Symmetric } from './structures.ts'

const { fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, adminWithPolicy, noDA, restricted, decrypt, sign } = attribute
const own = fixedTPM | fixedParent | sensitiveDataOrigin
const aes128: Symmetric = { algorithm: alg.aes, keyBits: 128, mode: alg.cfb }
const ecdsa = { scheme: alg.ecdsa, hash: alg.sha256 } as const
const zeros = new Uint8Array(32)

const ecc = (of: Pick<EccPublic, 'attributes'> & Partial<EccPublic>): EccPublic => ({
  type: alg.ecc,
  nameAlg: alg.sha256,
  authPolicy: empty,
  symmetric: null,
  scheme: null,
  curve: curve.p256,
  x: empty,
  y: empty,
  ...of,
})

/** Template L-2 of the TCG EK credential profile (P-256). */
const ekEcc = ecc({ attributes: own | adminWithPolicy | restricted | decrypt, authPolicy: ekPolicy, symmetric: aes128, x: zeros, y: zeros })

/** Template L-1 (RSA-2048). */
const ekRsa: RsaPublic = {
  type: alg.rsa,
  nameAlg: alg.sha256,
  attributes: own | adminWithPolicy | restricted | decrypt,
  authPolicy: ekPolicy,
  symmetric: aes128,
  scheme: null,
  keyBits: 2048,
  exponent: 0,
  modulus: new Uint8Array(256),
}

/** TCG storage root key, P-256 (TPM v2.0 provisioning guidance §7.5.1). */
const srk = ecc({ attributes: own | userWithAuth | noDA | restricted | decrypt, symmetric: aes128, x: zeros, y: zeros })

/** Attestation key: an endorsement primary, so that its quotes show resetCount in clear. Another unique makes another key. */
const ak = ecc({ attributes: own | userWithAuth | noDA | restricted | sign, scheme: ecdsa, x: ascii('fleetkey-ak-1') })

/** Identity key, child of the SRK: signs the device's messages. */
const ldevid = ecc({ attributes: own | userWithAuth | noDA | sign, scheme: ecdsa })

/** Recipient key, child of the SRK: keys are wrapped to it. */
const recipient = ecc({ attributes: own | userWithAuth | noDA | decrypt })

/** A sealed object: the storage key. */
const sealed: KeyedHashPublic = {
  type: alg.keyedhash,
  nameAlg: alg.sha256,
  attributes: fixedTPM | fixedParent | userWithAuth | noDA,
  authPolicy: empty,
  scheme: null,
  unique: empty,
}

export const templates = { ekEcc, ekRsa, srk, ak, ldevid, recipient, sealed } as const
export type KeyRole = 'ek' | 'srk' | 'ak' | 'ldevid' | 'recipient'

const expectedOf = (role: KeyRole, type: number): Public => (role === 'ek' ? (type === alg.rsa ? ekRsa : ekEcc) : templates[role])

const sameScheme = (a: { scheme: number; hash: number } | null, b: { scheme: number; hash: number } | null): boolean =>
  a === null || b === null ? a === b : a.scheme === b.scheme && a.hash === b.hash

const sameSymmetric = (a: Symmetric | null, b: Symmetric | null): boolean =>
  a === null || b === null ? a === b : a.algorithm === b.algorithm && a.keyBits === b.keyBits && a.mode === b.mode

/**
 * First field in which a public area differs from the template of its role, `undefined` when only the key itself differs. A key that differs anywhere
 * else is not ours: one attribute decides whether it can leave the TPM or sign what it likes. An EK may be L-1 or L-2. Throws TpmFormatError.
 */
export const mismatch = (publicBytes: Uint8Array, role: KeyRole): string | undefined => {
  const key = parsePublic(publicBytes)
  const expected = expectedOf(role, key.type)
  if (key.type !== expected.type) return 'type'
  if (key.nameAlg !== expected.nameAlg) return 'name-algorithm'
  if (key.attributes !== expected.attributes) return 'attributes'
  if (!sameBytes(key.authPolicy, expected.authPolicy)) return 'policy'
  if (!sameScheme(key.scheme, expected.scheme)) return 'scheme'
  if (key.type === alg.keyedhash || expected.type === alg.keyedhash) return undefined
  if (!sameSymmetric(key.symmetric, expected.symmetric)) return 'symmetric'
  if (key.type === alg.ecc)
    return expected.type === alg.ecc && key.curve !== expected.curve ? 'curve' : key.x.length !== 32 || key.y.length !== 32 ? 'point' : undefined
  if (expected.type !== alg.rsa) return 'type'
  if (key.keyBits !== expected.keyBits || key.modulus.length !== 256 || (key.modulus[0] ?? 0) < 0x80) return 'key-size'
  return key.exponent === 0 || key.exponent === 65_537 ? undefined : 'exponent'
}
