import type { KeyObject } from 'node:crypto'
import { keyUsages } from '../oids.ts'
import { checkPossession, readKey, type KeyKind } from './key.ts'
import { readStructure } from './structure.ts'
import { checkWishes, type Wishes } from './wishes.ts'

/** What a request may be for: what the certificate will be, whatever is asked. */
export interface RequestPolicy {
  readonly keys: readonly KeyKind[]
  /** Bit positions of KeyUsage. */
  readonly usages: readonly number[]
  /** OIDs of extended key usages. */
  readonly purposes: readonly string[]
  /** `URI:…`, `DNS:…`, or `IP:` with the address in hex. */
  readonly names: readonly string[]
  /** Common name of whoever asks; undefined: the certificate will carry another one, whatever stands there. */
  readonly subject?: string
}

export interface JudgedRequest extends Wishes {
  /** SubjectPublicKeyInfo, DER: all that a certificate takes from a request. */
  readonly spki: Uint8Array
  readonly kind: KeyKind
}

/** What devices of our own ask for: a P-256 key that signs, under a name that is not taken over. */
export const plainRequest: RequestPolicy = { keys: ['p256'], usages: [keyUsages.digitalSignature], purposes: [], names: [] }

/**
 * Judges a certification request (RFC 2986, DER): encoding, key, proof of possession, and what it asks for, in this order. Nothing of it is taken but the public
 * key. `known`: a key that was imported already, for the case that the request is for it. Throws Problem with a reason of `requestReasons`.
 */
export const judgeRequest = (
  bytes: Uint8Array,
  policy: RequestPolicy = plainRequest,
  known?: { readonly spki: Uint8Array; readonly object: KeyObject },
): JudgedRequest => {
  const structure = readStructure(bytes)
  const key = readKey(structure.spki, policy.keys)
  checkPossession(structure, key, known !== undefined && Buffer.compare(known.spki, key.spki) === 0 ? known.object : undefined)
  return { spki: new Uint8Array(key.spki), kind: key.kind, ...checkWishes(structure, policy) }
}
