import type { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf, Place } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { isFor, wrapFor } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { labelsOf } from '@fleetkey/protocol/subset-difference/labels.ts'
import { slots } from '@fleetkey/protocol/subset-difference/tree.ts'
import { groupAddress, groupTopic } from '@fleetkey/protocol/topics.ts'
import { placeName, sealTo } from '@fleetkey/protocol/wrap.ts'
import type { Caller } from '../access/caller.ts'
import type { EnrolledDevice, Group, Member } from '../fleet/device.ts'
import { recipientPoint } from '../fleet/firmware.ts'
import { broadcastId, coverOf, defaultDelivery, isBroadcast, isRenewalDue, type Broadcast, type GroupDelivery, type Shard } from '../keys/broadcast.ts'
import type { Holding, KeyEpoch, ManagedKey } from '../keys/key.ts'
import { holdingPlace } from '../keys/key.ts'
import { passing, type Context } from './context.ts'
import { eachEntitled, stillEntitled } from './membership.ts'
import { messageTo } from './message.ts'
import { perform, type Transaction } from './perform.ts'
import { findAll, inChunks } from './rows.ts'
import { inTurn, othersFirst } from './turn.ts'

const system: Caller = { kind: 'system', id: 'broadcast', from: 'server' }
/** Members that get their places in one commit. */
const atOnce = 50
/** Wraps that are made before others have their turn. */
const wrapsAtOnce = 128

/** How keys reach the members of a group. */
export const deliveryPolicyOf = (group: Group): GroupDelivery => ({ ...defaultDelivery, ...group.delivery })

/** The shards of a group that is, or was, served by broadcast. */
export const shardsOf = async (ctx: Context, group: GroupId): Promise<readonly Shard[]> =>
  (await findAll(ctx.store, 'shard', { prefix: `${group}/` })).toSorted((one, other) => one.shard - other.shard)

// --- places ---

const freshMaster = (ctx: Context, id: string, generation: number): Uint8Array => {
  const master = new Secret(ctx.random(32))
  const cell = ctx.vault.sealMaster(id, generation, master)
  master.destroy()
  return cell
}

const freshShard = (ctx: Context, group: GroupId, shard: number): Shard => {
  const id = `${group}/${shard}`
  return { id, version: 0, group, shard, generation: 1, master: freshMaster(ctx, id, 1), given: 0, openedAt: ctx.now() }
}

/** The same shard with labels that nobody has: all that was given before opens nothing made from here on. */
const renewed = (ctx: Context, shard: Shard): Shard => {
  const generation = shard.generation + 1
  return { ...shard, generation, master: freshMaster(ctx, shard.id, generation), given: 0, openedAt: ctx.now() }
}

const isSeated = (member: Member, shards: ReadonlyMap<number, Shard>): boolean =>
  member.seat !== undefined && shards.get(member.seat.shard)?.generation === member.seat.generation

/**
 * Gives a place to each of these members that has none for the present generation of its shard: slots in order, never one twice, so that those not given yet are one
 * tail that every cover leaves out. Whoever left and returns gets another one.
 */
const seat = async (ctx: Context, group: GroupId, devices: readonly DeviceId[]): Promise<void> =>
  await inTurn(ctx.store, `places/${group}`, async () => {
    for (let start = 0; start < devices.length; start += atOnce) {
      const some = devices.slice(start, start + atOnce)
      const known = new Map((await shardsOf(ctx, group)).map((shard) => [shard.shard, shard]))
      const members = await inChunks(some, atOnce, async (device) => await ctx.store.get('member', `${group}/${device}`, passing))
      if (start > 0) await othersFirst()
      if (members.every((member) => member === undefined || isSeated(member, known))) continue
      await perform(ctx, { caller: system, action: 'group.place', subject: group }, async (tx) => {
        const stored = new Map((await shardsOf(ctx, group)).map((shard) => [shard.shard, shard]))
        const shards = new Map(stored)
        let count = 0
        for (const device of some) {
          const member = await ctx.store.get('member', `${group}/${device}`, passing)
          if (member === undefined || isSeated(member, shards)) continue
          const own = member.seat === undefined ? undefined : shards.get(member.seat.shard)
          const hasRoom = (shard: Shard | undefined): shard is Shard => shard !== undefined && shard.given < slots
          const shard = hasRoom(own) ? own : ([...shards.values()].find(hasRoom) ?? freshShard(ctx, group, shards.size))
          shards.set(shard.shard, { ...shard, given: shard.given + 1 })
          tx.update('member', { ...member, seat: { shard: shard.shard, generation: shard.generation, slot: shard.given } })
          count++
        }
        for (const [number, shard] of shards) {
          if (!stored.has(number)) tx.insert('shard', shard)
          else if (stored.get(number) !== shard) tx.update('shard', shard)
        }
        tx.note(`${count} places in ${shards.size} shards`)
      })
      // A crash here: places that nobody has labels for; a report, or the next rotation, gives them out.
      ctx.step('group.placed')
    }
  })

