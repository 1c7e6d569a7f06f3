import { u32 } from './bytes.ts'
import { alg, command, handle } from './constants.ts'
import { digest } from './kdf.ts'
import { marshalPcrSelection, type PcrBank } from './structures.ts'

/** Policy digests computed without a TPM (Part 3, policy commands), SHA-256. Each takes the digest so far. */
const hash = alg.sha256
export const noPolicy = new Uint8Array(32)

/** TPM2_PolicySecret: H(H(old ‖ CC ‖ name) ‖ ref). `name`: of the entity whose authorisation is needed. */
export const policySecret = (old: Uint8Array, name: Uint8Array, ref: Uint8Array = new Uint8Array(0)): Uint8Array =>
  digest(hash, digest(hash, old, u32(command.policySecret), name), ref)

/** TPM2_PolicyPCR: H(old ‖ CC ‖ TPML_PCR_SELECTION ‖ H(values)). `values` in ascending PCR order. */
export const policyPcr = (old: Uint8Array, banks: readonly PcrBank[], values: readonly Uint8Array[]): Uint8Array =>
  digest(hash, old, u32(command.policyPcr), marshalPcrSelection(banks), digest(hash, ...values))

/** TPM2_PolicyAuthorize: starts again from zero: H(H(0 ‖ CC ‖ key name) ‖ ref). */
export const policyAuthorize = (keyName: Uint8Array, ref: Uint8Array): Uint8Array =>
  digest(hash, digest(hash, noPolicy, u32(command.policyAuthorize), keyName), ref)

/** What the authorising key signs to approve a policy: H(approved ‖ ref). */
export const approvalDigest = (approved: Uint8Array, ref: Uint8Array): Uint8Array => digest(hash, approved, ref)

/** TPM2_PolicyCommandCode: H(old ‖ CC ‖ code). */
export const policyCommandCode = (old: Uint8Array, code: number): Uint8Array => digest(hash, old, u32(command.policyCommandCode), u32(code))

/** PolicyA of the TCG EK templates: PolicySecret of the endorsement hierarchy. */
export const ekPolicy = policySecret(noPolicy, u32(handle.endorsement))
