import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { hasIdentity, type Device } from '../fleet/device.ts'
import { passing, type Context } from './context.ts'
import { entitledPages } from './membership.ts'

/** A device that the end of the old epoch may find without a newer one, and why. */
export interface Cut {
  readonly device: DeviceId
  readonly because: 'away' | 'behind'
  readonly lastSeenAt: number | null
}

/**
 * Devices that a rotation of this key could cut off if it ended the old epoch without them, as things stand: those that are not connected now, and those that have not
 * proven the epoch in use. How many in all, and one page of them by id. Costs the devices entitled to the key, a page of them at a time: each counts as it stood when its
 * page was read.
 */
export const mayBeCut = async (
  ctx: Context,
  id: KeyId,
  page: { readonly limit: number; readonly after?: string | undefined },
): Promise<{ readonly devices: number; readonly count: number; readonly items: readonly Cut[]; readonly next: string | null }> => {
  const key = await ctx.store.get('key', id)
  if (key === undefined) throw new Problem('not-found', `no key ${id}`)
  const items: Cut[] = []
  let [all, count, more] = [0, 0, false]
  for await (const devices of entitledPages(ctx, id)) {
    all += devices.length
    for (const device of devices) {
      const because = await whyCut(ctx, device, `${id}/${key.current}`)
      if (because === undefined) continue
      count++
      if (page.after !== undefined && device <= page.after) continue
      if (items.length === page.limit) more = true
      else items.push({ device, because, lastSeenAt: lastSeen(await ctx.store.get('device', device)) })
    }
  }
  return { devices: all, count, items, next: more ? (items.at(-1)?.device ?? null) : null }
}

const whyCut = async (ctx: Context, device: DeviceId, epoch: string): Promise<Cut['because'] | undefined> => {
  const holding = await ctx.store.get('holding', `${device}/${epoch}`, passing)
  if (holding?.stage !== 'active') return 'behind'
  return ctx.bus.online(device) ? undefined : 'away'
}

const lastSeen = (device: Device | undefined): number | null => (hasIdentity(device) ? device.lastSeenAt : null)