/**
 * Adds to the commit in which a member leaves, or is trusted less: no epoch that is made at the same moment counts it among its readers.
 */
export const touchSeats = async (ctx: Context, tx: Transaction, members: readonly Member[]): Promise<void> => {
  const shards = new Set(members.flatMap(({ group, seat: at }) => (at === undefined ? [] : [`${group}/${at.shard}`])))
  for (const id of shards) {
    const shard = await ctx.store.get('shard', id)
    if (shard !== undefined) tx.touch('shard', shard)
  }
}

/** Adds to a commit: the places of a device that may have been overheard by whatever ran on it. It gets others, with labels of their own, once it may have keys again. */
export const dropSeats = async (ctx: Context, tx: Transaction, device: DeviceId): Promise<void> => {
  const members = (await findAll(ctx.store, 'member', { where: { device } })).filter(({ seat: at }) => at !== undefined)
  await touchSeats(ctx, tx, members)
  for (const { seat: _lost, ...member } of members) tx.update('member', member)
  if (members.length > 0) tx.note(`loses its place in ${members.map(({ group }) => group).join(', ')}`)
}

/** The slots that are to read the next epoch, by shard; and who has no place for it yet. */
const seating = async (ctx: Context, group: Group) => {
  const shards = new Map((await shardsOf(ctx, group.id)).map((shard) => [shard.shard, shard]))
  const slotsOf = new Map<number, number[]>([...shards.keys()].map((shard) => [shard, []]))
  const unseated: DeviceId[] = []
  await eachEntitled(ctx, group.id, (members) => {
    for (const member of members) {
      if (member.seat === undefined || !isSeated(member, shards)) unseated.push(member.device)
      else slotsOf.get(member.seat.shard)?.push(member.seat.slot)
    }
  })
  return { shards, slotsOf, unseated }
}

/** A new generation for every shard that needs one, then a place for everybody who is to read what comes next. */
const renewAndSeat = async (ctx: Context, group: Group): Promise<void> => {
  let now = await seating(ctx, group)
  if (now.unseated.length > 0) {
    await seat(ctx, group.id, now.unseated)
    now = await seating(ctx, group)
  }
  const due: Shard[] = []
  for (const shard of now.shards.values()) {
    if (isRenewalDue(shard, now.slotsOf.get(shard.shard) ?? [], deliveryPolicyOf(group), ctx.now())) due.push(shard)
    if (now.shards.size > 1) await othersFirst()
  }
  if (due.length === 0) return
  await perform(ctx, { caller: system, action: 'group.place', subject: group.id }, async (tx) => {
    for (const { id, generation } of due) {
      const stored = await ctx.store.get('shard', id)
      if (stored !== undefined && stored.generation === generation) tx.update('shard', renewed(ctx, stored))
    }
    tx.note(`new generation: ${due.map(({ shard, generation }) => `shard ${shard} ${generation + 1}`).join(', ')}`)
  })
  // A crash here: a generation in which nobody has a place; the next report of each member, or the next rotation, gives it one.
  ctx.step('group.generation')
  await seat(ctx, group.id, (await seating(ctx, group)).unseated)
}

// --- epochs ---

/** A key that lives in TPMs is imported into each of them: no message opens it in many. */
export const notByBroadcast = (key: KeyId, group: GroupId): Problem =>
  new Problem('unsupported', `group ${group} is served by broadcast and ${key} is a tpm key, which is imported into each TPM by itself: use unicast or auto`, {
    reason: 'broadcast.tpm-key',
  })

const isServed = async (ctx: Context, group: Group, key: ManagedKey): Promise<boolean> => {
  const policy = deliveryPolicyOf(group)
  return isBroadcast(policy, policy.delivery === 'auto' ? await ctx.store.count('member', { group: group.id }) : 0, key)
}

/** Groups that this key goes to by broadcast. */
const broadcastGroups = async (ctx: Context, key: ManagedKey): Promise<readonly Group[]> => {
  if (key.protection !== 'sealed') return []
  const groups = await Promise.all(
    (await findAll(ctx.store, 'grant', { where: { key: key.id } })).map(async ({ group }) => await ctx.store.get('group', group)),
  )
  const chosen = await Promise.all(groups.map(async (group) => (group !== undefined && (await isServed(ctx, group, key)) ? [group] : [])))
  return chosen.flat()
}

