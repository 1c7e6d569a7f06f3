import type { PcrSelection } from '@fleetkey/protocol/messages.ts'
import { isUnmeasured } from '../attestation/appraise.ts'
import { recordedState } from '../attestation/claims.ts'
import { imaPcrs, progressAfter, fromBoot, type ImaProgress } from '../attestation/ima.ts'
import type { GroupPolicy, IdentifiedDevice } from '../fleet/device.ts'
import { isOutdated } from '../fleet/firmware.ts'
import { firmwareOf } from './approvals.ts'
import type { Context } from './context.ts'
import { selection } from './selection.ts'

/** PCRs that reference values speak of. */
export const appraised: readonly number[] = selection.flatMap(({ pcrs }) => pcrs)

/** The same with everything that a measurement list is held against. */
export const imaSelection: PcrSelection = selection.map((bank) => ({ ...bank, pcrs: [...new Set([...bank.pcrs, ...imaPcrs])].toSorted((a, b) => a - b) }))

/**
 * Where the measurement list of a device goes on: where the last accepted evidence of this boot ended, else at its beginning. A record that knows nothing (evidence
 * that did not verify) has everything asked for again.
 */
export const progressOf = ({ verdict, resetCount, reportedResetCount }: IdentifiedDevice): ImaProgress => {
  const last = recordedState(verdict.claims)
  return last === undefined || last.resetCount !== resetCount || resetCount !== reportedResetCount ? fromBoot : progressAfter(last)
}

/** Whether policy wants a measurement list that the device's verdict does not rest on. One that is quarantined is asked as every quarantined device is. */
export const lacksList = ({ state, verdict }: IdentifiedDevice, policy: GroupPolicy): boolean =>
  state === 'enrolled' && isUnmeasured(recordedState(verdict.claims)?.ima, verdict.release, policy)

/** What makes attestation due besides its age: a recipient key that is not under the firmware policy of now, a measurement list that is wanted and not there. */
export const duePolicy = async (ctx: Context, device: IdentifiedDevice, policy: GroupPolicy) => ({
  attestAge: policy.attestAge,
  outdated: isOutdated(device, (await firmwareOf(ctx, device.model)).authPolicy),
  unmeasured: lacksList(device, policy),
})
