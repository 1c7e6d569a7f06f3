import type { KeyObject } from 'node:crypto'
import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, curve } from '@fleetkey/tpm2/constants.ts'
import { underPolicy } from '@fleetkey/tpm2/firmware.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { keyObjectOf, parsePublic, spkiOfKey, spkiOfPoint, type EccPublic, type Public, type RsaPublic } from '@fleetkey/tpm2/structures.ts'
import { fieldSize, sameScheme, sameSymmetric, templates } from '@fleetkey/tpm2/templates.ts'
import { isOnCurve } from './on-curve.ts'
import { attributeBits, type AttributeBit, type KeyRole } from './reasons/keys.ts'
import { fail, parsed } from './reasons.ts'

/** A public area that was found acceptable, with everything that follows from it. */
export interface TpmKey {
  readonly bytes: Uint8Array
  readonly public: RsaPublic | EccPublic
  /** Computed here, never taken from a device. */
  readonly name: Uint8Array
  /** Imported when it is first asked for, once. */
  readonly object: KeyObject
  /** DER SubjectPublicKeyInfo. */
  readonly spki: Uint8Array
}

const maskOf: Readonly<Record<Exclude<AttributeBit, 'reserved'>, number>> = {
  'fixed-tpm': attribute.fixedTPM,
  'fixed-parent': attribute.fixedParent,
  'sensitive-data-origin': attribute.sensitiveDataOrigin,
  restricted: attribute.restricted,
  sign: attribute.sign,
  decrypt: attribute.decrypt,
  'encrypted-duplication': attribute.encryptedDuplication,
  'admin-with-policy': attribute.adminWithPolicy,
  'user-with-auth': attribute.userWithAuth,
  'st-clear': attribute.stClear,
  'no-da': attribute.noDA,
  'x509-sign': attribute.x509sign,
}
const named = Object.values(maskOf).reduce((all, mask) => all | mask, 0)
const masks: readonly (readonly [AttributeBit, number])[] = attributeBits.map((bit) => [bit, bit === 'reserved' ? ~named : maskOf[bit]])

/** Refuses the first bit that is not as expected, by name. `free`: bits that may be either way. */
export const checkAttributes = (role: KeyRole, attributes: number, expected: number, free = 0): void => {
  const wrong = (attributes ^ expected) & ~free
  if (wrong === 0) return
  const [bit, mask] = masks.find(([, mask]) => (wrong & mask) !== 0) ?? ['reserved' as const, 0]
  const set = (attributes & mask) !== 0
  fail(`${role}.attributes.${set ? '' : 'not-'}${bit}`, `attributes ${(attributes >>> 0).toString(16)} where ${(expected >>> 0).toString(16)} belongs`)
}

/** Reads a public area of an asymmetric key. */
export const readKey = (role: KeyRole, bytes: Uint8Array): RsaPublic | EccPublic => {
  const key: Public = parsed(`${role}.malformed`, () => parsePublic(bytes))
  return key.type === alg.keyedhash ? fail(`${role}.algorithm`) : key
}

/** What is in the public area besides the key itself, compared with a template, worst fault first. */
export const checkArea = (role: KeyRole, key: RsaPublic | EccPublic, expected: RsaPublic | EccPublic): void => {
  if (key.type !== expected.type) fail(`${role}.algorithm`)
  checkAttributes(role, key.attributes, expected.attributes)
  if (key.type === alg.ecc && expected.type === alg.ecc && key.curve !== expected.curve) fail(`${role}.curve`, `curve ${key.curve.toString(16)}`)
  if (key.nameAlg !== expected.nameAlg) fail(`${role}.name-algorithm`, `name algorithm ${key.nameAlg.toString(16)}`)
  if (!sameBytes(key.authPolicy, expected.authPolicy)) fail(`${role}.policy`, `policy ${Buffer.from(key.authPolicy).toString('hex')}`)
  if (!sameScheme(key.scheme, expected.scheme)) fail(`${role}.scheme`)
  if (!sameSymmetric(key.symmetric, expected.symmetric)) fail(`${role}.symmetric`)
}

const lazily = <T>(make: () => T): (() => T) => {
  let made: { readonly value: T } | undefined
  return () => (made ??= { value: make() }).value
}

/** The key itself: its size, its exponent, a point that is on its curve. */
export const usableKey = (role: KeyRole, bytes: Uint8Array, key: RsaPublic | EccPublic): TpmKey => {
  if (key.type === alg.ecc) {
    if (key.curve !== curve.p256 && key.curve !== curve.p384) fail(`${role}.curve`, `curve ${key.curve.toString(16)}`)
    if (key.x.length !== fieldSize(key) || key.y.length !== fieldSize(key)) fail(`${role}.point`, 'coordinates of another length')
    if (!isOnCurve(key)) fail(`${role}.point`, 'not on its curve')
  } else {
    if (key.keyBits < 2048 || key.modulus.length * 8 !== key.keyBits || (key.modulus[0] ?? 0) < 0x80) fail(`${role}.key-size`, `${key.keyBits} bits`)
    if (key.exponent !== 0 && key.exponent !== 65_537) fail(`${role}.exponent`, `exponent ${key.exponent}`)
  }
  const object = lazily(() => parsed(`${role}.point`, () => keyObjectOf(key)))
  const spki = key.type === alg.ecc ? spkiOfPoint(key) : spkiOfKey(key, object())
  return {
    bytes,
    public: key,
    name: nameOf(bytes, key.nameAlg),
    spki,
    get object() {
      return object()
    },
  }
}

/** The template of a role. `policy`: the authPolicy it must have (keys under firmware); then a password is no way around it. */
const templateOf = (role: Exclude<KeyRole, 'ek'>, policy: Uint8Array | null): EccPublic => {
  const template = templates[role]
  return policy === null ? template : underPolicy(template, policy)
}

/**
 * AK, SRK, LDevID or recipient key, exactly as its template has it: one bit decides whether a key can leave its TPM or sign what it likes.
 * `policy`: the authPolicy that is expected; null when the template has none.
 */
export const checkKey = (role: Exclude<KeyRole, 'ek'>, bytes: Uint8Array, policy: Uint8Array | null = null): TpmKey => {
  const key = readKey(role, bytes)
  checkArea(role, key, templateOf(role, policy))
  return usableKey(role, bytes, key)
}

const own = attribute.fixedTPM | attribute.fixedParent | attribute.sensitiveDataOrigin
/** What may differ between attestation keys that tools make: how the key is authorised. */
const freeOfAk = attribute.userWithAuth | attribute.noDA | attribute.stClear

/**
 * An attestation key as others make it (tpm2_createak: RSA 2048 and up with RSASSA or PSS, P-256, P-384, SHA-256 and up): restricted, signing, made in and
 * fixed to its TPM.
 */
export const checkForeignAk = (bytes: Uint8Array): TpmKey => {
  const key = readKey('ak', bytes)
  checkAttributes('ak', key.attributes, own | attribute.restricted | attribute.sign, freeOfAk)
  if (key.nameAlg === alg.sha1) fail('ak.name-algorithm', 'SHA-1')
  const schemes: readonly number[] = key.type === alg.ecc ? [alg.ecdsa] : [alg.rsassa, alg.rsapss]
  if (key.scheme === null || !schemes.includes(key.scheme.scheme) || key.scheme.hash === alg.sha1) fail('ak.scheme', 'no scheme, or SHA-1')
  if (key.symmetric !== null) fail('ak.symmetric')
  return usableKey('ak', bytes, key)
}
