import { constants, verify, type KeyObject } from 'node:crypto'
import { alg, curve } from '@fleetkey/tpm2/constants.ts'
import { parseSignature, type Signature } from '@fleetkey/tpm2/attest.ts'
import { hashName } from '@fleetkey/tpm2/kdf.ts'
import type { TpmKey } from './keys.ts'
import type { StatementRole } from './reasons/quote.ts'
import { fail, parsed } from './reasons.ts'

/** Order of each curve (SEC 2), and the length of a coordinate. */
const orders: ReadonlyMap<number, { readonly size: number; readonly order: Uint8Array; readonly zero: Uint8Array }> = new Map([
  [
    curve.p256,
    { size: 32, order: new Uint8Array(Buffer.from('ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551', 'hex')), zero: new Uint8Array(32) },
  ],
  [
    curve.p384,
    {
      size: 48,
      order: new Uint8Array(Buffer.from('ffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973', 'hex')),
      zero: new Uint8Array(48),
    },
  ],
])

type Ecdsa = Extract<Signature, { readonly scheme: typeof alg.ecdsa }>

/** r‖s, each at the length of its field and from 1 to the order of the curve less one (FIPS 186-5 §6.4.2). */
const rawOf = (role: StatementRole, of: Ecdsa, at: number): Uint8Array => {
  const { size, order, zero } = orders.get(at) ?? fail('ak.curve')
  const raw = new Uint8Array(2 * size)
  for (const [index, value] of [of.r, of.s].entries()) {
    if (value.length > size) fail(`${role}.signature.range`, 'longer than its field')
    raw.set(value, (index + 1) * size - value.length)
    const number = raw.subarray(index * size, (index + 1) * size)
    if (Buffer.compare(number, order) >= 0 || Buffer.compare(number, zero) === 0) fail(`${role}.signature.range`, 'zero, or beyond the order')
  }
  return raw
}

/**
 * Refuses unless this key signed these bytes with exactly the scheme and hash of its own public area: what the signature names is the attacker's choice, and
 * counts only when it is the key's.
 */
export const checkSignature = (role: StatementRole, key: TpmKey, attest: Uint8Array, bytes: Uint8Array): void => {
  const signature = parsed(`${role}.signature.malformed`, () => parseSignature(bytes))
  const { scheme } = key.public
  if (scheme === null || scheme.scheme !== signature.scheme || scheme.hash !== signature.hash || signature.hash === alg.sha1)
    fail(`${role}.signature.scheme`, `signed with ${signature.scheme.toString(16)}/${signature.hash.toString(16)}`)
  const hash = hashName(signature.hash).name
  const good =
    signature.scheme === alg.ecdsa
      ? verify(hash, attest, { key: key.object, dsaEncoding: 'ieee-p1363' }, rawOf(role, signature, key.public.type === alg.ecc ? key.public.curve : 0))
      : signature.scheme === alg.rsapss
        ? saltLengths(key.object, signature.hash).some((saltLength) => verify(hash, attest, { key: key.object, padding: pss, saltLength }, signature.signature))
        : verify(hash, attest, { key: key.object, padding: pkcs1 }, signature.signature)
  if (!good) fail(`${role}.signature`)
}

const { RSA_PKCS1_PADDING: pkcs1, RSA_PKCS1_PSS_PADDING: pss } = constants

/** A TPM's salt is as long as the hash, or the longest that fits (Part 1 §B.7); left to itself, OpenSSL takes any, and none. */
const saltLengths = (key: KeyObject, hash: number): readonly number[] => {
  const { size } = hashName(hash)
  const encoded = Math.ceil(((key.asymmetricKeyDetails?.modulusLength ?? 0) - 1) / 8)
  return [size, encoded - size - 2]
}