/** Before a new epoch is made: places, and labels of a new generation where they are due. Harmless to repeat. */
export const prepareBroadcasts = async (ctx: Context, id: KeyId): Promise<void> => {
  const key = await ctx.store.get('key', id)
  if (key === undefined) return
  for (const group of await broadcastGroups(ctx, key)) await renewAndSeat(ctx, group)
}

/** The same before a key is granted to a group. */
export const prepareGrant = async (ctx: Context, id: KeyId, to: GroupId): Promise<void> => {
  const [key, group] = await Promise.all([ctx.store.get('key', id), ctx.store.get('group', to)])
  if (key !== undefined && group !== undefined && (await isServed(ctx, group, key))) await renewAndSeat(ctx, group)
}

/**
 * Adds to the commit that makes an epoch: its wraps for the members that may read it now. Whom they are for is settled here for good: whoever joins later gets the
 * epoch by itself, if it may read it at all. The shards are in the commit, so that it is refused if somebody got a place, or left, meanwhile. `to`: a group that
 * the key is being granted to. Reads each member once, a page a turn of the event loop, and wraps for one shard a turn.
 */
export const addBroadcasts = async (ctx: Context, tx: Transaction, key: ManagedKey, epoch: KeyEpoch, to?: Group): Promise<void> => {
  const groups = to === undefined ? await broadcastGroups(ctx, key) : (await isServed(ctx, to, key)) ? [to] : []
  for (const group of groups) {
    const known = await readersOf(ctx, group, epoch)
    const material = ctx.vault.open(epoch)
    try {
      let [bytes, readers] = [0, 0]
      for (const one of known) {
        const { shard, seated } = await asOfNow(ctx, one, epoch)
        const row = await broadcastOf(ctx, { shard, own: seated.map(({ slot }) => slot), epoch, material })
        if (known.length > 1) await othersFirst()
        if (row === undefined) continue
        tx.insert('broadcast', row)
        tx.touch('shard', shard)
        bytes += row.wraps.length
        readers += seated.length
      }
      tx.note(`broadcast to group ${group.id}: ${readers} members in ${known.length} shards, ${bytes} bytes of wraps`)
    } finally {
      material.destroy()
    }
  }
}

const mayRead = ({ from }: Member, { key, epoch }: KeyEpoch): boolean => epoch >= (from?.[key] ?? 0)

/** Who in a shard may read an epoch, no older than this version of the shard. */
interface Readers {
  readonly shard: Shard
  readonly seated: readonly { readonly device: DeviceId; readonly slot: number }[]
}

const seatedIn = ({ shard, generation }: Shard, members: readonly Member[], epoch: KeyEpoch): Readers['seated'] =>
  members.flatMap((member) => {
    const { device, seat: at } = member
    return at?.shard === shard && at.generation === generation && mayRead(member, epoch) ? [{ device, slot: at.slot }] : []
  })

/** The shards before their members: a shard that is still as it was read has the members that were read after it. */
const readersOf = async (ctx: Context, group: Group, epoch: KeyEpoch): Promise<readonly Readers[]> => {
  const readers = new Map((await shardsOf(ctx, group.id)).map((shard) => [shard.shard, { shard, seated: [] as Readers['seated'][number][] }]))
  await eachEntitled(ctx, group.id, (members) => {
    for (const member of members) {
      const own = member.seat === undefined ? undefined : readers.get(member.seat.shard)
      if (own !== undefined) own.seated.push(...seatedIn(own.shard, [member], epoch))
    }
  })
  return [...readers.values()]
}

/**
 * Somebody left or got a place while the others were read: those of this shard are judged again, so that a busy fleet does not lose the whole to one of them. Who got
 * a place meanwhile gets the epoch by itself.
 */
const asOfNow = async (ctx: Context, { shard, seated }: Readers, epoch: KeyEpoch): Promise<Readers> => {
  const now = await ctx.store.get('shard', shard.id)
  if (now === undefined || now.version === shard.version) return { shard, seated }
  const members = await stillEntitled(
    ctx,
    shard.group,
    seated.map(({ device }) => device),
  )
  return await asOfNow(ctx, { shard: now, seated: seatedIn(now, members, epoch) }, epoch)
}

