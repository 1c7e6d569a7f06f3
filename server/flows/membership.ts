import { createHash } from 'node:crypto'
import type { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { canReceive, isMeasured, type EnrolledDevice, type Group, type GroupPolicy, type Member } from '../fleet/device.ts'
import { isAssured, strictestPolicy, wholePolicy } from '../fleet/policy.ts'
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

/** A key that a device may have, from this epoch on: nothing from before it joined, unless that was granted. */
export interface Entitlement {
  readonly key: KeyId
  readonly from: number
}

/** Groups whose keys a device may have now: it has a key to wrap them to, and its assurance is what the group demands. */
export const entitledGroups = async (ctx: Context, device: EnrolledDevice): Promise<readonly { readonly group: Group; readonly member: Member }[]> => {
  if (!canReceive(device.keys)) return []
  const members = await findAll(ctx.store, 'member', { where: { device: device.id } })
  const groups = await Promise.all(members.map(async (member) => ({ member, group: await ctx.store.get('group', member.group) })))
  return groups.flatMap(({ member, group }) => (group !== undefined && isAssured(device.assurance, group.policy.assurance) ? [{ member, group }] : []))
}

/**
 * Keys that a device is entitled to now: it is enrolled, has a key to wrap them to, its assurance is what the group demands, and a key that is to be in a TPM has one to go to. A
 * quarantined one is entitled to nothing. Of several groups the one that gives most decides from which epoch on.
 */
export const entitlementsOf = async (ctx: Context, device: EnrolledDevice): Promise<readonly Entitlement[]> => {
  const granted = await Promise.all(
    (await entitledGroups(ctx, device)).map(async ({ group, member }) =>
      (await findAll(ctx.store, 'grant', { where: { group: group.id } })).map(({ key, from = 0 }): Entitlement => ({
        key,
        from: wholePolicy(group.policy).history ? 0 : Math.max(member.from?.[key] ?? 0, from),
      })),
    ),
  )
  const lowest = new Map<KeyId, number>()
  for (const { key, from } of granted.flat()) lowest.set(key, Math.min(from, lowest.get(key) ?? from))
  const all = [...lowest].map(([key, from]) => ({ key, from })).toSorted((one, other) => (one.key < other.key ? -1 : 1))
  if (isMeasured(device)) return all
  const keys = await Promise.all(all.map(async ({ key }) => await ctx.store.get('key', key)))
  return all.filter((_one, at) => keys[at]?.protection !== 'tpm')
}

/** Enrolled members of the groups that the key is granted to and that can hold it, in an order that nobody chose (by hash): waves are fair samples. */
export const entitledDevices = async (ctx: Context, key: KeyId, salt = ''): Promise<readonly DeviceId[]> => {
  const [row, grants] = await Promise.all([ctx.store.get('key', key), findAll(ctx.store, 'grant', { where: { key } })])
  const members = await Promise.all(grants.map(async ({ group }) => (await entitledMembers(ctx, group, row?.protection === 'tpm')).map(({ device }) => device)))
  const place = (id: string): string => createHash('sha256').update(`${salt}/${id}`).digest('hex')
  return [...new Set(members.flat())]
    .map((id) => ({ id, at: place(id) }))
    .toSorted((one, other) => (one.at < other.at ? -1 : 1))
    .map(({ id }) => id)
}

/** Enrolled members of a group whose assurance is what the group demands; only those with a TPM when that is needed. */
export const entitledMembers = async (ctx: Context, id: GroupId, needsTpm = false): Promise<readonly Member[]> => {
  const [group, members] = await Promise.all([ctx.store.get('group', id), findAll(ctx.store, 'member', { where: { group: id } })])
  if (group === undefined) return []
  const entitled = await inChunks(members, 500, async (member) => {
    const row = await ctx.store.get('device', member.device)
    return row?.state === 'enrolled' && canReceive(row.keys) && isAssured(row.assurance, group.policy.assurance) && (!needsTpm || isMeasured(row))
      ? [member]
      : []
  })
  return entitled.flat()
}
