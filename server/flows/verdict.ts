import { appraise, type AppraisalPolicy, type AttestationResult } from '../attestation/appraise.ts'
import { recordOf, type StateClaims } from '../attestation/claims.ts'
import type { Discontinuity } from '../attestation/reattest.ts'
import { hasIdentity, type Device, type GroupPolicy, type IdentifiedDevice, type Release, type VerdictRecord } from '../fleet/device.ts'
import type { Context } from './context.ts'
import { policyOf } from './membership.ts'
import { findAll } from './rows.ts'

/** A verdict as it is kept, and the number of the release that matched. */
export interface Judgement {
  readonly verdict: VerdictRecord
  readonly number: number | null
}

const order = ['affirming', 'warning', 'contraindicated'] as const

/** The appraisal policy for one device: its groups' strictest, and what it ran before. */
export const appraisalOf = (device: Device, policy: GroupPolicy): AppraisalPolicy => ({ ...policy, floor: hasIdentity(device) ? device.floor : 0 })

/** Appraises the proven state of a device; `discontinuity` counts when it is graver than what the firmware is. */
export const judgementOf = (
  device: Device,
  state: StateClaims,
  of: { readonly releases: readonly Release[]; readonly policy: GroupPolicy; readonly at: number; readonly discontinuity?: Discontinuity | undefined },
): Judgement => {
  const result: AttestationResult = appraise(state, device.model, of.releases, appraisalOf(device, of.policy))
  const { discontinuity } = of
  const worse = discontinuity !== undefined && order.indexOf(discontinuity.verdict) > order.indexOf(result.verdict) ? discontinuity : result
  const { verdict, reason, detail } = worse
  return { verdict: { verdict, reason, detail, release: result.release, at: of.at, claims: recordOf(state) }, number: result.number }
}

/** The same with releases and policy as the store has them. */
export const judge = async (ctx: Context, device: Device, state: StateClaims, discontinuity?: Discontinuity): Promise<Judgement> => {
  const [releases, policy] = await Promise.all([findAll(ctx.store, 'release', { where: { model: device.model } }), policyOf(ctx, device.id)])
  return judgementOf(device, state, { releases, policy, at: ctx.now(), discontinuity })
}

/** What an accepted verdict leaves on the record: the release, and a floor that only rises. */
export const acceptedWith = (floor: number, { verdict, number }: Judgement): Pick<IdentifiedDevice, 'release' | 'floor' | 'verdict' | 'attestOrderedAt'> => ({
  release: verdict.release,
  floor: Math.max(floor, number ?? 0),
  verdict,
  attestOrderedAt: null,
})