/** One epoch for one shard; undefined when it has no member, or needs more subsets than a message holds: its members then get the epoch one by one. */
const broadcastOf = async (
  ctx: Context,
  of: { readonly shard: Shard; readonly own: readonly number[]; readonly epoch: KeyEpoch; readonly material: Secret },
): Promise<Omit<Broadcast, 'version'> | undefined> => {
  const { shard, own, epoch } = of
  const subsets = own.length === 0 ? undefined : coverOf(own, shard.given)
  if (subsets === undefined) return undefined
  const facts = { key: epoch.key, epoch: epoch.epoch, group: shard.group, shard: shard.shard, generation: shard.generation, nonce: ctx.random(16) }
  const master = ctx.vault.openMaster(shard)
  const wraps: Uint8Array[] = []
  for (let start = 0; start < subsets.length; start += wrapsAtOnce) {
    if (start > 0) await othersFirst()
    wraps.push(wrapFor(master, subsets.slice(start, start + wrapsAtOnce), of.material, { tenant: ctx.tenant, ...facts }))
  }
  master.destroy()
  return { id: broadcastId(facts), ...facts, wraps: new Uint8Array(Buffer.concat(wraps)), install: null, activate: null, createdAt: ctx.now() }
}

/** Adds to the commit that destroys an epoch: nothing of it is sent any more. */
export const dropBroadcasts = async (ctx: Context, tx: Transaction, epoch: string): Promise<void> => {
  for (const row of await findAll(ctx.store, 'broadcast', { prefix: `${epoch}/` })) tx.remove('broadcast', row)
}

// --- messages ---

type Stage = 'install' | 'activate'

/** The signed messages of these rows of one epoch, by row; signed once, the same ever after. */
const signedMessages = async (ctx: Context, rows: readonly Broadcast[], stage: Stage): Promise<ReadonlyMap<string, Uint8Array>> => {
  const [first] = rows
  if (first === undefined) return new Map()
  const epoch = `${first.key}/${first.epoch}`
  return await inTurn(ctx.store, `broadcast/${epoch}/${stage}`, async () => {
    const found = new Map<string, Uint8Array>()
    const fresh = await inChunks(rows, 64, async ({ id }) => {
      const row = await ctx.store.get('broadcast', id)
      const known = row?.[stage] ?? null
      if (known !== null) found.set(id, known)
      return row === undefined || known !== null
        ? []
        : [{ id, bytes: await messageTo(ctx, ctx.authority.roles.group, groupAddress(row.group, row.shard), bodyOf(row, stage)) }]
    })
    const unsigned = fresh.flat()
    if (unsigned.length === 0) return found
    const detail = `${stage}: ${unsigned.length} messages`
    await perform(ctx, { caller: system, action: 'key.broadcast', subject: epoch, detail }, async (tx) => {
      for (const { id, bytes } of unsigned) {
        const now = await ctx.store.get('broadcast', id)
        if (now !== undefined) tx.update('broadcast', { ...now, [stage]: bytes })
        found.set(id, bytes)
      }
    })
    // A crash here: signed and not sent; whoever lacks the epoch gets it when it reports.
    ctx.step('broadcast.signed')
    return found
  })
}

const bodyOf = ({ generation, key, epoch, nonce, wraps }: Broadcast, stage: Stage): BodyOf<'broadcast'> => ({
  type: 'broadcast',
  generation,
  key,
  epoch,
  nonce,
  activate: stage === 'activate',
  wraps,
})

/** The message of one row. */
export const broadcastMessage = async (ctx: Context, row: Broadcast, stage: Stage): Promise<Uint8Array> => {
  const bytes = (await signedMessages(ctx, [row], stage)).get(row.id)
  if (bytes === undefined) throw new Problem('internal', `no message of ${row.id}`)
  return bytes
}

/** Sends these rows to everybody who listens. */
export const publish = async (ctx: Context, rows: readonly Broadcast[], stage: Stage): Promise<void> => {
  const messages = await signedMessages(ctx, rows, stage)
  await inChunks(rows, 16, async ({ id, group, shard }) => {
    const bytes = messages.get(id)
    if (bytes !== undefined) await ctx.bus.publish(groupTopic(group, shard), bytes)
  })
}

// --- one device ---

/** A name for one place, of a session's set. */
const seatName = ({ group, shard, generation, slot }: Place): string => `${group}/${shard}/${generation}/${slot}`

