import { empty } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import type { Public } from '@fleetkey/tpm2/structures.ts'
import { fieldSize, publicPoint, scalarOf } from './ecc.ts'
import type { Sensitive } from './objects.ts'
import { sizeOfHash } from './readers.ts'
import { rc, Refusal } from './refusal.ts'
import { makeRsa, rsaExponent } from './rsa.ts'

/** As much key material as asked, by label: derived for primaries, random for children. */
export type Material = (label: string, length: number) => Uint8Array

export interface Made {
  readonly public: Public
  readonly sensitive: Sensitive
}

/** HMAC keys are as long as their hash, sealed data at most 128 bytes (MAX_SYM_DATA). */
const keyedHash = (template: Public & { type: typeof alg.keyedhash }, data: Uint8Array, material: Material): Uint8Array => {
  const hash = template.scheme?.hash ?? null
  const block = hash === null ? 128 : hash === alg.sha1 || hash === alg.sha256 ? 64 : 128
  if (data.length > block) throw new Refusal(rc.size)
  return data.length > 0 ? data.slice() : material('KEY', sizeOfHash(hash ?? template.nameAlg))
}

/** Makes an object from a template that has passed its checks. A refusal is without a parameter. */
export const makeObject = (template: Public, auth: Uint8Array, data: Uint8Array, material: Material): Made => {
  const given = (template.attributes & attribute.sensitiveDataOrigin) === 0 ? data : empty
  const seed = material('SEED', sizeOfHash(template.nameAlg))
  if (template.type === alg.keyedhash) {
    const secret = keyedHash(template, given, material)
    return { public: { ...template, unique: digest(template.nameAlg, seed, secret) }, sensitive: { auth, seed, secret } }
  }
  // Only a parent's seed is used; other asymmetric keys have none.
  const parent = (template.attributes & attribute.restricted) !== 0 && (template.attributes & attribute.sign) === 0
  const kept = { auth, seed: parent ? seed : empty }
  if (template.type === alg.rsa) {
    if (template.exponent !== 0 && template.exponent !== 65_537) throw new Refusal(rc.range)
    let part = 0
    const { modulus, prime } = makeRsa(template.keyBits, rsaExponent(template.exponent), (length) => material(`RSA ${part++}`, length))
    return { public: { ...template, modulus }, sensitive: { ...kept, secret: prime } }
  }
  const secret = scalarOf(template.curve, material('SCALAR', fieldSize(template.curve) + 16))
  return { public: { ...template, ...publicPoint(template.curve, secret) }, sensitive: { ...kept, secret } }
}
