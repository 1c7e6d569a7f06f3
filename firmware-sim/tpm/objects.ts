import type { Hash, Hmac } from 'node:crypto'
import { alg, attribute } from '@fleetkey/tpm2/constants.ts'
import { nameOf, qualifiedName } from '@fleetkey/tpm2/names.ts'
import { marshalPublic, type Public } from '@fleetkey/tpm2/structures.ts'

/** What an object keeps to itself (TPMT_SENSITIVE): private scalar, prime, HMAC key or sealed data; `seed` obfuscates, or protects children. */
export interface Sensitive {
  /** Without trailing zeros. */
  readonly auth: Uint8Array
  readonly seed: Uint8Array
  readonly secret: Uint8Array
}

/** A loaded object; `sensitive` null when only its public area was loaded. */
export interface TpmObject {
  readonly kind: 'object'
  readonly public: Public
  readonly bytes: Uint8Array
  readonly name: Uint8Array
  readonly qualifiedName: Uint8Array
  readonly hierarchy: number
  readonly sensitive: Sensitive | null
  /** Came in by LoadExternal: it is its own ancestor and nobody's parent. */
  readonly external: boolean
}

/** A hash, HMAC or event under way. */
export interface Sequence {
  readonly kind: 'sequence'
  readonly auth: Uint8Array
  readonly work:
    | { readonly kind: 'hmac'; readonly state: Hmac }
    | { readonly kind: 'hash'; readonly hash: number; readonly state: Hash; firstBlock: Uint8Array | null }
    | { readonly kind: 'event'; readonly states: ReadonlyMap<number, Hash> }
}

export const has = (object: { readonly public: Public }, bit: number): boolean => (object.public.attributes & bit) !== 0
export const isAsymmetric = ({ public: { type } }: { readonly public: Public }): boolean => type === alg.ecc || type === alg.rsa
/** Restricted decryption key: what MakeCredential and Duplicate take, even when only its public area is loaded. */
export const isStorage = (object: TpmObject): boolean => isAsymmetric(object) && has(object, attribute.restricted) && has(object, attribute.decrypt)
/** What can have children: it has its private part and a place in a hierarchy. */
export const isParent = (object: TpmObject): boolean => isStorage(object) && object.sensitive !== null && !object.external
export const isSigner = (object: TpmObject): boolean => has(object, attribute.sign)

/** Trailing zeros of an authorisation value do not count (Part 1 §19.6.4.3). */
export const trimmed = (auth: Uint8Array): Uint8Array => {
  let end = auth.length
  while (end > 0 && auth[end - 1] === 0) end--
  return auth.slice(0, end)
}

/** An object in its place: below a parent (its qualified Name) or a hierarchy (its handle). */
export const loaded = (key: Public, sensitive: Sensitive | null, above: Uint8Array | number, hierarchy: number): TpmObject => {
  const bytes = marshalPublic(key)
  const name = nameOf(bytes)
  return { kind: 'object', public: key, bytes, name, qualifiedName: qualifiedName(above, name), hierarchy, sensitive, external: false }
}

export const loadedExternally = (key: Public, sensitive: Sensitive | null, hierarchy: number): TpmObject => {
  const bytes = marshalPublic(key)
  const name = nameOf(bytes)
  return { kind: 'object', public: key, bytes, name, qualifiedName: name, hierarchy, sensitive, external: true }
}