/** The broadcast of this epoch that is for the place of this device, if there is one: the same message that it missed. */
export const broadcastFor = async (ctx: Context, device: DeviceId, key: KeyId, epoch: number): Promise<Broadcast | undefined> => {
  for (const { group, seat: at } of await findAll(ctx.store, 'member', { where: { device } })) {
    if (at === undefined) continue
    const row = await ctx.store.get('broadcast', broadcastId({ key, epoch, group, shard: at.shard }))
    if (row !== undefined && row.generation === at.generation && isFor(row.wraps, at.slot)) return row
  }
  return undefined
}

/** Whether it is connected and has the labels for this broadcast, as far as the server knows. */
export const isListening = async (ctx: Context, device: DeviceId, row: Broadcast): Promise<boolean> => {
  const session = ctx.sessions.of(device)
  if (session === undefined || !ctx.bus.online(device)) return false
  const at = (await ctx.store.get('member', `${row.group}/${device}`))?.seat
  return at !== undefined && session.places.has(seatName({ group: row.group, ...at }))
}

/** What a broadcast is to one device that it was for: a delivery, its nonce the one to prove use with. */
export const heldByBroadcast = (ctx: Context, device: DeviceId, row: Broadcast): Holding => ({
  id: `${device}/${row.key}/${row.epoch}`,
  version: 0,
  device,
  key: row.key,
  epoch: row.epoch,
  stage: 'delivered',
  place: holdingPlace(row.key, row.epoch, 'delivered'),
  nonce: row.nonce,
  deliveredAt: ctx.now(),
  installedAt: null,
  activeAt: null,
  retiredAt: null,
  reason: null,
})

/** The places of a device in groups that are served by broadcast; it gets those that it lacks. `entitled`: groups whose keys it may have now. */
export const placesOf = async (ctx: Context, device: DeviceId, entitled: readonly GroupId[]): Promise<readonly Place[]> => {
  const places = await Promise.all(
    entitled.map(async (id): Promise<Place[]> => {
      const [group, first] = await Promise.all([ctx.store.get('group', id), ctx.store.get('shard', `${id}/0`)])
      // Nothing was broadcast yet: places are given before the first time.
      if (group === undefined || first === undefined) return []
      if (deliveryPolicyOf(group).delivery !== 'unicast') await seat(ctx, id, [device])
      const at = (await ctx.store.get('member', `${id}/${device}`))?.seat
      return at === undefined ? [] : [{ group: id, ...at }]
    }),
  )
  return places.flat()
}

/** One place that a device has to hear of: its labels, or that it is to erase them. */
export interface OwedPlace {
  readonly place: Place
  readonly erase: boolean
}

/** What has to be said to a device about its places, labels and all: what it has is as reported, or as this session knows. */
export const owedPlaces = (ctx: Context, device: DeviceId, places: readonly Place[], reported: readonly Place[] | null): readonly OwedPlace[] => {
  const session = ctx.sessions.of(device)
  if (session !== undefined && reported !== null) session.places = new Set(reported.map(seatName))
  const known = reported === null ? (session?.places ?? new Set<string>()) : new Set(reported.map(seatName))
  const left = (reported ?? []).filter(({ group }) => !places.some((place) => place.group === group))
  return [...left.map((place) => ({ place, erase: true })), ...places.filter((place) => !known.has(seatName(place))).map((place) => ({ place, erase: false }))]
}

/** The message that gives a device the labels of its place, or has it erase them. */
export const labelsMessage = async (ctx: Context, device: EnrolledDevice, { place, erase }: OwedPlace): Promise<Uint8Array | undefined> => {
  const sealed = erase ? null : await sealedLabels(ctx, device, place)
  if (sealed === undefined) return undefined
  const session = ctx.sessions.of(device.id)
  if (!erase) session?.places.add(seatName(place))
  return await messageTo(ctx, ctx.authority.roles.delivery, device.id, { type: 'labels', ...place, sealed })
}

/** Undefined when the generation is over: its master is gone, the device gets another place. */
const sealedLabels = async (ctx: Context, device: EnrolledDevice, place: Place): Promise<Uint8Array | undefined> => {
  const { group, shard, generation, slot } = place
  const row = await ctx.store.get('shard', `${group}/${shard}`)
  const recipient = recipientPoint(device.keys)
  if (row === undefined || row.generation !== generation || recipient === null) return undefined
  const master = ctx.vault.openMaster(row)
  const labels = new Secret(labelsOf(master, slot))
  master.destroy()
  const context = { tenant: ctx.tenant, device: device.id, key: placeName(place), epoch: generation, protection: 'sealed', purpose: 'labels' } as const
  const sealed = sealTo(recipient, labels, context)
  labels.destroy()
  return sealed
}
