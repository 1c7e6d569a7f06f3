import { concat, sized, u16, u32 } from './bytes.ts'
import { alg, command, handle } from './constants.ts'
import { digest, hashName } from './kdf.ts'
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

/** TPM2_PolicyOR: starts again from zero: H(0 ‖ CC ‖ branches). */
export const policyOr = (branches: readonly Uint8Array[], of: number = hash): Uint8Array =>
  digest(of, new Uint8Array(hashName(of).size), u32(command.policyOr), ...branches)

/** PolicyA of the TCG EK templates: PolicySecret of the endorsement hierarchy. */
export const ekPolicy = policySecret(noPolicy, u32(handle.endorsement))

/** NV index whose content may authorise an EK of the high range besides the hierarchy (TCG EK credential profile §B.6.4), by hash. */
const policyIndex: ReadonlyMap<number, number> = new Map([
  [alg.sha256, 0x01c0_7f01],
  [alg.sha384, 0x01c0_7f02],
])
const policyIndexAttributes = 0x220f_1008

/**
 * PolicyB of the EK templates in the high range (TCG EK credential profile §B.6.5): PolicySecret of the endorsement hierarchy (PolicyA), or
 * PolicyAuthorizeNV of the index that the profile reserves (PolicyC). SHA-256 and SHA-384.
 */
export const ekPolicyB = (of: number): Uint8Array => {
  const { size } = hashName(of)
  const zeros = new Uint8Array(size)
  const secret = digest(of, digest(of, zeros, u32(command.policySecret), u32(handle.endorsement)))
  const area = concat(u32(policyIndex.get(of) ?? 0), u16(of), u32(policyIndexAttributes), sized(secret), u16(size + 2))
  const authorizeNv = digest(of, zeros, u32(command.policyAuthorizeNv), u16(of), digest(of, area))
  return policyOr([secret, authorizeNv], of)
}
