import { GroupId, type DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { Group, GroupPolicy } from '../fleet/device.ts'
import { defaultPolicy } from '../fleet/policy.ts'
import type { Context } from './context.ts'
import { convergeDevice } from './converge.ts'
import { owe, settle } from './owed-rotation.ts'
import { perform } from './perform.ts'
import { findAll, inChunks } from './rows.ts'

const needGroup = async (ctx: Context, id: GroupId): Promise<Group> => {
  const group = await ctx.store.get('group', id)
  if (group === undefined) throw new Problem('not-found', `no group ${id}`)
  return group
}

/** A new, empty group with the default policy. */
export const createGroup = async (ctx: Context, caller: Caller, id: GroupId): Promise<void> => {
  await perform(ctx, { caller, action: 'group.create', subject: id }, async (tx) => {
    if ((await ctx.store.get('group', id)) !== undefined) throw new Problem('conflict', `group ${id} exists`)
    tx.insert('group', { id: GroupId.parse(id), createdAt: ctx.now(), policy: defaultPolicy })
  })
  ctx.step('group.create')
}

/** Changes the named parts of a group's policy; the whole policy afterwards. */
export const setGroupPolicy = async (ctx: Context, caller: Caller, id: GroupId, change: Partial<GroupPolicy>): Promise<GroupPolicy> => {
  const policy = await perform(ctx, { caller, action: 'group.policy', subject: id }, async (tx) => {
    const group = await needGroup(ctx, id)
    const policy: GroupPolicy = {
      connectionProof: change.connectionProof ?? group.policy.connectionProof,
      rotateOnLeave: change.rotateOnLeave ?? group.policy.rotateOnLeave,
    }
    tx.update('group', { ...group, policy })
    tx.note(JSON.stringify(policy))
    return policy
  })
  ctx.step('group.policy')
  return policy
}

const devicesOf = async (ctx: Context, wanted: Wanted): Promise<readonly DeviceId[]> => {
  if (wanted.batch !== undefined && (await ctx.store.get('batch', wanted.batch)) === undefined) throw new Problem('not-found', `no batch ${wanted.batch}`)
  const ofBatch =
    wanted.batch === undefined ? [] : (await findAll(ctx.store, 'device', { where: { batch: wanted.batch } })).filter(({ state }) => state !== 'revoked')
  return [...new Set([...(wanted.devices ?? []), ...ofBatch.map(({ id }) => id)])]
}

/** Devices by name, or every device of a batch that is not revoked. */
export interface Wanted {
  readonly devices?: readonly DeviceId[] | undefined
  readonly batch?: string | undefined
}

/** Adds devices to a group, all or none. Members that are online get the group's keys at once, the others when they next connect. */
export const addMembers = async (ctx: Context, caller: Caller, id: GroupId, wanted: Wanted): Promise<{ added: number; already: number }> => {
  const { joined, already } = await perform(ctx, { caller, action: 'group.change', subject: id }, async (tx) => {
    await needGroup(ctx, id)
    const devices = await devicesOf(ctx, wanted)
    const joined: DeviceId[] = []
    await inChunks(devices, 200, async (device) => {
      const [row, member] = await Promise.all([ctx.store.get('device', device), ctx.store.get('member', `${id}/${device}`)])
      if (row === undefined) throw new Problem('not-found', `no device ${device}`)
      if (row.state === 'revoked') throw new Problem('conflict', `device ${device} is revoked`)
      if (member === undefined) joined.push(device)
    })
    for (const device of joined) tx.insert('member', { id: `${id}/${device}`, group: id, device, joinedAt: ctx.now() })
    tx.note(`${joined.length} added: ${joined.slice(0, 20).join(', ')}${joined.length > 20 ? ', …' : ''}`)
    return { joined, already: devices.length - joined.length }
  })
  // A crash here: the members have no keys of the group yet; their next report fetches them.
  ctx.step('group.add')
  await inChunks(
    joined.filter((device) => ctx.bus.online(device)),
    16,
    (device) => convergeDevice(ctx, device),
  )
  return { added: joined.length, already }
}

/** Takes a device out of a group. When the group's policy says so its keys are rotated, so that the device cannot read on. */
export const removeMember = async (ctx: Context, caller: Caller, id: GroupId, device: DeviceId): Promise<{ campaigns: readonly string[] }> => {
  const owed = await perform(ctx, { caller, action: 'group.change', subject: id }, async (tx) => {
    const group = await needGroup(ctx, id)
    const member = await ctx.store.get('member', `${id}/${device}`)
    if (member === undefined) throw new Problem('not-found', `${device} is not in group ${id}`)
    tx.remove('member', member)
    tx.note(`${device} removed`)
    if (!group.policy.rotateOnLeave) return undefined
    const granted = (await findAll(ctx.store, 'grant', { where: { group: id } })).map(({ key }) => key)
    const others = await keysThroughOthers(ctx, id, device)
    const keys = granted.filter((key) => !others.has(key))
    if (keys.length === 0) return undefined
    const name = `leave/${id}/${device}/${ctx.now()}`
    owe(tx, name, { keys, because: `${device} left group ${id}`, kick: null })
    return name
  })
  // A crash here: the marker stands in the store, the start-up sweep rotates.
  ctx.step('group.remove')
  const campaigns = owed === undefined ? [] : await settle(ctx, owed)
  if (ctx.bus.online(device)) await convergeDevice(ctx, device)
  return { campaigns }
}

/** Keys that the device still holds rightly through another group: its leaving this one exposes nothing of them. */
const keysThroughOthers = async (ctx: Context, id: GroupId, device: DeviceId): Promise<ReadonlySet<string>> => {
  const members = (await findAll(ctx.store, 'member', { where: { device } })).filter(({ group }) => group !== id)
  const grants = await Promise.all(members.map(({ group }) => findAll(ctx.store, 'grant', { where: { group } })))
  return new Set(grants.flat().map(({ key }) => key))
}
