import { marshalSignature } from './attest.ts'
import { sameBytes } from './bytes.ts'
import { alg, sessionType } from './constants.ts'
import { isOfParameter, rc, TpmError } from './errors.ts'
import { ApprovalRefused, authPolicyOf, firmwareDigest, NotApproved, type Approval, type ApprovalSet } from './firmware.ts'
import { nameOf } from './names.ts'
import { approvalDigest } from './policies.ts'
import type { Session } from './session.ts'
import type { LoadedKey, Tpm } from './tpm.ts'

/** What was found to hold for one authPolicy in this boot. */
interface Chosen {
  readonly set: ApprovalSet
  readonly approval: Approval
  /** TPMT_TK_VERIFIED: this TPM has verified the approval's signature. */
  readonly ticket: Uint8Array
}

interface PolicySessionOptions {
  readonly tpm: Tpm
  /** Everything that is approved, as known now. */
  readonly sets: () => readonly ApprovalSet[]
  /** The endorsement key, loaded: it salts the session. */
  readonly salter: () => Promise<LoadedKey>
  /** Loads an object in a slot that is kept account of. */
  readonly load: (name: string, load: () => Promise<LoadedKey>) => Promise<LoadedKey>
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')

/** PolicyPCR was not what the approval says, PCRs changed in between, or a ticket is of before a TPM2_Clear: what was chosen no longer holds. */
const isStale = (error: unknown): boolean => error instanceof TpmError && (error.code === rc.pcrChanged || error.is(rc.policyFail) || error.is(rc.value))

/** Runs a command that shows the TPM an approval; what it refuses is the approval. */
const approving = async <R>(work: () => Promise<R>): Promise<R> => {
  try {
    return await work()
  } catch (cause) {
    throw isOfParameter(cause) ? new ApprovalRefused(`the TPM refuses the approval of the firmware that runs: ${cause.message}`, { cause }) : cause
  }
}

/**
 * Satisfies PolicyAuthorize for keys under firmware. One policy session, salted to the endorsement key, serves every use: it begins anew after each command, so
 * that a use costs PolicyPCR, PolicyAuthorize and the command itself. The signature of an approval is verified once; its ticket is good until the owner
 * hierarchy is cleared. Not for concurrent use: within `tpm.exclusive` only.
 */
export class PolicySessions {
  readonly #of: PolicySessionOptions
  readonly #chosen = new Map<string, Chosen>()
  #session: Session | undefined

  constructor(of: PolicySessionOptions) {
    this.#of = of
  }

  /**
   * Runs `use` with a session in which this authPolicy is satisfied, for one command. Throws NotApproved when the running firmware is not approved under it, ApprovalRefused
   * when its approval is none. When
   * something changed between choosing and using, it is chosen once more; what `use` did before its command is done twice then.
   */
  async under<R>(authPolicy: Uint8Array, use: (session: Session) => Promise<R>): Promise<R> {
    try {
      return await this.#attempt(authPolicy, use)
    } catch (error) {
      // A refused command leaves the session in the TPM, in whatever state.
      await this.close()
      if (!isStale(error)) throw error
      this.#chosen.delete(hex(authPolicy))
    }
    try {
      return await this.#attempt(authPolicy, use)
    } catch (error) {
      await this.close()
      throw error
    }
  }

  async #attempt<R>(authPolicy: Uint8Array, use: (session: Session) => Promise<R>): Promise<R> {
    const { tpm } = this.#of
    const { set, approval, ticket } = this.#chosen.get(hex(authPolicy)) ?? (await this.#choose(authPolicy))
    this.#session ??= await tpm.startSession(sessionType.policy, await this.#of.salter())
    await tpm.policyPcr(this.#session, [{ hash: alg.sha256, pcrs: approval.pcrs }])
    await tpm.policyAuthorize(this.#session, { approved: approval.policy, ref: set.ref, signer: nameOf(set.signer), ticket })
    return await use(this.#session)
  }

  /** The approval of what the PCRs are now, verified by this TPM. */
  async #choose(authPolicy: Uint8Array): Promise<Chosen> {
    const { tpm, sets, load } = this.#of
    const set = sets().find((one) => sameBytes(authPolicyOf(one), authPolicy))
    if (set === undefined) throw new NotApproved('no approved firmware is known for these keys')
    const pcrs = [...new Set(set.approvals.flatMap((one) => one.pcrs))]
    const values = await tpm.pcrRead(alg.sha256, pcrs)
    const approval = set.approvals.find((one) => sameBytes(firmwareDigest(one.pcrs, values), one.policy))
    if (approval === undefined) throw new NotApproved('the running firmware is not approved for these keys')
    const signer = await load(`signer/${hex(nameOf(set.signer))}`, async () => await tpm.loadExternal(set.signer))
    const signature = marshalSignature({ scheme: alg.ecdsa, hash: alg.sha256, r: approval.signature.subarray(0, 32), s: approval.signature.subarray(32) })
    const ticket = await approving(async () => await tpm.verifySignature(signer, approvalDigest(approval.policy, set.ref), signature))
    const chosen: Chosen = { set, approval, ticket }
    this.#chosen.set(hex(authPolicy), chosen)
    return chosen
  }

  /** The TPM has forgotten its sessions. Tickets outlive that, PCR values do not. */
  forget(): void {
    this.#session = undefined
    this.#chosen.clear()
  }

  /** Flushes the session. */
  async close(): Promise<void> {
    const open = this.#session
    this.#session = undefined
    if (open === undefined) return
    try {
      await this.#of.tpm.flush(open.handle)
    } catch (error) {
      // Cleaning up must not hide why there was something to clean.
      if (!(error instanceof TpmError)) throw error
    }
  }
}
