import { GroupId, type DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { defaultDelivery, type GroupDelivery } from '../keys/broadcast.ts'
import { hasIdentity, type Group, type GroupPolicy } from '../fleet/device.ts'
import { defaultPolicy, wholePolicy } from '../fleet/policy.ts'
import type { ManagedKey } from '../keys/key.ts'
import { deliveryPolicyOf, notByBroadcast, touchSeats } from './broadcast.ts'
import type { Context } from './context.ts'
import { convergeDevice, convergeMembers } from './converge.ts'
import { hex } from './message.ts'
import { owe, settle } from './owed-rotation.ts'
import { perform } from './perform.ts'
import { dropTargets } from './quarantine.ts'
import { oweAppraisal, preview, reappraise, settleAppraisal, type Impact } from './reappraise.ts'
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

/** A change of some parts of a policy, and of how keys reach the members. */
export type PolicyChange = { readonly [P in keyof GroupPolicy]?: GroupPolicy[P] | undefined } & {
  readonly [P in keyof GroupDelivery]?: GroupDelivery[P] | undefined
}

const isDelivery = (field: string): field is keyof GroupDelivery => Object.hasOwn(defaultDelivery, field)

const changed = async (ctx: Context, before: GroupPolicy, change: PolicyChange): Promise<GroupPolicy> => {
  const given = Object.fromEntries(Object.entries(change).filter(([field, value]) => value !== undefined && !isDelivery(field))) as Partial<GroupPolicy>
  // A misspelt release would quarantine everybody.
  if (given.releases !== undefined && given.releases !== 'any')
    for (const id of given.releases) if ((await ctx.store.get('release', id)) === undefined) throw new Problem('not-found', `no release ${id}`)
  return { ...wholePolicy(before), ...given }
}

/** The same of how keys reach the members. Throws Problem('unsupported') when broadcast is to be forced on a key that lives in TPMs. */
const changedDelivery = async (ctx: Context, group: Group, change: PolicyChange): Promise<NonNullable<Group['delivery']>> => {
  const given = Object.fromEntries(Object.entries(change).filter(([field, value]) => value !== undefined && isDelivery(field)))
  const next = { ...deliveryPolicyOf(group), ...given }
  const tpmKey = next.delivery === 'broadcast' ? (await grantedKeys(ctx, group.id)).find(({ protection }) => protection !== 'sealed') : undefined
  if (tpmKey !== undefined) throw notByBroadcast(tpmKey.id, group.id)
  return next
}

/** What a change of policy would do to the group's members. Changes nothing. */
export const previewPolicy = async (ctx: Context, id: GroupId, change: PolicyChange): Promise<Impact> =>
  await preview(ctx, { group: id }, { policy: { group: id, policy: await changed(ctx, (await needGroup(ctx, id)).policy, change) } })

/** Changes the named parts of a group's policy and judges its members by it; the whole policy afterwards. */
export const setGroupPolicy = async (ctx: Context, caller: Caller, id: GroupId, change: PolicyChange): Promise<Group> => {
  const owed = `policy/${id}/${ctx.now()}/${hex(ctx.random(4))}`
  const { group: now, before } = await perform(ctx, { caller, action: 'group.policy', subject: id }, async (tx) => {
    const group = await needGroup(ctx, id)
    const policy = await changed(ctx, group.policy, change)
    const next = { ...group, policy, delivery: await changedDelivery(ctx, group, change) }
    tx.update('group', next)
    oweAppraisal(tx, owed, { scope: { group: id }, because: `policy of group ${id}` })
    tx.note(JSON.stringify({ ...policy, ...next.delivery }))
    return { group: next, before: group.policy }
  })
  // A crash here: the policy holds; the start-up sweep judges the members by it.
  ctx.step('group.policy')
  await settleAppraisal(ctx, owed)
  // Who is entitled has changed: members get what they lack and erase what they may not hold.
  if (now.policy.assurance !== before.assurance || now.policy.history !== wholePolicy(before).history) await convergeMembers(ctx, [id])
  return now
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

/** Members of a group with a query come and go by it alone. */
const byHand = (group: Group, caller: Caller): void => {
  if (group.query !== undefined && caller.kind !== 'system')
    throw new Problem('conflict', `the members of group ${group.id} follow its query: ${group.query}`, { reason: 'group.query' })
}
const actionOf = ({ kind }: Caller): 'group.change' | 'group.follow' => (kind === 'system' ? 'group.follow' : 'group.change')

const grantedKeys = async (ctx: Context, id: GroupId): Promise<readonly ManagedKey[]> => {
  const keys = await Promise.all((await findAll(ctx.store, 'grant', { where: { group: id } })).map(async ({ key }) => await ctx.store.get('key', key)))
  return keys.filter((key) => key !== undefined)
}

/** The lowest epoch of each key that whoever joins now may read: the one in use, or where it is to read nothing from before, the next one. */
const readsFrom = (keys: readonly ManagedKey[], nextOnly: boolean): Readonly<Record<string, number>> =>
  Object.fromEntries(keys.map(({ id, current, latest }) => [id, nextOnly ? latest + 1 : current]))

/**
 * Adds devices to a group, all or none. Members that are online get the group's keys at once, the others when they next connect. When the group's policy says so
 * its keys are rotated, and the new members read only what is protected from then on.
 */
export const addMembers = async (ctx: Context, caller: Caller, id: GroupId, wanted: Wanted): Promise<{ added: number; already: number }> => {
  const owed = `join/${id}/${ctx.now()}/${hex(ctx.random(4))}`
  const keys = `keys-of-${owed}`
  const { joined, already, known } = await perform(ctx, { caller, action: actionOf(caller), subject: id }, async (tx) => {
    const group = await needGroup(ctx, id)
    byHand(group, caller)
    const rotates = wholePolicy(group.policy).rotateOnJoin
    const devices = await devicesOf(ctx, wanted)
    const joined: DeviceId[] = []
    const known: DeviceId[] = []
    await inChunks(devices, 200, async (device) => {
      const [row, member] = await Promise.all([ctx.store.get('device', device), ctx.store.get('member', `${id}/${device}`)])
      if (row === undefined) throw new Problem('not-found', `no device ${device}`)
      if (row.state === 'revoked') throw new Problem('conflict', `device ${device} is revoked`)
      if (member !== undefined) return
      joined.push(device)
      if (hasIdentity(row)) known.push(device)
    })
    const granted = await grantedKeys(ctx, id)
    const from = readsFrom(granted, rotates)
    for (const device of joined) tx.insert('member', { id: `${id}/${device}`, group: id, device, joinedAt: ctx.now(), from })
    if (rotates && joined.length > 0 && granted.length > 0)
      owe(tx, keys, { keys: granted.map((key) => key.id), because: `${joined.length} joined group ${id}`, kick: null })
    tx.note(`${joined.length} added: ${joined.slice(0, 20).join(', ')}${joined.length > 20 ? ', …' : ''}`)
    if (known.length > 0) oweAppraisal(tx, owed, { scope: { group: id }, because: `joined group ${id}` })
    return { joined, already: devices.length - joined.length, known }
  })
  // A crash here: the members have no keys of the group yet; their next report fetches them. Where the policy has keys rotated first, the start-up sweep does it.
  ctx.step('group.add')
  // What they run may not be acceptable here: that is judged before any key of the group leaves.
  if (known.length > 0) await settleAppraisal(ctx, owed, known)
  await settle(ctx, keys)
  await inChunks(
    joined.filter((device) => ctx.bus.online(device)),
    16,
    (device) => convergeDevice(ctx, device),
  )
  return { added: joined.length, already }
}

/** Takes devices out of a group, all or none. When the group's policy says so its keys are rotated, so that they cannot read on. */
export const removeMembers = async (ctx: Context, caller: Caller, id: GroupId, devices: readonly DeviceId[]): Promise<{ campaigns: readonly string[] }> => {
  const { owed, dropped } = await perform(ctx, { caller, action: actionOf(caller), subject: id }, async (tx) => {
    const group = await needGroup(ctx, id)
    byHand(group, caller)
    const members = await inChunks(devices, 200, async (device) => {
      const member = await ctx.store.get('member', `${id}/${device}`)
      if (member === undefined) throw new Problem('not-found', `${device} is not in group ${id}`)
      return member
    })
    for (const member of members) tx.remove('member', member)
    await touchSeats(ctx, tx, members)
    const names = `${devices.slice(0, 20).join(', ')}${devices.length > 20 ? ', …' : ''}`
    tx.note(`${names} removed`)
    const granted = (await findAll(ctx.store, 'grant', { where: { group: id } })).map(({ key }) => key)
    const lost = await inChunks(devices, 200, async (device) => {
      const others = await keysThroughOthers(ctx, id, device)
      const keys = granted.filter((key) => !others.has(key))
      return { keys, dropped: await dropTargets(ctx, tx, device, { stage: 'left', why: `left group ${id}`, keys }) }
    })
    const dropped = [...new Set(lost.flatMap((one) => one.dropped))]
    const keys = granted.filter((key) => lost.some((one) => one.keys.includes(key)))
    if (!group.policy.rotateOnLeave || keys.length === 0) return { owed: undefined, dropped }
    const name = `leave/${id}/${devices.length === 1 ? devices[0] : hex(ctx.random(4))}/${ctx.now()}`
    owe(tx, name, { keys, because: `${names} left group ${id}`, kick: null })
    return { owed: name, dropped }
  })
  // A crash here: the marker stands in the store, the start-up sweep rotates.
  ctx.step('group.remove')
  const campaigns = owed === undefined ? [] : await settle(ctx, owed)
  for (const campaign of dropped) ctx.wake(campaign)
  // What the group forbade may be acceptable without it.
  await reappraise(ctx, { devices }, `left group ${id}`)
  await inChunks(
    devices.filter((device) => ctx.bus.online(device)),
    16,
    async (device) => await convergeDevice(ctx, device),
  )
  return { campaigns }
}

/** The same for one. */
export const removeMember = async (ctx: Context, caller: Caller, id: GroupId, device: DeviceId): Promise<{ campaigns: readonly string[] }> =>
  await removeMembers(ctx, caller, id, [device])

/** Keys that the device still holds rightly through another group: its leaving this one exposes nothing of them. */
const keysThroughOthers = async (ctx: Context, id: GroupId, device: DeviceId): Promise<ReadonlySet<string>> => {
  const members = (await findAll(ctx.store, 'member', { where: { device } })).filter(({ group }) => group !== id)
  const grants = await Promise.all(members.map(({ group }) => findAll(ctx.store, 'grant', { where: { group } })))
  return new Set(grants.flat().map(({ key }) => key))
}
