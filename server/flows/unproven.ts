import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Target } from '../campaigns/campaign.ts'
import { canReceive, hasIdentity, isMeasured, type Device, type Group } from '../fleet/device.ts'
import { isAssured } from '../fleet/policy.ts'
import { holdingPlace, type Holding, type ManagedKey } from '../keys/key.ts'
import type { Context } from './context.ts'
import { groupsOf, nextMembers } from './membership.ts'
import type { Page } from './readers.ts'
import { findAll, idsWhere } from './rows.ts'
import { othersFirst } from './turn.ts'

/** How far a device is that has not proven an epoch: out of service, not entitled to it, or on its way. */
export type UnprovenStage = 'not-enrolled' | 'quarantined' | 'suspended' | 'not-entitled' | 'pending' | 'delivered' | 'installed' | 'failed'

/** A device that should have proven an epoch and has not. Times are milliseconds since 1970. */
export interface Unproven {
  readonly device: DeviceId
  readonly stage: UnprovenStage
  readonly reason: string
  /** Since when it is at this stage; null: nothing was recorded. */
  readonly since: number | null
  readonly lastSeenAt: number | null
  readonly online: boolean
}

/** Members that are read at a time, and how much is looked at before a page ends early: what was read from indexes, and what had to be read whole. */
const chunk = 500
const bounds = { members: 20_000, devices: 2_000 } as const

/** Ids in the order of a store that sorts `<device>/…`: the slash decides between a name and a longer one. */
const slashed = (device: string): string => `${device}/`

/** Devices of these that use the epoch, or a newer one. */
const provenOf = async (ctx: Context, key: ManagedKey, from: number, devices: readonly string[]): Promise<ReadonlySet<string>> => {
  const order = devices.map(slashed).toSorted()
  const [first, last] = [order[0] ?? '', order.at(-1) ?? '']
  const found = new Set<string>()
  if (devices.length === 0) return found
  for (let epoch = from; epoch <= key.latest; epoch++)
    for (let after = first; ;) {
      const ids = await idsWhere(ctx.store, 'holding', { index: 'place', value: holdingPlace(key.id, epoch, 'active'), after, limit: chunk })
      for (const id of ids) found.add(id.slice(0, id.indexOf('/')))
      after = ids.at(-1) ?? last
      if (ids.length < chunk || after.slice(0, after.indexOf('/') + 1) > last) break
    }
  return found
}

interface Standing {
  readonly device: Device
  readonly holding: Holding | undefined
  readonly target: Target | undefined
  readonly groups: readonly Group[]
  readonly key: ManagedKey
  readonly online: boolean
}

const whyNotEntitled = ({ device, groups, key }: Standing): string | undefined => {
  if (!hasIdentity(device)) return undefined
  if (!canReceive(device.keys)) return 'it has no key that another could be wrapped to'
  if (key.protection === 'tpm' && !isMeasured(device)) return 'the key is to be in a TPM, and it has none'
  return groups.some(({ policy }) => isAssured(device.assurance, policy.assurance))
    ? undefined
    : `assurance ${device.assurance} is below what its groups demand`
}

/** Stage and reason, from what is recorded. */
const whyUnproven = (standing: Standing): Pick<Unproven, 'stage' | 'reason' | 'since'> => {
  const { device, holding, target, online } = standing
  if (device.state === 'registered') return { stage: 'not-enrolled', reason: device.lastRefusal?.reason ?? 'never enrolled', since: device.registeredAt }
  if (device.state === 'suspended') return { stage: 'suspended', reason: device.reason, since: device.suspendedAt }
  if (device.state === 'quarantined') return { stage: 'quarantined', reason: device.verdict.reason, since: device.quarantinedAt }
  const barred = whyNotEntitled(standing)
  if (barred !== undefined) return { stage: 'not-entitled', reason: barred, since: null }
  const away = online ? '' : '; it is offline'
  const given = target?.stage === 'timed-out' ? `; ${target.reason ?? 'timed out'}` : ''
  switch (holding?.stage) {
    case 'delivered':
      return { stage: 'delivered', reason: `sent, not acknowledged${given}${away}`, since: holding.deliveredAt }
    case 'installed':
      return {
        stage: 'installed',
        reason: holding.reason !== null ? holding.reason : `installed, not in use${given}${away}`,
        since: holding.installedAt,
      }
    case 'failed':
      return { stage: 'failed', reason: holding.reason ?? 'failed', since: target?.changedAt ?? holding.deliveredAt }
    default:
      // Never sent, or erased when it left and not sent again since it came back.
      return { stage: 'pending', reason: online ? `not sent yet${given}` : `not sent: it is offline${given}`, since: target?.changedAt ?? null }
  }
}

