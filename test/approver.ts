import { generateKeyPairSync, sign } from 'node:crypto'
import { firmwareDigest, signerPublic, type Approval, type ApprovalSet, type FirmwarePolicy } from '@fleetkey/tpm2/firmware.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import type { Tpm } from '@fleetkey/tpm2/tpm.ts'

/** PCRs that releases are measured into. */
export const firmwarePcrs = [0, 1, 2, 3, 4, 5, 7, 11]

/** A key that approves firmware, as the server's release key does, for tests below the server. */
export interface Approver {
  policy(ref?: Uint8Array): FirmwarePolicy
  approval(policy: Uint8Array, ref?: Uint8Array, pcrs?: readonly number[]): Approval
  /** Approves what the PCRs of this TPM are now. */
  running(tpm: Tpm, ref?: Uint8Array): Promise<ApprovalSet>
}

const first = new Uint8Array(32).fill(1)

export const approver = (): Approver => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const { x = '', y = '' } = publicKey.export({ format: 'jwk' })
  const signer = signerPublic(new Uint8Array(Buffer.from(x, 'base64url')), new Uint8Array(Buffer.from(y, 'base64url')))
  const policy = (ref: Uint8Array = first): FirmwarePolicy => ({ signer, ref })
  const approval = (digest: Uint8Array, ref: Uint8Array = first, pcrs: readonly number[] = firmwarePcrs): Approval => ({
    pcrs,
    policy: digest,
    signature: new Uint8Array(sign('sha256', Buffer.concat([digest, ref]), { key: privateKey, dsaEncoding: 'ieee-p1363' })),
  })
  return {
    policy,
    approval,
    async running(tpm, ref = first) {
      const values = await tpm.exclusive(async () => await tpm.pcrRead(alg.sha256, firmwarePcrs))
      return { ...policy(ref), approvals: [approval(firmwareDigest(firmwarePcrs, values), ref)] }
    },
  }
}
