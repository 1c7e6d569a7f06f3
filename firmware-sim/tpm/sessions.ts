import { concat, empty, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { cfbDecrypt, cfbEncrypt, hmac, kdfA } from '@fleetkey/tpm2/kdf.ts'
import type { Symmetric } from '@fleetkey/tpm2/structures.ts'
import { sizeOfHash } from './readers.ts'

/** A session as the TPM keeps it (Part 1 §19). */
export interface TpmSession {
  readonly handle: number
  readonly type: 'hmac' | 'policy' | 'trial'
  readonly hash: number
  readonly key: Uint8Array
  /** Bind value of the entity whose value is in the key already: its Name with its value; null when bound to none. */
  readonly bound: Uint8Array | null
  /** Bound to an entity with dictionary-attack protection, or to the lockout hierarchy. */
  readonly daBound: boolean
  readonly lockoutBound: boolean
  readonly symmetric: Symmetric | { readonly xor: number } | null
  nonceTpm: Uint8Array
  audit: boolean
  /** Of the last command: whether its HMAC covers the entity's value. */
  includesAuth: boolean
  policy: PolicyState
}

/** What the policy commands have gathered so far. */
export interface PolicyState {
  readonly digest: Uint8Array
  readonly commandCode: number | null
  readonly needsAuth: boolean
  readonly needsPassword: boolean
  /** PCR update count that PolicyPCR saw. */
  readonly pcrUpdates: number | null
  /** Bits of the localities that are left, or an extended one; 0: any. */
  readonly locality: number
  /** Digest that the command's parameters or its handles' Names must have. */
  readonly bound: { readonly what: 'parameters' | 'names'; readonly digest: Uint8Array } | null
  readonly nvWritten: boolean | null
  /** Milliseconds since power on. */
  readonly expires: number | null
  readonly startTime: number
}

export const startPolicy = (hash: number, now: number): PolicyState => ({
  digest: new Uint8Array(sizeOfHash(hash)),
  commandCode: null,
  needsAuth: false,
  needsPassword: false,
  pcrUpdates: null,
  locality: 0,
  bound: null,
  nvWritten: null,
  expires: null,
  startTime: now,
})

/** Session key (Part 1 §19.6.8). */
export const sessionKeyOf = (hash: number, secret: Uint8Array, nonceTpm: Uint8Array, nonceCaller: Uint8Array): Uint8Array =>
  kdfA(hash, secret, 'ATH', nonceTpm, nonceCaller, sizeOfHash(hash) * 8)

/** HMAC of a command or response (Part 1 §19.6.5); empty when there is no key and the caller left it out too. */
export const sessionMac = (
  session: TpmSession,
  of: { auth: Uint8Array; omitted: boolean; hash: Uint8Array; newer: Uint8Array; older: Uint8Array; others: readonly Uint8Array[]; attributes: number },
): Uint8Array => {
  const key = concat(session.key, of.auth)
  return key.length === 0 && of.omitted ? empty : hmac(session.hash, key, of.hash, of.newer, of.older, ...of.others, u8(of.attributes))
}

/** Parameter encryption (Part 1 §21): XOR obfuscation, or a cipher in CFB mode. `newer` and `older` nonce as of the direction. */
export const cryptParameter = (
  session: TpmSession,
  of: { auth: Uint8Array; newer: Uint8Array; older: Uint8Array; decrypt: boolean },
  data: Uint8Array,
): Uint8Array => {
  const key = concat(session.key, of.auth)
  const { symmetric } = session
  if (symmetric === null) return data
  if ('xor' in symmetric) {
    const mask = kdfA(session.hash, key, 'XOR', of.newer, of.older, data.length * 8)
    return data.map((byte, at) => byte ^ (mask[at] ?? 0))
  }
  const material = kdfA(session.hash, key, 'CFB', of.newer, of.older, symmetric.keyBits + 128)
  const crypt = of.decrypt ? cfbDecrypt : cfbEncrypt
  return crypt(material.subarray(0, symmetric.keyBits / 8), data, material.subarray(symmetric.keyBits / 8))
}

/** What the TPM is ready to speak in a session: AES in CFB mode. */
export const isUsable = (symmetric: TpmSession['symmetric']): boolean => symmetric === null || 'xor' in symmetric || symmetric.mode === alg.cfb