const lastSeen = (device: Device): number | null => {
  if (hasIdentity(device)) return device.lastSeenAt
  return device.state === 'suspended' && hasIdentity(device.before) ? device.before.lastSeenAt : null
}

/**
 * Members of the groups that a key is granted to which have proven neither this epoch nor a newer one, and why, by device. `proven`: how many use it. Throws Problem('not-found').
 * Those that have are passed over by their index entries; a page may end before its limit, as long as `next` is not null there is more.
 */
export const unprovenDevices = async (
  ctx: Context,
  id: KeyId,
  of: Page & { readonly epoch?: number | undefined },
): Promise<{ epoch: number; proven: number; items: Unproven[]; next: string | null }> => {
  const key = await ctx.store.get('key', id)
  if (key === undefined) throw new Problem('not-found', `no key ${id}`)
  const epoch = of.epoch ?? key.latest
  if ((await ctx.store.get('epoch', `${id}/${epoch}`)) === undefined) throw new Problem('not-found', `no epoch ${epoch} of key ${id}`)
  const granted = await groupsOf(ctx, id)
  const groups = (await Promise.all(granted.map(async (group) => await ctx.store.get('group', group)))).filter((group) => group !== undefined)
  const campaign = (await findAll(ctx.store, 'campaign', { where: { key: id } })).find(({ to }) => Number(to) === epoch)
  const proven = await ctx.store.count('holding', { place: holdingPlace(id, epoch, 'active') })
  const items: Unproven[] = []
  let { after } = of
  let [members, read] = [0, 0]
  for (;;) {
    const { devices, whole } = await nextMembers(ctx, granted, { after, limit: chunk })
    const passed = await provenOf(ctx, key, epoch, devices)
    members += devices.length
    for (const device of devices) {
      after = device
      if (passed.has(device)) continue
      const found = await standingOf(ctx, { device, key, epoch, groups, campaign: campaign?.id })
      if (++read % 100 === 0) await othersFirst()
      if (found !== undefined) items.push(found)
      if (items.length === of.limit || read >= bounds.devices) return { epoch, proven, items, next: whole && device === devices.at(-1) ? null : device }
    }
    if (whole) return { epoch, proven, items, next: null }
    if (members >= bounds.members) return { epoch, proven, items, next: after ?? null }
    await othersFirst()
  }
}

const standingOf = async (
  ctx: Context,
  of: { device: string; key: ManagedKey; epoch: number; groups: readonly Group[]; campaign: string | undefined },
): Promise<Unproven | undefined> => {
  const [device, holding, target, members] = await Promise.all([
    ctx.store.get('device', of.device),
    ctx.store.get('holding', `${of.device}/${of.key.id}/${of.epoch}`),
    of.campaign === undefined ? undefined : ctx.store.get('target', `${of.campaign}/${of.device}`),
    Promise.all(of.groups.map(async (group) => ((await ctx.store.get('member', `${group.id}/${of.device}`)) === undefined ? [] : [group]))),
  ])
  if (device === undefined) return undefined
  const online = ctx.bus.online(device.id)
  const why = whyUnproven({ device, holding, target, groups: members.flat(), key: of.key, online })
  return { device: device.id, ...why, lastSeenAt: lastSeen(device), online }
}
