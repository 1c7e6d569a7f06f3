import type { KeyObject } from 'node:crypto'
import { marshalSignature } from '@fleetkey/tpm2/attest.ts'
import { concat, u16 } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { hmac } from '@fleetkey/tpm2/kdf.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import type { Scheme } from '@fleetkey/tpm2/structures.ts'
import { signEcdsa, verifyEcdsa } from './ecc.ts'
import type { TpmObject } from './objects.ts'
import type { AnySignature } from './readers.ts'
import { rc, Refusal } from './refusal.ts'
import { rsaExponent, rsaPrivateKey, rsaPublicKey, signRsa, verifyRsa } from './rsa.ts'

/** The scheme that is used when `asked` was asked for (CryptSelectSignScheme of Part 4); undefined when the key has another. */
export const selectScheme = (key: TpmObject | null, asked: Scheme | null): Scheme | null | undefined => {
  if (key === null) return null
  const own = key.public.scheme
  if (own === null) return asked ?? undefined
  if (asked === null) return own
  return own.scheme === asked.scheme && own.hash === asked.hash ? own : undefined
}

const rsaKeys = new WeakMap<TpmObject, KeyObject>()

const rsaKeyOf = (key: TpmObject): KeyObject => {
  const known = rsaKeys.get(key)
  if (known !== undefined) return known
  if (key.public.type !== alg.rsa || key.sensitive === null) throw new Refusal(rc.key)
  const made = rsaPrivateKey({ modulus: key.public.modulus, exponent: rsaExponent(key.public.exponent) }, key.sensitive.secret)
  rsaKeys.set(key, made)
  return made
}

/** TPMT_SIGNATURE over a digest. Refuses with SCHEME a scheme that is not one of this kind of key. */
export const signDigest = (key: TpmObject, scheme: Scheme, digest: Uint8Array, random: (length: number) => Uint8Array): Uint8Array => {
  const { public: area, sensitive } = key
  if (sensitive === null) throw new Refusal(rc.key)
  const { hash } = scheme
  if (area.type === alg.ecc) {
    if (scheme.scheme !== alg.ecdsa) throw new Refusal(rc.scheme)
    return marshalSignature({ scheme: alg.ecdsa, hash, ...signEcdsa(area.curve, sensitive.secret, digest, random) })
  }
  if (area.type === alg.keyedhash) {
    if (scheme.scheme !== alg.hmac) throw new Refusal(rc.scheme)
    return concat(u16(alg.hmac), u16(hash), hmac(hash, sensitive.secret, digest))
  }
  if (scheme.scheme !== alg.rsassa && scheme.scheme !== alg.rsapss) throw new Refusal(rc.scheme)
  const signature = signRsa(rsaKeyOf(key), { scheme: scheme.scheme, hash, digest, length: area.modulus.length, random })
  return marshalSignature({ scheme: scheme.scheme, hash, signature })
}

/** Refuses with SIGNATURE what does not verify, with SCHEME a signature of another kind than the key. */
export const verifyDigest = (key: TpmObject, digest: Uint8Array, signature: AnySignature): void => {
  const area = key.public
  if (area.type === alg.ecc) {
    if (signature.scheme !== alg.ecdsa) throw new Refusal(rc.scheme)
    if (!verifyEcdsa(area.curve, area, digest, signature)) throw new Refusal(rc.signature)
  } else if (area.type === alg.keyedhash) {
    if (key.sensitive === null) throw new Refusal(rc.handle)
    if (signature.scheme !== alg.hmac) throw new Refusal(rc.scheme)
    if (!sameMac(hmac(signature.hash, key.sensitive.secret, digest), signature.mac)) throw new Refusal(rc.signature)
  } else {
    if (signature.scheme !== alg.rsassa && signature.scheme !== alg.rsapss) throw new Refusal(rc.scheme)
    const publicKey = rsaPublicKey({ modulus: area.modulus, exponent: rsaExponent(area.exponent) })
    if (!verifyRsa(publicKey, { ...signature, digest })) throw new Refusal(rc.signature)
  }
}
