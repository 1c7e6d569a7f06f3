import { createHash } from 'node:crypto'
import type { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { canReceive, isMeasured, type EnrolledDevice, type GroupPolicy } from '../fleet/device.ts'
import { isAssured, strictestPolicy } from '../fleet/policy.ts'
import type { Context } from './context.ts'
import { findAll, inChunks } from './rows.ts'

/** The policy that holds for a device: the strictest of its groups. */
export const policyOf = async (ctx: Context, device: DeviceId): Promise<GroupPolicy> => {
  const members = await findAll(ctx.store, 'member', { where: { device } })
  const groups = await Promise.all(members.map(({ group }) => ctx.store.get('group', group)))
  return strictestPolicy(groups.flatMap((group) => (group === undefined ? [] : [group.policy])))
}

/** Keys that a device may have held: those granted to its groups. What its loss exposes (blast radius). */
export const keysOf = async (ctx: Context, device: DeviceId): Promise<readonly KeyId[]> => {
  const members = await findAll(ctx.store, 'member', { where: { device } })
  const grants = await Promise.all(members.map(({ group }) => findAll(ctx.store, 'grant', { where: { group } })))
  return [...new Set(grants.flat().map(({ key }) => key))].toSorted()
}

/**
 * Keys that a device is entitled to now: it is enrolled, has a key to wrap them to, its assurance is what the group demands, and a key that is to be in a TPM has one to go to. A
 * quarantined one is entitled to nothing.
 */
export const entitledKeys = async (ctx: Context, device: EnrolledDevice): Promise<readonly KeyId[]> => {
  if (!canReceive(device.keys)) return []
  const members = await findAll(ctx.store, 'member', { where: { device: device.id } })
  const groups = await Promise.all(members.map(({ group }) => ctx.store.get('group', group)))
  const open = groups.filter((group) => group !== undefined && isAssured(device.assurance, group.policy.assurance))
  const grants = await Promise.all(open.map((group) => findAll(ctx.store, 'grant', { where: { group: group?.id ?? '' } })))
  const granted = [...new Set(grants.flat().map(({ key }) => key))].toSorted()
  if (isMeasured(device)) return granted
  const keys = await Promise.all(granted.map((key) => ctx.store.get('key', key)))
  return granted.filter((_key, at) => keys[at]?.protection !== 'tpm')
}

/** Enrolled members of the groups that the key is granted to and that can hold it, in an order that nobody chose (by hash): waves are fair samples. */
export const entitledDevices = async (ctx: Context, key: KeyId, salt = ''): Promise<readonly DeviceId[]> => {
  const [row, grants] = await Promise.all([ctx.store.get('key', key), findAll(ctx.store, 'grant', { where: { key } })])
  const members = await Promise.all(grants.map(async ({ group }) => await assuredMembers(ctx, group, row?.protection === 'tpm')))
  const place = (id: string): string => createHash('sha256').update(`${salt}/${id}`).digest('hex')
  return [...new Set(members.flat())]
    .map((id) => ({ id, at: place(id) }))
    .toSorted((one, other) => (one.at < other.at ? -1 : 1))
    .map(({ id }) => id)
}

/** Enrolled members of a group whose assurance is what the group demands; only those with a TPM when that is needed. */
const assuredMembers = async (ctx: Context, id: GroupId, needsTpm: boolean): Promise<readonly DeviceId[]> => {
  const [group, members] = await Promise.all([ctx.store.get('group', id), findAll(ctx.store, 'member', { where: { group: id } })])
  if (group === undefined) return []
  const entitled = await inChunks(members, 500, async ({ device }) => {
    const row = await ctx.store.get('device', device)
    return row?.state === 'enrolled' && canReceive(row.keys) && isAssured(row.assurance, group.policy.assurance) && (!needsTpm || isMeasured(row))
      ? [device]
      : []
  })
  return entitled.flat()
}
