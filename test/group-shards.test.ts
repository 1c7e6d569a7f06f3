import { createECDH, randomBytes } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { openDocument } from '@fleetkey/device-agent/files.ts'
import { openKeyring, type Keyring } from '@fleetkey/device-agent/keyring.ts'
import { memoryFileSystem } from '@fleetkey/device-agent/memory-filesystem.ts'
import { openTrust, readFromServer } from '@fleetkey/device-agent/trust.ts'
import { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import { isFor, wrapLength } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { slots } from '@fleetkey/protocol/subset-difference/tree.ts'
import { groupAddress } from '@fleetkey/protocol/topics.ts'
import type { Member } from '@fleetkey/server/fleet/device.ts'
import { broadcastId, type Broadcast } from '@fleetkey/server/keys/broadcast.ts'
import { broadcastMessage, labelsMessage, touchSeats } from '@fleetkey/server/flows/broadcast.ts'
import type { Context, Store } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { mayBeCut } from '@fleetkey/server/flows/cut.ts'
import { drive } from '@fleetkey/server/flows/drive.ts'
import { createGroup, removeMember, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { entitledPages } from '@fleetkey/server/flows/membership.ts'
import { perform } from '@fleetkey/server/flows/perform.ts'
import { reappraise } from '@fleetkey/server/flows/reappraise.ts'
import { startRotation } from '@fleetkey/server/flows/rotate.ts'
import { unprovenDevices } from '@fleetkey/server/flows/unproven.ts'
import { anEntry } from './conformance/store.ts'
import { enrolledDevice } from './enrolled-device.ts'
import { operator, testContext, type TestContext } from './harness.ts'

/** Members of two shards: the first is full, the second has the others. */
const others = 104
const [plant, telemetry] = [GroupId.parse('plant'), KeyId.parse('telemetry')]
const nameOf = (at: number): DeviceId => DeviceId.parse(`gw-${String(at).padStart(4, '0')}`)
const members = Array.from({ length: slots + others }, (_, at) => nameOf(at))
/** Evicted, and one that stays, of the first shard; one of the second. */
const [evicted, first, second] = [nameOf(77), nameOf(78), nameOf(slots + 5)]
const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

const recipient = createECDH('prime256v1')
recipient.generateKeys()
const point = new Uint8Array(recipient.getPublicKey())
/** SubjectPublicKeyInfo of a point of P-256. */
const spki = new Uint8Array(Buffer.concat([Buffer.from('3059301306072a8648ce3d020106082a8648ce3d030107034200', 'hex'), point]))

let ctx: TestContext
beforeAll(async () => {
  ctx = await testContext()
  const at = ctx.clock.now
  await createGroup(ctx, operator(), plant)
  await setGroupPolicy(ctx, operator(), plant, { delivery: 'broadcast' })
  const rows = members.map((device): Member => ({ id: `${plant}/${device}`, version: 0, group: plant, device, joinedAt: at }))
  const writes = [
    ...members.map((id) => ({ table: 'device', do: 'insert', row: enrolledDevice(id, { spki, at }) }) as const),
    ...rows.map((row) => ({ table: 'member', do: 'insert', row }) as const),
  ]
  await ctx.store.commit({ writes, entries: [anEntry()] })
  await createKey(ctx, operator(), { id: telemetry, protection: 'sealed' })
  await grantKey(ctx, operator(), telemetry, plant)
}, 120_000)
afterAll(async () => await ctx.close())

const broadcast = async (epoch: number, shard: number): Promise<Broadcast> => {
  const row = await ctx.store.get('broadcast', broadcastId({ key: telemetry, epoch, group: plant, shard }))
  if (row === undefined) throw new Error(`no broadcast of epoch ${epoch} to shard ${shard}`)
  return row
}
/** The names of the subsets, hex. */
const coverIn = ({ wraps }: Broadcast): readonly string[] =>
  Array.from({ length: wraps.length / (4 + wrapLength) }, (_, at) =>
    Buffer.from(wraps.subarray(at * (4 + wrapLength), at * (4 + wrapLength) + 4)).toString('hex'),
  )

const seatOf = async (device: DeviceId) => {
  const seat = (await ctx.store.get('member', `${plant}/${device}`))?.seat
  if (seat === undefined) throw new Error(`${device} has no place`)
  return { group: plant, ...seat }
}

/** What the agent of a device stores of the labels that the server has for it. */
const ringOf = async (device: DeviceId): Promise<Keyring> => {
  const [onLoss, step] = [() => undefined, () => undefined]
  const ring = await openKeyring({
    document: openDocument({ files: memoryFileSystem(), folder: '/data', name: 'keyring', step }),
    storage: new Secret(random(32)),
    tpm: {
      point,
      zgen: async (other) => new Uint8Array(recipient.computeSecret(other)),
      importHmacKey: async () => await Promise.reject(new Error('no TPM')),
      hmac: async () => await Promise.reject(new Error('no TPM')),
    },
    tenant: ctx.tenant,
    device,
    random,
    step,
    onLoss,
  })
  const row = await ctx.store.get('device', device)
  if (row?.state !== 'enrolled') throw new Error(`no ${device}`)
  const message = await labelsMessage(ctx, row, { place: await seatOf(device), erase: false })
  const { body } = readMessage(message ?? new Uint8Array(), { max: 1 << 20 }).envelope
  if (body.type !== 'labels') throw new Error('no labels')
  await ring.place(body)
  return ring
}

/** As the agent makes a delivery of what it was sent in common; `shard`: whom it is said to be for. */
const deliveryOf = ({ key, epoch, nonce, generation, wraps }: Broadcast, shard: number) =>
  ({
    type: 'delivery',
    key,
    epoch,
    nonce,
    activate: false,
    readOnly: false,
    algorithm: 'A256GCM',
    campaign: null,
    wrapped: { protection: 'sealed', group: plant, shard, generation, wraps },
  }) as const

describe('a group of two shards', () => {
  let places: ReadonlyMap<DeviceId, { readonly shard: number; readonly slot: number }>

  test('has a place for each member, and one message a shard', async () => {
    places = new Map(await Promise.all(members.map(async (device) => [device, await seatOf(device)] as const)))
    expect(await ctx.store.find('shard', { prefix: 'plant/', limit: 10 })).toMatchObject([
      { shard: 0, given: slots },
      { shard: 1, given: others },
    ])
    expect(new Set([...places.values()].map(({ shard, slot }) => `${shard}/${slot}`)).size).toBe(members.length)
    // Whole, and whole but for the places that nobody has.
    expect(coverIn(await broadcast(1, 0))).toHaveLength(1)
    for (const [, { shard, slot }] of places) expect(isFor((await broadcast(1, shard)).wraps, slot)).toBe(true)
  })

  test('evicts from the one without touching the cover of the other, while others have their turn', async () => {
    let [turns, over] = [0, false]
    const count = (): void => {
      turns++
      if (!over) setImmediate(count)
    }
    setImmediate(count)
    await removeMember(ctx, operator(), plant, evicted)
    over = true
    // The fleet was read a hundred members a turn.
    expect(turns).toBeGreaterThan(members.length / 100)
    const [before, after] = [await Promise.all([broadcast(1, 0), broadcast(1, 1)]), await Promise.all([broadcast(2, 0), broadcast(2, 1)])]
    expect(coverIn(after[1])).toEqual(coverIn(before[1]))
    expect(coverIn(after[0])).not.toEqual(coverIn(before[0]))
    for (const [device, { shard, slot }] of places) expect(isFor(after[shard]?.wraps ?? new Uint8Array(), slot)).toBe(device !== evicted)
  })

  test('what is for the one shard opens nothing in the other, whatever is said about it', async () => {
    const [own, foreign] = [await broadcast(2, 0), await broadcast(2, 1)]
    const [inFirst, inSecond] = [await ringOf(first), await ringOf(second)]
    expect(await inFirst.install(deliveryOf(foreign, 1))).toBeUndefined()
    expect(await inSecond.install(deliveryOf(own, 0))).toBeUndefined()
    // Relabelled as its own: the keys of the wraps know better.
    await expect(inSecond.install(deliveryOf(own, 1))).rejects.toMatchObject({ reason: 'broadcast.open' })
    expect([inFirst.held(), inSecond.held()]).toEqual([[], []])
    expect((await inFirst.install(deliveryOf(own, 0)))?.epochs).toMatchObject([{ epoch: 2 }])
    expect((await inSecond.install(deliveryOf(foreign, 1)))?.epochs).toMatchObject([{ epoch: 2 }])
    expect(inFirst.material(telemetry, 2).secret.equals(inSecond.material(telemetry, 2).secret)).toBe(true)
  })

  test('a device refuses the signed message of the other shard', async () => {
    const trust = openTrust({ trust: [ctx.authority.root], chain: [...ctx.authority.chain], keys: [ctx.authority.roles.group.certificate] })
    const time = { now: ctx.clock.now, floor: ctx.clock.now, signed: true }
    const read = (bytes: Uint8Array) =>
      readFromServer(bytes, { trust, tenant: ctx.tenant, client: second, groups: new Set([groupAddress(plant, 1)]), time, max: 1 << 20 })
    const [own, foreign] = [await broadcastMessage(ctx, await broadcast(2, 1), 'install'), await broadcastMessage(ctx, await broadcast(2, 0), 'install')]
    expect(read(own).envelope.body.type).toBe('broadcast')
    expect(() => read(foreign)).toThrow(expect.objectContaining({ code: 'forbidden', reason: 'message.device' }))
  })

  test('who leaves after it was read, and before the rest was, is in no cover', async () => {
    let left = false
    const leave = async (): Promise<void> => {
      left = true
      await perform(ctx, { caller: { kind: 'system', id: 'test', from: 'server' }, action: 'group.place', subject: plant }, async (tx) => {
        const member = await ctx.store.get('member', `${plant}/${first}`)
        if (member === undefined) throw new Error('left already')
        tx.remove('member', member)
        await touchSeats(ctx, tx, [member])
      })
    }
    // Leaves in the middle of the reading that the commit rests on: after the places were found in order.
    let readings = 0
    const find: Context['store']['find'] = async (table, query) => {
      if (table === 'member' && query.prefix === 'plant/') {
        if (query.after === undefined) readings++
        else if (readings === 2 && !left && query.after > `plant/${nameOf(1_000)}`) await leave()
      }
      return await ctx.store.find(table, query)
    }
    const store = Object.assign(Object.create(ctx.store) as Context['store'], { find })
    await startRotation({ ...ctx, store }, operator(), telemetry, { because: 'test', supersede: 'aborted' })
    expect(left).toBe(true)
    const [row] = [await broadcast(3, 0)]
    expect(isFor(row.wraps, places.get(first)?.slot ?? 0)).toBe(false)
    expect(isFor(row.wraps, places.get(nameOf(79))?.slot ?? 0)).toBe(true)
    // Judged anew for its shard alone: the rest was read once, and nothing was refused.
    expect(readings).toBe(2)
  })

  test('nothing goes through all members in one turn of the event loop', async () => {
    let [rows, most, isOver] = [0, 0, false]
    const counted = {
      get: async (...of: Parameters<Store['get']>) => {
        rows++
        return await ctx.store.get(...of)
      },
      find: async (...of: Parameters<Store['find']>) => {
        const found = await ctx.store.find(...of)
        rows += found.length
        return found
      },
      commit: async (...of: Parameters<Store['commit']>) => {
        rows += of[0].writes.length
        return await ctx.store.commit(...of)
      },
    }
    const store = Object.assign(Object.create(ctx.store) as Context['store'], counted)
    const on: Context = { ...ctx, store }
    const look = (): void => {
      most = Math.max(most, rows)
      rows = 0
      if (!isOver) setImmediate(look)
    }
    look()
    const commands = KeyId.parse('commands')
    await createKey(on, operator(), { id: commands, protection: 'sealed' })
    await grantKey(on, operator(), commands, plant)
    await mayBeCut(on, telemetry, { limit: 100 })
    await unprovenDevices(on, telemetry, { limit: 100 })
    const policy = { waves: [{ devices: 10 }, 1], overlap: 'strict' } as const
    const { campaign } = await startRotation(on, operator(), telemetry, { policy, because: 'test', supersede: 'aborted', mayCut: members.length })
    await drive(on, campaign)
    await reappraise(on, { group: plant }, 'test')
    await removeMember(on, operator(), plant, nameOf(80))
    isOver = true
    expect((await ctx.store.get('campaign', campaign))?.sizes).toEqual([10, members.length - 12])
    // A page is fifty members, of each of which a few rows are read or written; commits to this store take no turn.
    expect(most).toBeGreaterThan(100)
    expect(most).toBeLessThan(1_000)
  })

  test('whoever is entitled to its key comes in order of id, a page at a time', async () => {
    const pages: (readonly DeviceId[])[] = []
    for await (const page of entitledPages(ctx, telemetry)) pages.push(page)
    expect(pages.flat()).toEqual(members.filter((device) => device !== evicted && device !== first && device !== nameOf(80)))
    expect(Math.max(...pages.map(({ length }) => length))).toBeLessThanOrEqual(100)
  })
})
