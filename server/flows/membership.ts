import { createHash } from 'node:crypto'
import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { GroupPolicy } from '../fleet/device.ts'
import { strictestPolicy } from '../fleet/policy.ts'
import type { Context } from './context.ts'
import { findAll, inChunks } from './rows.ts'

/** The policy that holds for a device: the strictest of its groups. */
export const policyOf = async (ctx: Context, device: DeviceId): Promise<GroupPolicy> => {
  const members = await findAll(ctx.store, 'member', { where: { device } })
  const groups = await Promise.all(members.map(({ group }) => ctx.store.get('group', group)))
  return strictestPolicy(groups.flatMap((group) => (group === undefined ? [] : [group.policy])))
}

/** Keys that a device may hold: those granted to its groups. What its loss exposes (blast radius). */
export const keysOf = async (ctx: Context, device: DeviceId): Promise<readonly KeyId[]> => {
  const members = await findAll(ctx.store, 'member', { where: { device } })
  const grants = await Promise.all(members.map(({ group }) => findAll(ctx.store, 'grant', { where: { group } })))
  return [...new Set(grants.flat().map(({ key }) => key))].toSorted()
}

/** Enrolled members of the groups that the key is granted to, in an order that nobody chose (by hash): waves are fair samples. */
export const entitledDevices = async (ctx: Context, key: KeyId, salt = ''): Promise<readonly DeviceId[]> => {
  const grants = await findAll(ctx.store, 'grant', { where: { key } })
  const members = await Promise.all(grants.map(({ group }) => findAll(ctx.store, 'member', { where: { group } })))
  const devices = [...new Set(members.flat().map(({ device }) => device))]
  const enrolled = await inChunks(devices, 500, async (id) => ((await ctx.store.get('device', id))?.state === 'enrolled' ? [id] : []))
  const place = (id: string): string => createHash('sha256').update(`${salt}/${id}`).digest('hex')
  return enrolled
    .flat()
    .map((id) => ({ id, at: place(id) }))
    .toSorted((one, other) => (one.at < other.at ? -1 : 1))
    .map(({ id }) => id)
}
