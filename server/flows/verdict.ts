import { appraise, appraiseUnmeasured, isUnmeasured, type AppraisalPolicy } from '../attestation/appraise.ts'
import { recordedState, recordOf, type Claims, type StateClaims } from '../attestation/claims.ts'
import type { TpmRecord } from '../attestation/continuity.ts'
import type { Discontinuity } from '../attestation/reattest.ts'
import { hasIdentity, type Device, type GroupPolicy, type IdentifiedDevice, type MeasuredDevice, type Release, type VerdictRecord } from '../fleet/device.ts'
import type { Context } from './context.ts'
import { policyOf } from './membership.ts'
import { findAll } from './rows.ts'

/** A verdict as it is kept, and the number of the release that matched. */
export interface Judgement {
  readonly verdict: VerdictRecord
  readonly number: number | null
}

/** The appraisal policy for one device: its groups' strictest, and what it ran before. */
export const appraisalOf = (device: Device, policy: GroupPolicy): AppraisalPolicy => ({ ...policy, floor: hasIdentity(device) ? device.floor : 0 })

/** Appraises the proven state of a device. */
export const judgementOf = (
  device: Device,
  state: StateClaims,
  of: { readonly releases: readonly Release[]; readonly policy: GroupPolicy; readonly at: number },
): Judgement => {
  const { verdict, reason, detail, release, number } = appraise(state, device.model, of.releases, appraisalOf(device, of.policy))
  return { verdict: { verdict, reason, detail, release, at: of.at, claims: recordOf(state) }, number }
}

/** The same for a device that nothing measures. `claims`: what it has proven of itself. */
export const unmeasuredJudgement = (of: { readonly policy: GroupPolicy; readonly at: number; readonly claims: VerdictRecord['claims'] }): Judgement => {
  const { verdict, reason, detail, release, number } = appraiseUnmeasured(of.policy)
  return { verdict: { verdict, reason, detail, release, at: of.at, claims: of.claims }, number }
}

/** Firmware may be as it should be on a TPM that is not what it was. What the firmware is already refused for comes first. */
export const withContinuity = (judgement: Judgement, discontinuity: Discontinuity | undefined): Judgement =>
  discontinuity === undefined || judgement.verdict.verdict === 'contraindicated'
    ? judgement
    : { ...judgement, verdict: { ...judgement.verdict, ...discontinuity } }

/** The same with releases and policy as the store has them. */
export const judge = async (ctx: Context, device: Device, state: StateClaims): Promise<Judgement> => {
  const [releases, policy] = await Promise.all([findAll(ctx.store, 'release', { where: { model: device.model } }), policyOf(ctx, device.id)])
  return withList(device, state, policy, judgementOf(device, state, { releases, policy, at: ctx.now() }))
}

/**
 * What a device was quarantined for may stand on its measurement list: evidence without it (an enrolment has none) does not bring it back. For an enrolled device
 * the list is due instead, and its keys wait for it.
 */
const withList = (device: Device, state: StateClaims, policy: GroupPolicy, judgement: Judgement): Judgement =>
  device.state === 'quarantined' && judgement.verdict.verdict !== 'contraindicated' && isUnmeasured(state.ima, judgement.verdict.release, policy)
    ? {
        ...judgement,
        verdict: { ...judgement.verdict, verdict: 'contraindicated', reason: 'ima.awaited', detail: 'its list of measured files is not proven yet' },
      }
    : judgement

/** The judgement on what a device has proven in its enrolment. */
export const judgeClaims = async (ctx: Context, device: Device, claims: Claims): Promise<Judgement> =>
  claims.method === 'tpm2'
    ? await judge(ctx, device, claims)
    : unmeasuredJudgement({ policy: await policyOf(ctx, device.id), at: ctx.now(), claims: claims.facts })

/** What an accepted verdict leaves on the record: the release, and a floor that only rises. */
export const acceptedWith = (floor: number, { verdict, number }: Judgement): Pick<IdentifiedDevice, 'release' | 'floor' | 'verdict' | 'attestOrderedAt'> => ({
  release: verdict.release,
  floor: Math.max(floor, number ?? 0),
  verdict,
  attestOrderedAt: null,
})

/** What the record of a device says of its TPM. What its last quote said counts only for the boot that is recorded: a later one may not have verified. */
export const tpmRecordOf = ({ keys, resetCount, verdict }: MeasuredDevice): TpmRecord => {
  const last = recordedState(verdict.claims)
  const quoted = last?.resetCount === resetCount ? last : null
  return { srk: keys.srk, resetCount, release: quoted === null ? null : verdict.release, quoted }
}
