import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import type { Public, Symmetric } from '@fleetkey/tpm2/structures.ts'
import { fieldSize, isOnCurve, isScalar, publicPoint } from './ecc.ts'
import type { Sensitive, TpmObject } from './objects.ts'
import { sizeOfHash } from './readers.ts'
import { parameter, rc, Refusal } from './refusal.ts'
import { isRsaPrime, rsaExponent } from './rsa.ts'

/** Consistency of an object's areas (Part 1 §27, Part 4 Object_spt.c), each refusal with the code of the reference implementation. */
const bit = (of: Public, one: number): boolean => (of.attributes & one) !== 0
const refuseIf = (condition: boolean, code: number): void => {
  if (condition) throw new Refusal(code)
}
const sameSymmetric = (a: Symmetric | null, b: Symmetric | null): boolean =>
  a === null || b === null ? a === b : a.algorithm === b.algorithm && a.keyBits === b.keyBits && a.mode === b.mode

/** What TPM2_Create and TPM2_CreatePrimary (`parent` null) ask of a template. Codes are about its parameter. */
export const createChecks = (parent: TpmObject | null, template: Public, dataSize: number): void => {
  const own = bit(template, attribute.sensitiveDataOrigin)
  refuseIf(!own && dataSize === 0, rc.attributes)
  refuseIf(parent !== null && own && dataSize !== 0, rc.attributes)
  if (template.type === alg.keyedhash) {
    refuseIf(!bit(template, attribute.sign) && !bit(template, attribute.decrypt) && own, rc.attributes)
    refuseIf(bit(template, attribute.restricted) && !own && bit(template, attribute.fixedParent | attribute.fixedTPM), rc.attributes)
  } else refuseIf(!own, rc.attributes)
  attributeChecks(parent, template)
}

/** Attributes that contradict each other or the parent's. */
export const attributeChecks = (parent: TpmObject | null, of: Public): void => {
  const parentFixed = parent === null || bit(parent.public, attribute.fixedTPM)
  refuseIf(of.authPolicy.length !== 0 && of.authPolicy.length !== sizeOfHash(of.nameAlg), rc.size)
  if (parentFixed) refuseIf(bit(of, attribute.fixedParent) !== bit(of, attribute.fixedTPM), rc.attributes)
  else refuseIf(bit(of, attribute.fixedTPM), rc.attributes)
  if (bit(of, attribute.sign) === bit(of, attribute.decrypt)) {
    refuseIf(bit(of, attribute.restricted), rc.attributes)
    refuseIf(of.type !== alg.keyedhash && !bit(of, attribute.sign), rc.attributes)
  }
  refuseIf(bit(of, attribute.fixedTPM) && bit(of, attribute.encryptedDuplication), rc.attributes)
  if (parent !== null && !parentFixed) refuseIf(bit(of, attribute.encryptedDuplication) !== bit(parent.public, attribute.encryptedDuplication), rc.attributes)
  schemeChecks(parent, of)
}

const signSchemes: Readonly<Record<number, readonly number[]>> = { [alg.ecc]: [alg.ecdsa], [alg.rsa]: [alg.rsassa, alg.rsapss] }
const decryptSchemes: Readonly<Record<number, readonly number[]>> = { [alg.ecc]: [alg.ecdh], [alg.rsa]: [alg.rsaes, alg.oaep] }

/** A scheme must be one of what the key is for. */
export const schemeChecks = (parent: TpmObject | null, of: Public): void => {
  const scheme = of.scheme?.scheme ?? null
  const [sign, decrypt, restricted] = [bit(of, attribute.sign), bit(of, attribute.decrypt), bit(of, attribute.restricted)]
  if (of.type === alg.keyedhash) {
    if (sign === decrypt) refuseIf(scheme !== null, rc.scheme)
    else refuseIf(sign ? scheme !== alg.hmac : scheme !== alg.xor, rc.scheme)
    return
  }
  if (sign === decrypt) refuseIf(scheme !== null, rc.scheme)
  else if (sign) refuseIf(scheme === null ? restricted : signSchemes[of.type]?.includes(scheme) !== true, rc.scheme)
  else refuseIf(scheme !== null && (restricted || decryptSchemes[of.type]?.includes(scheme) !== true), rc.scheme)
  if (!restricted || !decrypt) return refuseIf(of.symmetric !== null, rc.symmetric)
  refuseIf(of.symmetric === null, rc.symmetric)
  if (!bit(of, attribute.fixedParent) || parent === null || parent.public.type === alg.keyedhash) return
  refuseIf(of.nameAlg !== parent.public.nameAlg, rc.hash)
  refuseIf(!sameSymmetric(of.symmetric, parent.public.symmetric), rc.symmetric)
}

