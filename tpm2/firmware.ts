import { TpmFormatError, empty } from './bytes.ts'
import { alg, attribute, curve } from './constants.ts'
import { nameOf } from './names.ts'
import { noPolicy, policyAuthorize, policyPcr } from './policies.ts'
import { keyObjectOf, marshalPublic, type EccPublic, type Public } from './structures.ts'

/**
 * The policy of keys that work under approved firmware only: PolicyAuthorize(Name(signer), ref). `signer`: TPMT_PUBLIC of the key that approves;
 * `ref`: policyRef, which tells models and generations of approvals apart.
 */
export interface FirmwarePolicy {
  readonly signer: Uint8Array
  readonly ref: Uint8Array
}

/** One approved firmware. `policy`: PolicyPCR over these PCRs of the SHA-256 bank with its values; `signature`: raw r‖s by the signer over `policy ‖ ref`. */
export interface Approval {
  readonly pcrs: readonly number[]
  readonly policy: Uint8Array
  readonly signature: Uint8Array
}

/** What is approved under one policy. Public: none of it is a secret, and the TPM checks every signature itself. */
export interface ApprovalSet extends FirmwarePolicy {
  readonly approvals: readonly Approval[]
}

/** The firmware that runs is not one that the keys may be used with. Nothing is wrong with TPM or keys. */
export class NotApproved extends Error {
  override readonly name: string = 'NotApproved'
}

/** The TPM refuses an approval of the firmware that runs: not signed by the key that may, or for another policyRef or other PCRs. `cause`: its TpmError. */
export class ApprovalRefused extends NotApproved {
  override readonly name = 'ApprovalRefused'
}

/** The authPolicy of a key under firmware. Throws TpmFormatError when the signer is no public area. */
export const authPolicyOf = ({ signer, ref }: FirmwarePolicy): Uint8Array => policyAuthorize(nameOf(signer), ref)

/** The same template under a policy alone: no password is a way around it. */
export const underPolicy = <T extends Public>(template: T, authPolicy: Uint8Array): T => ({
  ...template,
  attributes: template.attributes & ~attribute.userWithAuth,
  authPolicy,
})

/** PolicyPCR over these PCRs of the SHA-256 bank, from zero: what an approval approves. Throws TpmFormatError for a value that is missing or no SHA-256. */
export const firmwareDigest = (pcrs: readonly number[], values: ReadonlyMap<number, Uint8Array>): Uint8Array => {
  const ascending = [...new Set(pcrs)].toSorted((one, other) => one - other)
  const found = ascending.map((pcr) => {
    const value = values.get(pcr)
    if (value?.length !== 32) throw new TpmFormatError(`no SHA-256 value of PCR ${pcr}`)
    return value
  })
  return policyPcr(noPolicy, [{ hash: alg.sha256, pcrs: ascending }], found)
}

/** TPMT_PUBLIC of a P-256 key outside every TPM that signs with ECDSA and SHA-256, as TPM2_LoadExternal takes it. `x`, `y`: 32 bytes each. */
export const signerPublic = (x: Uint8Array, y: Uint8Array): Uint8Array => {
  const key: EccPublic = {
    type: alg.ecc,
    nameAlg: alg.sha256,
    attributes: attribute.sign | attribute.userWithAuth,
    authPolicy: empty,
    symmetric: null,
    scheme: { scheme: alg.ecdsa, hash: alg.sha256 },
    curve: curve.p256,
    x,
    y,
  }
  // Reading the point is what checks that it lies on the curve.
  keyObjectOf(key)
  return marshalPublic(key)
}
