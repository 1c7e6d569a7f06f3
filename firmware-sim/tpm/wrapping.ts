import { concat, empty, sameBytes, sized, u16 } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { cfbDecrypt, cfbEncrypt, digest, hmac, kdfA, kdfE } from '@fleetkey/tpm2/kdf.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import { marshalPoint, marshalPublic, type Public } from '@fleetkey/tpm2/structures.ts'
import { multiply, publicPoint, scalarOf, shared, fieldSize } from './ecc.ts'
import { Input } from './input.ts'
import { trimmed, type Sensitive, type TpmObject } from './objects.ts'
import { eccPoint, sizeOfHash } from './readers.ts'
import { rc, Refusal } from './refusal.ts'
import { openOaep, rsaExponent, rsaPrivateKey, rsaPublicKey, sealOaep } from './rsa.ts'

type Random = (length: number) => Uint8Array

const nameFor = (key: Public): Uint8Array => nameOf(marshalPublic(key))

/** TPMT_SENSITIVE in its TPM2B, the authorisation value padded to the size of the name's hash (Part 1 §27.5.3). */
const marshalSensitive = (key: Public, of: Sensitive): Uint8Array => {
  const auth = concat(of.auth, new Uint8Array(Math.max(0, sizeOfHash(key.nameAlg) - of.auth.length)))
  return sized(concat(u16(key.type), sized(auth), sized(of.seed), sized(of.secret)))
}

export interface ReadSensitive extends Sensitive {
  readonly type: number
}

/** TPMT_SENSITIVE, its type as it says. */
export const sensitiveArea = (input: Input): ReadSensitive => {
  const type = input.u16()
  const most = sensitiveSizes.get(type)
  if (most === undefined) throw new Refusal(rc.type)
  return { type, auth: trimmed(input.sized(64)), seed: input.sized(64).slice(), secret: input.sized(most).slice() }
}
const sensitiveSizes = new Map<number, number>([
  [alg.rsa, 192 * 5],
  [alg.ecc, 80],
  [alg.keyedhash, 128],
])

const sensitiveOf = (bytes: Uint8Array): ReadSensitive => {
  const input = new Input(bytes)
  const size = input.u16()
  if (size !== input.left) throw new Refusal(rc.size)
  const sensitive = sensitiveArea(input)
  if (input.left > 0) throw new Refusal(rc.size)
  return sensitive
}

const symmetricBits = (of: Public): number => (of.type !== alg.keyedhash && of.symmetric !== null ? of.symmetric.keyBits : 128)

/** Outer wrapper (Part 1 §23.3.2.3): HMAC over (encrypted ‖ Name), then the encrypted bytes. `iv`: for what stays with this TPM. */
const wrapOuter = (protector: Public, of: { seed: Uint8Array; name: Uint8Array; iv?: Uint8Array }, plain: Uint8Array): Uint8Array => {
  const { nameAlg } = protector
  const encrypted = cfbEncrypt(kdfA(nameAlg, of.seed, 'STORAGE', of.name, empty, symmetricBits(protector)), plain, of.iv)
  const content = of.iv === undefined ? encrypted : concat(sized(of.iv), encrypted)
  const macKey = kdfA(nameAlg, of.seed, 'INTEGRITY', empty, empty, sizeOfHash(nameAlg) * 8)
  return concat(sized(hmac(nameAlg, macKey, content, of.name)), content)
}

/** Refuses with INTEGRITY what was altered or belongs to another Name. */
const unwrapOuter = (protector: Public, of: { seed: Uint8Array; name: Uint8Array; iv: boolean }, wrapped: Uint8Array): Uint8Array => {
  const { nameAlg } = protector
  const input = new Input(wrapped)
  const mac = input.sized(64)
  const content = input.rest()
  const macKey = kdfA(nameAlg, of.seed, 'INTEGRITY', empty, empty, sizeOfHash(nameAlg) * 8)
  if (!sameMac(mac, hmac(nameAlg, macKey, content, of.name))) throw new Refusal(rc.integrity)
  const key = kdfA(nameAlg, of.seed, 'STORAGE', of.name, empty, symmetricBits(protector))
  if (!of.iv) return cfbDecrypt(key, content)
  const inner = new Input(content)
  const iv = inner.sized(16)
  if (iv.length !== 16) throw new Refusal(rc.value)
  return cfbDecrypt(key, inner.rest(), iv)
}

/** TPM2B_PRIVATE content of an object below `parent` (Part 1 §23.4). */
export const wrapPrivate = (parent: TpmObject, key: Public, sensitive: Sensitive, random: Random): Uint8Array =>
  wrapOuter(parent.public, { seed: parent.sensitive?.seed ?? empty, name: nameFor(key), iv: random(16) }, marshalSensitive(key, sensitive))

