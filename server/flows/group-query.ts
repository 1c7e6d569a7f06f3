import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { hasIdentity, type Device, type Group } from '../fleet/device.ts'
import { matches, parseQuery, tagName, tagValue, type DeviceFacts, type Query } from '../fleet/query.ts'
import type { Context } from './context.ts'
import { addMembers, removeMembers } from './group.ts'
import { perform } from './perform.ts'
import { needDevice } from './revoke.ts'
import { findAll, inChunks } from './rows.ts'
import { inTurn } from './turn.ts'

const system: Caller = { kind: 'system', id: 'group-query', from: 'server' }
const maxTags = 32
/** Devices that join in one commit, and rotate keys once. */
const atOnce = 1_000

const tagsId = (device: DeviceId): string => `tags/${device}`

/** What operators wrote on a device. */
export const tagsOf = async (ctx: Context, device: DeviceId): Promise<Readonly<Record<string, string>>> => {
  const row = await ctx.store.get('setting', tagsId(device))
  return row === undefined ? {} : (decode(row.value) as Record<string, string>)
}

/** Sets tags of a device (null: takes one away), and moves it to the groups that ask for them. All its tags. */
export const tagDevice = async (
  ctx: Context,
  caller: Caller,
  id: DeviceId,
  change: Readonly<Record<string, string | null>>,
): Promise<Readonly<Record<string, string>>> => {
  const tags = await perform(ctx, { caller, action: 'device.tag', subject: id, detail: JSON.stringify(change) }, async (tx) => {
    await needDevice(ctx, id)
    const row = await ctx.store.get('setting', tagsId(id))
    const next = new Map(Object.entries(await tagsOf(ctx, id)))
    for (const [name, value] of Object.entries(change)) {
      if (!tagName.test(name) || (value !== null && !tagValue.test(value)))
        throw new Problem('malformed', `${name}=${value ?? ''} is no tag`, { reason: 'device.tag' })
      if (value === null) next.delete(name)
      else next.set(name, value)
    }
    if (next.size > maxTags) throw new Problem('malformed', `${next.size} tags, at most ${maxTags}`, { reason: 'device.tag' })
    const value = encode(Object.fromEntries(next))
    if (row === undefined) tx.insert('setting', { id: tagsId(id), value })
    else tx.update('setting', { ...row, value })
    return Object.fromEntries(next)
  })
  // A crash here: the tags stand; its groups are looked at after the restart.
  ctx.step('device.tag')
  await followDevice(ctx, id)
  return tags
}

/** Has a group's members follow a query from now on; null: they stay, and are added and removed by hand again. */
export const setGroupQuery = async (ctx: Context, caller: Caller, id: GroupId, text: string | null): Promise<void> => {
  if (text !== null) parseQuery(text)
  await perform(ctx, { caller, action: 'group.query', subject: id, detail: text ?? 'none' }, async (tx) => {
    const group = await ctx.store.get('group', id)
    if (group === undefined) throw new Problem('not-found', `no group ${id}`)
    const { query: _before, ...rest } = group
    tx.update('group', text === null ? rest : { ...rest, query: text })
  })
  // A crash here: the query stands; it is followed after the restart.
  ctx.step('group.query')
  await followGroup(ctx, id)
}

const factsOf = async (ctx: Context, device: Device): Promise<DeviceFacts> => {
  const now = device.state === 'suspended' ? device.before : device
  const { batch, model, serial } = device
  const known = hasIdentity(now) ? { release: now.release, assurance: now.assurance } : { release: null, assurance: null }
  return { batch, model, serial, ...known, tags: await tagsOf(ctx, device.id) }
}

const following = async (ctx: Context): Promise<readonly { readonly group: Group; readonly query: Query }[]> =>
  (await findAll(ctx.store, 'group')).flatMap((group) => (group.query === undefined ? [] : [{ group, query: parseQuery(group.query) }]))

/** Puts a device into the groups whose query it is an answer to, and takes it out of those whose it no longer is. Joining and leaving are as by hand. Harmless to repeat. */
export const followDevice = async (ctx: Context, id: DeviceId): Promise<void> => {
  const groups = await following(ctx)
  if (groups.length === 0) return
  await inTurn(ctx.store, `follow/${id}`, async () => {
    const device = await ctx.store.get('device', id)
    if (device === undefined || device.state === 'revoked') return
    const facts = await factsOf(ctx, device)
    for (const { group, query } of groups) {
      const isMember = (await ctx.store.get('member', `${group.id}/${id}`)) !== undefined
      if (matches(query, facts) === isMember) continue
      if (isMember) await removeMembers(ctx, system, group.id, [id])
      else await addMembers(ctx, system, group.id, { devices: [id] })
    }
  })
}

/** The same for every device and one group. */
export const followGroup = async (ctx: Context, id: GroupId): Promise<void> => {
  const group = await ctx.store.get('group', id)
  if (group?.query === undefined) return
  const query = parseQuery(group.query)
  const [joining, leaving]: [DeviceId[], DeviceId[]] = [[], []]
  for (let after = ''; ;) {
    const page = await ctx.store.find('device', { ...(after === '' ? {} : { after }), limit: 500 })
    const last = page.at(-1)
    if (last === undefined) break
    after = last.id
    await inChunks(page, 100, async (device) => {
      if (device.state === 'revoked') return
      const [facts, member] = await Promise.all([factsOf(ctx, device), ctx.store.get('member', `${id}/${device.id}`)])
      const is = matches(query, facts)
      if (is && member === undefined) joining.push(device.id)
      if (!is && member !== undefined) leaving.push(device.id)
    })
  }
  if (leaving.length > 0) await removeMembers(ctx, system, id, leaving)
  for (let start = 0; start < joining.length; start += atOnce) await addMembers(ctx, system, id, { devices: joining.slice(start, start + atOnce) })
}

/** The same for every group: what changed while nobody looked, or was cut short by a crash. */
export const followAll = async (ctx: Context): Promise<void> => {
  for (const { group } of await following(ctx)) await followGroup(ctx, group.id)
}

/** Devices of a batch that was imported. */
export const followBatch = async (ctx: Context, batch: string): Promise<void> => {
  if ((await following(ctx)).length === 0) return
  await inChunks(await findAll(ctx.store, 'device', { where: { batch } }), 16, async ({ id }) => await followDevice(ctx, id))
}
