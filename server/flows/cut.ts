import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { hasIdentity } from '../fleet/device.ts'
import type { Context } from './context.ts'
import { entitledDevices } from './membership.ts'
import { inChunks } from './rows.ts'

/** A device that the end of the old epoch may find without a newer one, and why. */
export interface Cut {
  readonly device: DeviceId
  readonly because: 'away' | 'behind'
  readonly lastSeenAt: number | null
}

/**
 * Devices that a rotation of this key could cut off if it ended the old epoch without them, as things stand: those that are not connected now, and those that have not
 * proven the epoch in use. How many in all, and one page of them by id. Costs the devices entitled to the key.
 */
export const mayBeCut = async (
  ctx: Context,
  id: KeyId,
  page: { readonly limit: number; readonly after?: string | undefined },
): Promise<{ readonly devices: number; readonly count: number; readonly items: readonly Cut[]; readonly next: string | null }> => {
  const key = await ctx.store.get('key', id)
  if (key === undefined) throw new Problem('not-found', `no key ${id}`)
  const devices = (await entitledDevices(ctx, id)).toSorted()
  const found = (
    await inChunks(devices, 500, async (device): Promise<readonly Omit<Cut, 'lastSeenAt'>[]> => {
      const holding = await ctx.store.get('holding', `${device}/${id}/${key.current}`)
      if (holding?.stage !== 'active') return [{ device, because: 'behind' }]
      return ctx.bus.online(device) ? [] : [{ device, because: 'away' }]
    })
  ).flat()
  const rest = page.after === undefined ? found : found.filter(({ device }) => device > (page.after ?? ''))
  const shown = rest.slice(0, page.limit)
  const items = await Promise.all(
    shown.map(async (one): Promise<Cut> => {
      const row = await ctx.store.get('device', one.device)
      return { ...one, lastSeenAt: hasIdentity(row) ? row.lastSeenAt : null }
    }),
  )
  return { devices: devices.length, count: found.length, items, next: rest.length > shown.length && shown.length > 0 ? (shown.at(-1)?.device ?? null) : null }
}
