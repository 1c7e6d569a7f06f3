import type { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Proof } from '../keys/exposure.ts'
import type { Holding, KeyEpoch, KeyState } from '../keys/key.ts'
import { covers, tenuresOf, type Window } from '../keys/span.ts'
import type { Context } from './context.ts'
import type { Page } from './readers.ts'
import { needDevice } from './revoke.ts'
import { findAll } from './rows.ts'

/** One epoch that a device had at a moment. */
export interface Held {
  readonly key: KeyId
  readonly epoch: Epoch
  /** What was proven of it by then. */
  readonly proof: Proof
  /** State of the epoch itself at that moment. */
  readonly state: KeyState
  readonly heldFrom: number
  readonly heldUntil: number | null
}

export interface HeldAt {
  readonly device: DeviceId
  readonly at: number
  readonly items: readonly Held[]
  readonly next: string | null
  /** Groups that it was in, and keys that were granted to them. */
  readonly groups: readonly GroupId[]
  readonly granted: readonly KeyId[]
}

const before = (moment: number | null, at: number): boolean => moment !== null && moment <= at

/** State of an epoch at a moment, from the times of its transitions. */
export const stateAt = (epoch: KeyEpoch, at: number): KeyState => {
  if (before(epoch.destroyedAt, at)) return 'destroyed'
  if (before(epoch.deactivatedAt, at)) return 'deactivated'
  return before(epoch.activatedAt, at) ? 'active' : 'pre-activation'
}

/** What was proven within one tenure, by a moment. An earlier tenure is over, and only that it was is kept. */
const proofAt = (holding: Holding, tenure: Window, at: number): Proof => {
  if (tenure.from !== holding.deliveredAt) return 'delivered'
  return before(holding.activeAt, at) ? 'active' : before(holding.installedAt, at) ? 'installed' : 'delivered'
}

/** What a device held at a moment: what it was sent by then and had not stated to have erased; and what its groups entitled it to. Throws Problem('not-found'). */
export const heldAt = async (ctx: Context, device: DeviceId, at: number, page: Page): Promise<HeldAt> => {
  await needDevice(ctx, device)
  const { limit, after } = page
  const [rows, groupSpans] = await Promise.all([
    ctx.store.find('holding', { where: { device }, limit: limit + 1, ...(after === undefined ? {} : { after }) }),
    findAll(ctx.store, 'span', { where: { by: `device/${device}` } }),
  ])
  const shown = rows.slice(0, limit)
  const items = await Promise.all(
    shown.map(async (holding): Promise<Held[]> => {
      const tenure = tenuresOf(holding).find((one) => covers(one, at))
      const epoch = tenure === undefined ? undefined : await ctx.store.get('epoch', `${holding.key}/${holding.epoch}`)
      if (tenure === undefined || epoch === undefined) return []
      const { key } = holding
      return [{ key, epoch: holding.epoch, proof: proofAt(holding, tenure, at), state: stateAt(epoch, at), heldFrom: tenure.from, heldUntil: tenure.until }]
    }),
  )
  const groups = [...new Set(groupSpans.filter((span) => covers(span, at)).map(({ of }) => of.slice('group/'.length) as GroupId))].toSorted()
  const grants = await Promise.all(groups.map(async (group) => await findAll(ctx.store, 'span', { where: { by: `group/${group}` } })))
  const granted = [
    ...new Set(
      grants
        .flat()
        .filter((span) => covers(span, at))
        .map(({ of }) => of.slice('key/'.length) as KeyId),
    ),
  ].toSorted()
  return { device, at, items: items.flat(), next: rows.length > limit ? (shown.at(-1)?.id ?? null) : null, groups, granted }
}
