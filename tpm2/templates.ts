import { ascii, empty, sameBytes } from './bytes.ts'
import { alg, attribute, curve } from './constants.ts'
import { underPolicy } from './firmware.ts'
import { ekPolicy, ekPolicyB } from './policies.ts'
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

/** Templates H-1 to H-3 of the high range: PolicyB, and the password (empty) may be used. H-3 is P-384 with SHA-384 and AES-256. */
const high = { attributes: ekEcc.attributes | userWithAuth, authPolicy: ekPolicyB(alg.sha256) }
const ekRsaHigh: RsaPublic = { ...ekRsa, ...high }
const ekEccHigh = ecc({ ...ekEcc, ...high })
const ekEcc384 = ecc({
  ...high,
  nameAlg: alg.sha384,
  authPolicy: ekPolicyB(alg.sha384),
  symmetric: { algorithm: alg.aes, keyBits: 256, mode: alg.cfb },
  curve: curve.p384,
})

/** Every template that an EK may be made by (TCG EK credential profile §B.3, §B.4): the one whose key type, curve and policy these are comes closest. */
export const ekTemplates: readonly (RsaPublic | EccPublic)[] = [ekEcc, ekRsa, ekEccHigh, ekRsaHigh, ekEcc384]

/** The EK template that a public area should have been made by. */
export const ekTemplateFor = (key: Public): RsaPublic | EccPublic => {
  const score = (of: RsaPublic | EccPublic): number =>
    (of.type === key.type ? 4 : 0) +
    (key.type === alg.ecc && of.type === alg.ecc && of.curve === key.curve ? 2 : 0) +
    (sameBytes(of.authPolicy, key.authPolicy) ? 1 : 0)
  return ekTemplates.reduce((best, one) => (score(one) > score(best) ? one : best))
}

/** TCG storage root key, P-256 (TPM v2.0 provisioning guidance §7.5.1). */
const srk = ecc({ attributes: own | userWithAuth | noDA | restricted | decrypt, symmetric: aes128, x: zeros, y: zeros })

/** Attestation key: an endorsement primary, so that its quotes show resetCount in clear. Another unique makes another key. */
const ak = ecc({ attributes: own | userWithAuth | noDA | restricted | sign, scheme: ecdsa, x: ascii('fleetkey-ak-1') })

/** Identity key, child of the SRK: signs the device's messages. */
const ldevid = ecc({ attributes: own | userWithAuth | noDA | sign, scheme: ecdsa })

/** Recipient key, child of the SRK: keys are wrapped to it. Made under a firmware policy (firmware.ts), which takes the place of the password. */
const recipient = ecc({ attributes: own | userWithAuth | noDA | decrypt })

/** A sealed object: the storage key. Made under a firmware policy. */
const sealed: KeyedHashPublic = {
  type: alg.keyedhash,
  nameAlg: alg.sha256,
  attributes: fixedTPM | fixedParent | userWithAuth | noDA,
  authPolicy: empty,
  scheme: null,
  unique: empty,
}

export const templates = { ekEcc, ekRsa, ekEccHigh, ekRsaHigh, ekEcc384, srk, ak, ldevid, recipient, sealed } as const
export type KeyRole = 'ek' | 'srk' | 'ak' | 'ldevid' | 'recipient'

const expectedOf = (role: KeyRole, key: Public, authPolicy: Uint8Array | null): Public => {
  const template = role === 'ek' ? ekTemplateFor(key) : templates[role]
  return authPolicy === null ? template : underPolicy(template, authPolicy)
}

/** Bytes of a coordinate. */
export const fieldSize = (key: EccPublic): number => (key.curve === curve.p384 ? 48 : 32)

export const sameScheme = (a: { scheme: number; hash: number } | null, b: { scheme: number; hash: number } | null): boolean =>
  a === null || b === null ? a === b : a.scheme === b.scheme && a.hash === b.hash

export const sameSymmetric = (a: Symmetric | null, b: Symmetric | null): boolean =>
  a === null || b === null ? a === b : a.algorithm === b.algorithm && a.keyBits === b.keyBits && a.mode === b.mode

/**
 * First field in which a public area differs from the template of its role, `undefined` when only the key itself differs. A key that differs anywhere
 * else is not ours: one attribute decides whether it can leave the TPM or sign what it likes. An EK may be of any EK template. `authPolicy`: the policy that a
 * key under firmware must be under, and then under nothing else. Throws TpmFormatError.
 */
export const mismatch = (publicBytes: Uint8Array, role: KeyRole, authPolicy: Uint8Array | null = null): string | undefined => {
  const key = parsePublic(publicBytes)
  const expected = expectedOf(role, key, authPolicy)
  if (key.type !== expected.type) return 'type'
  if (key.nameAlg !== expected.nameAlg) return 'name-algorithm'
  if (key.attributes !== expected.attributes) return 'attributes'
  if (!sameBytes(key.authPolicy, expected.authPolicy)) return 'policy'
  if (!sameScheme(key.scheme, expected.scheme)) return 'scheme'
  if (key.type === alg.keyedhash || expected.type === alg.keyedhash) return undefined
  if (!sameSymmetric(key.symmetric, expected.symmetric)) return 'symmetric'
  if (key.type === alg.ecc)
    return expected.type === alg.ecc && key.curve !== expected.curve
      ? 'curve'
      : key.x.length !== fieldSize(key) || key.y.length !== fieldSize(key)
        ? 'point'
        : undefined
  if (expected.type !== alg.rsa) return 'type'
  if (key.keyBits !== expected.keyBits || key.modulus.length !== 256 || (key.modulus[0] ?? 0) < 0x80) return 'key-size'
  return key.exponent === 0 || key.exponent === 65_537 ? undefined : 'exponent'
}
