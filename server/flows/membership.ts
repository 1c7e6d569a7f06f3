import type { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { canReceive, isMeasured, type EnrolledDevice, type Group, type GroupPolicy, type Member } from '../fleet/device.ts'
import { isAssured, strictestPolicy, wholePolicy } from '../fleet/policy.ts'
import { passing, type Context } from './context.ts'
import { findAll, idsWhere } from './rows.ts'
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

/** Members that are read, and judged, before others have their turn. */
const atOnce = 50

/** Ids of the next members of groups in order of device, each once, from the index alone. `whole`: nobody is behind them. `after`: exclusive. */
export const nextMembers = async (
  ctx: Context,
  groups: readonly string[],
  of: { readonly after: string | undefined; readonly limit: number },
): Promise<{ readonly devices: readonly DeviceId[]; readonly whole: boolean }> => {
  const { after, limit } = of
  const streams = await Promise.all(
    groups.map(async (group) => {
      const ids = await idsWhere(ctx.store, 'member', { index: 'group', value: group, limit, after: after === undefined ? undefined : `${group}/${after}` })
      return ids.map((id) => id.slice(group.length + 1) as DeviceId)
    }),
  )
  // Each stream is whole up to its last member when it was cut: what lies behind the nearest of these waits for the next page.
  const horizon = streams
    .filter((ids) => ids.length === limit)
    .map((ids) => ids.at(-1) ?? '')
    .toSorted()[0]
  const devices = [...new Set(streams.flat())].filter((device) => horizon === undefined || device <= horizon).toSorted()
  return { devices, whole: horizon === undefined }
}

/** Members of groups in order of device, each once, a page at a time. Other work has its turn between two pages: who joins or leaves behind a page that was read is missed. */
export const memberPages = async function* (ctx: Context, groups: readonly GroupId[]): AsyncGenerator<readonly DeviceId[], void> {
  for (let after: string | undefined; ;) {
    const { devices, whole } = await nextMembers(ctx, groups, { after, limit: atOnce })
    yield devices
    after = devices.at(-1)
    if (whole) return
    await othersFirst()
  }
}

/** Groups that a key is granted to. */
export const groupsOf = async (ctx: Context, key: KeyId): Promise<readonly GroupId[]> =>
  (await findAll(ctx.store, 'grant', { where: { key } })).map(({ group }) => group)

/** Which of these devices are entitled to the key now, in their order: enrolled members of a group that it is granted to, as trusted as that demands, that can hold it. */
export const entitledAmong = async (ctx: Context, key: KeyId, devices: readonly DeviceId[]): Promise<readonly DeviceId[]> => {
  const [row, ids] = await Promise.all([ctx.store.get('key', key), groupsOf(ctx, key)])
  const groups = (await Promise.all(ids.map(async (id) => await ctx.store.get('group', id)))).filter((group) => group !== undefined)
  const judged = await Promise.all(
    devices.map(async (id) => {
      const device = await ctx.store.get('device', id, passing)
      if (device?.state !== 'enrolled' || !canReceive(device.keys) || (row?.protection === 'tpm' && !isMeasured(device))) return []
      for (const group of groups)
        if (isAssured(device.assurance, group.policy.assurance) && (await ctx.store.get('member', `${group.id}/${id}`, passing)) !== undefined) return [id]
      return []
    }),
  )
  return judged.flat()
}

/** Devices that are entitled to a key, in order of id, a page at a time, each as it stands when its page is read (`memberPages`). */
export const entitledPages = async function* (ctx: Context, key: KeyId): AsyncGenerator<readonly DeviceId[], void> {
  for await (const devices of memberPages(ctx, await groupsOf(ctx, key))) yield await entitledAmong(ctx, key, devices)
}

/** Those of these members that are enrolled and whose assurance is what the group demands. */
const entitledOf = async (ctx: Context, group: Group, members: readonly Member[]): Promise<readonly Member[]> => {
  const rows = await Promise.all(members.map(async ({ device }) => await ctx.store.get('device', device, passing)))
  return members.filter((_member, at) => {
    const row = rows[at]
    return row?.state === 'enrolled' && canReceive(row.keys) && isAssured(row.assurance, group.policy.assurance)
  })
}

/**
 * Enrolled members of a group whose assurance is what the group demands, a page at a time, by device. Other work has its turn between two pages: what changes
 * meanwhile may be missed.
 */
export const eachEntitled = async (ctx: Context, id: GroupId, work: (members: readonly Member[]) => void): Promise<void> => {
  const group = await ctx.store.get('group', id)
  if (group === undefined) return
  let after: string | undefined
  for (;;) {
    const page = await ctx.store.find('member', { prefix: `${id}/`, limit: atOnce, ...(after === undefined ? {} : { after }) })
    work(await entitledOf(ctx, group, page))
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
    const some = await Promise.all(devices.slice(start, start + atOnce).map(async (device) => await ctx.store.get('member', `${id}/${device}`, passing)))
    found.push(
      ...(await entitledOf(
        ctx,
        group,
        some.filter((member) => member !== undefined),
      )),
    )
  }
  return found
}