export const unwrapPrivate = (parent: TpmObject, key: Public, wrapped: Uint8Array): ReadSensitive =>
  sensitiveOf(unwrapOuter(parent.public, { seed: parent.sensitive?.seed ?? empty, name: nameFor(key), iv: true }, wrapped))

/** Seed that another shared with this key (Part 1 Annex B.10.3, C.6.3). Refuses with VALUE or ECC_POINT. */
export const receiveSeed = (object: TpmObject, secret: Uint8Array, label: string): Uint8Array => {
  const key = object.public
  if (object.sensitive === null) throw new Refusal(rc.key)
  if (key.type === alg.ecc) {
    const point = eccPoint(new Input(secret))
    const size = fieldSize(key.curve)
    const x = shared(key.curve, object.sensitive.secret, point)
    return kdfE(key.nameAlg, x, label, padded(point.x, size), padded(key.x, size), sizeOfHash(key.nameAlg) * 8)
  }
  if (key.type !== alg.rsa) throw new Refusal(rc.key)
  if (secret.length !== key.modulus.length) throw new Refusal(rc.size)
  const seed = openOaep(rsaPrivateKey({ modulus: key.modulus, exponent: rsaExponent(key.exponent) }, object.sensitive.secret), key.nameAlg, label, secret)
  if (seed.length > sizeOfHash(key.nameAlg)) throw new Refusal(rc.value)
  return seed
}

const padded = (bytes: Uint8Array, size: number): Uint8Array => concat(new Uint8Array(Math.max(0, size - bytes.length)), bytes)

/** A fresh seed for the owner of this key, and the secret that carries it. */
export const shareSeedWith = (key: Public, label: string, random: Random): { seed: Uint8Array; secret: Uint8Array } => {
  if (key.type === alg.ecc) {
    const scalar = scalarOf(key.curve, random(fieldSize(key.curve) + 16))
    const own = publicPoint(key.curve, scalar)
    const { x } = multiply(key.curve, scalar, key)
    return { seed: kdfE(key.nameAlg, x, label, own.x, padded(key.x, own.x.length), sizeOfHash(key.nameAlg) * 8), secret: marshalPoint(own.x, own.y) }
  }
  if (key.type !== alg.rsa) throw new Refusal(rc.key)
  const seed = random(sizeOfHash(key.nameAlg))
  return { seed, secret: sealOaep(rsaPublicKey({ modulus: key.modulus, exponent: rsaExponent(key.exponent) }), key.nameAlg, label, seed) }
}

export const wrapCredential = (key: Public, seed: Uint8Array, name: Uint8Array, secret: Uint8Array): Uint8Array => wrapOuter(key, { seed, name }, sized(secret))

export const unwrapCredential = (key: Public, seed: Uint8Array, name: Uint8Array, blob: Uint8Array): Uint8Array => {
  const input = new Input(unwrapOuter(key, { seed, name, iv: false }, blob))
  const secret = input.sized(64)
  if (input.left > 0) throw new Refusal(rc.size)
  return secret
}

/** Duplicate with its inner and outer wrapper (Part 1 §23.3.2). `seed` empty: no outer one; `innerKey` empty: no inner one. */
export const wrapDuplicate = (newParent: Public | null, of: { key: Public; sensitive: Sensitive; seed: Uint8Array; innerKey: Uint8Array }): Uint8Array => {
  const name = nameFor(of.key)
  const plain = marshalSensitive(of.key, of.sensitive)
  const inner = of.innerKey.length === 0 ? plain : cfbEncrypt(of.innerKey, concat(sized(digest(of.key.nameAlg, plain, name)), plain))
  return newParent === null ? inner : wrapOuter(newParent, { seed: of.seed, name }, inner)
}

export const unwrapDuplicate = (parent: Public, of: { key: Public; duplicate: Uint8Array; seed: Uint8Array; innerKey: Uint8Array }): ReadSensitive => {
  const name = nameFor(of.key)
  const outer = of.seed.length === 0 ? of.duplicate : unwrapOuter(parent, { seed: of.seed, name, iv: false }, of.duplicate)
  if (of.innerKey.length === 0) return sensitiveOf(outer)
  const input = new Input(cfbDecrypt(of.innerKey, outer))
  const integrity = input.sized(64)
  const rest = input.rest()
  if (!sameBytes(integrity, digest(of.key.nameAlg, rest, name))) throw new Refusal(rc.integrity)
  return sensitiveOf(rest)
}