/** Numbers of the parameters that hold the two areas. */
export interface Blame {
  readonly public: number
  readonly sensitive: number
}

/** What loading asks of an object's areas (ObjectLoad of Part 4). `checkKeys`: for all that did not come out of this TPM. */
export const loadChecks = (of: {
  parent: TpmObject | null
  key: Public
  sensitive: Sensitive | null
  type: number
  checkKeys: boolean
  blame: Blame
}): void => {
  const { key, sensitive, blame } = of
  try {
    if (sensitive === null) schemeChecks(null, key)
    else {
      if (sensitive.seed.length > sizeOfHash(key.nameAlg)) throw parameter(blame.sensitive, rc.keySize)
      attributeChecks(of.parent, key)
    }
  } catch (error) {
    throw error instanceof Refusal ? parameter(blame.public, error.rc) : error
  }
  if (of.checkKeys) keyChecks(key, sensitive, of.type, blame)
}

/** Whether the two areas belong together, and the numbers are those of a key. */
const keyChecks = (key: Public, sensitive: Sensitive | null, type: number, blame: Blame): void => {
  if (sensitive !== null && type !== key.type) throw parameter(blame.sensitive, rc.type)
  if (sensitive !== null && sensitive.auth.length > sizeOfHash(key.nameAlg)) throw parameter(blame.sensitive, rc.size)
  if (key.type === alg.rsa) rsaChecks(key, sensitive, blame)
  else if (key.type === alg.ecc) eccChecks(key, sensitive, blame)
  else keyedHashChecks(key, sensitive, blame)
  const size = sizeOfHash(key.nameAlg)
  const storage = bit(key, attribute.restricted) && bit(key, attribute.decrypt)
  if (storage && sensitive !== null && (sensitive.seed.length < size / 2 || sensitive.seed.length > size)) throw parameter(blame.sensitive, rc.size)
}

const rsaChecks = (key: Public & { type: typeof alg.rsa }, sensitive: Sensitive | null, blame: Blame): void => {
  if (key.modulus.length !== key.keyBits / 8 || (key.modulus[0] ?? 0) < 0x80) throw parameter(blame.public, rc.key)
  if (key.exponent !== 0 && key.exponent < 7) throw parameter(blame.public, rc.value)
  if (sensitive === null) return
  if (sensitive.secret.length * 2 !== key.modulus.length || (sensitive.secret[0] ?? 0) < 0x80) throw parameter(blame.sensitive, rc.keySize)
  if (!isRsaPrime({ modulus: key.modulus, exponent: rsaExponent(key.exponent) }, sensitive.secret)) throw new Refusal(rc.binding)
}

const eccChecks = (key: Public & { type: typeof alg.ecc }, sensitive: Sensitive | null, blame: Blame): void => {
  if (sensitive === null) {
    const size = fieldSize(key.curve)
    if (key.x.length !== size || key.y.length !== size) throw parameter(blame.public, rc.key)
    if (!isOnCurve(key.curve, key)) throw parameter(blame.public, rc.eccPoint)
    return
  }
  if (!isScalar(key.curve, sensitive.secret)) throw new Refusal(rc.keySize)
  const point = publicPoint(key.curve, sensitive.secret)
  if (!sameBytes(point.x, key.x) || !sameBytes(point.y, key.y)) throw new Refusal(rc.binding)
}

const blockSize = (hash: number): number => (hash === alg.sha1 || hash === alg.sha256 ? 64 : 128)

const keyedHashChecks = (key: Public & { type: typeof alg.keyedhash }, sensitive: Sensitive | null, blame: Blame): void => {
  const size = sizeOfHash(key.nameAlg)
  if (sensitive === null) {
    if (key.unique.length !== size) throw parameter(blame.public, rc.key)
    return
  }
  if (sensitive.secret.length > (key.scheme === null ? 128 : blockSize(key.scheme.hash))) throw parameter(blame.sensitive, rc.keySize)
  if (sensitive.seed.length !== size) throw parameter(blame.sensitive, rc.keySize)
  if (!sameBytes(key.unique, digest(key.nameAlg, sensitive.seed, sensitive.secret))) throw new Refusal(rc.binding)
}
