import { createHash } from 'node:crypto'
import type { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { canReceive, isMeasured, type EnrolledDevice, type Group, type GroupPolicy, type Member } from '../fleet/device.ts'
import { isAssured, strictestPolicy, wholePolicy } from '../fleet/policy.ts'
import type { Context } from './context.ts'
import { findAll } from './rows.ts'
import { othersFirst } from './turn.ts'

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

/** Members that are judged before others have their turn. */
const atOnce = 100
/** Devices that are hashed, or sorted, before others have their turn. */
const inOrder = 1_000

/** Enrolled members of the groups that the key is granted to and that can hold it, in an order that nobody chose (by hash): waves are fair samples. */
export const entitledDevices = async (ctx: Context, key: KeyId, salt = ''): Promise<readonly DeviceId[]> => {
  const [row, grants] = await Promise.all([ctx.store.get('key', key), findAll(ctx.store, 'grant', { where: { key } })])
  const devices = new Set<DeviceId>()
  for (const { group } of grants)
    await eachEntitled(ctx, group, (members) => members.forEach(({ device }) => void devices.add(device)), { needsTpm: row?.protection === 'tpm' })
  return await byHash(devices, salt)
}

/** In the order of their hashes: by the first digits of them, then within these, which are few. A whole fleet takes many turns of the event loop. */
const byHash = async (devices: ReadonlySet<DeviceId>, salt: string): Promise<readonly DeviceId[]> => {
  const parts = new Map<string, { readonly id: DeviceId; readonly at: string }[]>()
  let done = 0
  for (const id of devices) {
    const at = createHash('sha256').update(`${salt}/${id}`).digest('hex')
    const part = parts.get(at.slice(0, 3))
    if (part === undefined) parts.set(at.slice(0, 3), [{ id, at }])
    else part.push({ id, at })
    if (++done % inOrder === 0) await othersFirst()
  }
  const ordered: DeviceId[] = []
  let turn = 0
  for (const digits of [...parts.keys()].toSorted()) {
    for (const { id } of (parts.get(digits) ?? []).toSorted((one, other) => (one.at < other.at ? -1 : 1))) ordered.push(id)
    if (ordered.length - turn < inOrder) continue
    turn = ordered.length
    await othersFirst()
  }
  return ordered
}

/** Those of these members that are enrolled and whose assurance is what the group demands; only those with a TPM when that is needed. */
const entitledOf = async (ctx: Context, group: Group, members: readonly Member[], needsTpm: boolean): Promise<readonly Member[]> => {
  const rows = await Promise.all(members.map(async ({ device }) => await ctx.store.get('device', device)))
  return members.filter((_member, at) => {
    const row = rows[at]
    return row?.state === 'enrolled' && canReceive(row.keys) && isAssured(row.assurance, group.policy.assurance) && (!needsTpm || isMeasured(row))
  })
}

/**
 * Enrolled members of a group whose assurance is what the group demands, a page at a time, by device; only those with a TPM when that is needed. Other work has its
 * turn between two pages: what changes meanwhile may be missed.
 */
export const eachEntitled = async (
  ctx: Context,
  id: GroupId,
  work: (members: readonly Member[]) => void,
  of: { readonly needsTpm?: boolean } = {},
): Promise<void> => {
  const group = await ctx.store.get('group', id)
  if (group === undefined) return
  let after: string | undefined
  for (;;) {
    const page = await ctx.store.find('member', { prefix: `${id}/`, limit: atOnce, ...(after === undefined ? {} : { after }) })
    work(await entitledOf(ctx, group, page, of.needsTpm === true))
    after = page.at(-1)?.id
    if (page.length < atOnce) return
    await othersFirst()
  }
}

/** Which of these devices are entitled members of the group now, as `eachEntitled` reads them. */
export const stillEntitled = async (ctx: Context, id: GroupId, devices: readonly DeviceId[]): Promise<readonly Member[]> => {
  const group = await ctx.store.get('group', id)
  const found: Member[] = []
  for (let start = 0; group !== undefined && start < devices.length; start += atOnce) {
    if (start > 0) await othersFirst()
    const some = await Promise.all(devices.slice(start, start + atOnce).map(async (device) => await ctx.store.get('member', `${id}/${device}`)))
    found.push(
      ...(await entitledOf(
        ctx,
        group,
        some.filter((member) => member !== undefined),
        false,
      )),
    )
  }
  return found
}
