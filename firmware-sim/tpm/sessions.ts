import { empty } from '@fleetkey/tpm2/bytes.ts'
import { noPolicy } from '@fleetkey/tpm2/policies.ts'

/** A session as the TPM keeps it (Part 1 §19). `bound`: Name of the entity it was bound to, with that entity's value in its key. */
export interface TpmSession {
  readonly handle: number
  readonly type: 'hmac' | 'policy' | 'trial'
  readonly key: Uint8Array
  readonly bound: Uint8Array | null
  readonly encrypts: boolean
  nonceTpm: Uint8Array
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
}

export const startPolicy: PolicyState = { digest: noPolicy, commandCode: null, needsAuth: false, needsPassword: false, pcrUpdates: null }
export const noKey = empty
