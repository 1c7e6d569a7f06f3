import { afterEach, beforeEach, expect, test } from 'vitest'
import { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { orderBatch, previewBatchOrder } from '@fleetkey/server/flows/batch-order.ts'
import { blastRadius } from '@fleetkey/server/flows/blast-radius.ts'
import type { Write } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { addMembers, createGroup, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { setTopics } from '@fleetkey/server/flows/key-topics.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { batchRadius, stationRadius } from '@fleetkey/server/flows/shared-radius.ts'
import { addStation, suspendStation } from '@fleetkey/server/flows/station.ts'
import { previewDeviceOrder, suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import type { Holding } from '@fleetkey/server/keys/key.ts'
import { anEntry } from './conformance/store.ts'
import { enrolledDevice, p256 } from './enrolled-device.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'

/** Devices of the first batch; the second one has three. */
const many = 120
const keyCount = 45
const telemetry = KeyId.parse('telemetry')
const [plant, yard] = [GroupId.parse('plant'), GroupId.parse('yard')]
let ctx: TestContext

const held = (device: DeviceId, key: KeyId, at: number): Holding => ({
  id: `${device}/${key}/1`,
  version: 0,
  device,
  key,
  epoch: Epoch.parse(1),
  stage: 'active',
  nonce: new Uint8Array(16),
  deliveredAt: at,
  installedAt: at + 1,
  activeAt: at + 2,
  retiredAt: null,
  reason: null,
  place: `${key}/1/active`,
})

beforeEach(async () => {
  ctx = await testContext()
  const line = station()
  await addStation(ctx, operator(), { id: line.id, publicKey: line.publicKey })
  const { spki } = p256()
  const at = ctx.clock.now
  const devices = [
    ...Array.from({ length: many }, (_, number) => enrolledDevice(DeviceId.parse(`gw-${number}`), { spki, at: at - number, batch: 'b1' })),
    ...Array.from({ length: 3 }, (_, number) => enrolledDevice(DeviceId.parse(`mv-${number}`), { spki, at, batch: 'b2' })),
  ]
  const batch = (id: string, rows: number): Write => ({
    table: 'batch',
    do: 'insert',
    row: { id, version: 0, station: line.id, rows, manifestHash: '', importedAt: at, importedBy: 'operator:alice' },
  })
  const never = DeviceId.parse('never')
  const { id, version, serial, model, registeredAt, lastRefusal } = enrolledDevice(never, { spki, at })
  await ctx.store.commit({
    writes: [
      batch('b1', many + 1),
      batch('b2', 3),
      ...devices.map((row): Write => ({ table: 'device', do: 'insert', row })),
      { table: 'device', do: 'insert', row: { id, version, serial, model, registeredAt, lastRefusal, batch: 'b1', state: 'registered' } },
    ],
    entries: [anEntry()],
  })
  for (const group of [plant, yard]) await createGroup(ctx, operator(), group)
  await addMembers(ctx, operator(), plant, { batch: 'b1' })
  await addMembers(ctx, operator(), yard, { batch: 'b2' })
  await createKey(ctx, operator(), { id: telemetry, protection: 'sealed' })
  await setTopics(ctx, operator(), telemetry, ['plant/1/t', 'plant/+/alarm'])
  const own = devices.map(({ id: device }, number): Write => ({ table: 'holding', do: 'insert', row: held(device, telemetry, at + number) }))
  await ctx.store.commit({ writes: own, entries: [anEntry()] })
  await grantKey(ctx, operator(), telemetry, plant)
  ctx.clock.now += 60_000
})
afterEach(async () => await ctx.close())

const page = { limit: 100 }

test('a batch: counts of all, some by name, keys and topics from when to when; revoked, all of it ends', async () => {
  const at = ctx.clock.now - 60_000
  for (const number of [0, 1]) ctx.bus.connect({ client: `gw-${number}`, device: `gw-${number}` })
  const before = await batchRadius(ctx, 'b1', page)
  expect(before).toMatchObject({ batch: 'b1', station: 'line-1', standing: null, devices: many + 1, connected: 2, keyCount: 1, next: null })
  expect(before.states).toEqual({ registered: 1, enrolled: many, quarantined: 0, suspended: 0, revoked: 0 })
  expect(before.identity).toEqual({ from: at - many + 1, until: null })
  expect(before.first).toHaveLength(20)
  expect(before.first).toEqual(before.first.toSorted())
  expect(before.first.slice(0, 3)).toEqual(['gw-0', 'gw-1', 'gw-10'])
  expect(before.topics).toHaveLength(40)
  expect(before.keys).toMatchObject([
    {
      key: 'telemetry',
      epochs: [{ epoch: 1, state: 'active', devices: many, heldFrom: at, heldUntil: null, usedFrom: at, usedUntil: null }],
      topics: [
        { topic: 'plant/+/alarm', from: at, until: null },
        { topic: 'plant/1/t', from: at, until: null },
      ],
      more: { epochs: 0, topics: 0 },
    },
  ])

  expect(await previewBatchOrder(ctx, 'b1', 'revoke')).toMatchObject({ devices: many + 1, keys: [telemetry] })
  await orderBatch(ctx, operator(), 'b1', { order: 'revoke', why: 'counterfeit' })
  const after = await batchRadius(ctx, 'b1', page)
  expect(after).toMatchObject({ standing: { state: 'revoked' }, devices: many + 1, connected: 0, waiting: 0, keyCount: 1 })
  expect(after.states).toEqual({ registered: 0, enrolled: 0, quarantined: 0, suspended: 0, revoked: many + 1 })
  expect(after.identity).toEqual({ from: at - many + 1, until: ctx.clock.now })
  // What they could read is not less for it: the ledger keeps it, until when others went on under that epoch is told by the next one.
  expect(after.keys[0]?.epochs[0]).toMatchObject({ epoch: 1, devices: many, heldFrom: at })
  expect((await ctx.store.get('key', telemetry))?.latest).toBe(2)
})

test('a key’s topics: given up, they end; what was read before stays', async () => {
  await setTopics(ctx, operator(), telemetry, ['plant/1/t'])
  const [ended, began] = [ctx.clock.now, ctx.clock.now - 60_000]
  ctx.clock.now += 60_000
  const topics = [
    { topic: 'plant/+/alarm', from: began, until: ended },
    { topic: 'plant/1/t', from: began, until: null },
  ]
  expect((await batchRadius(ctx, 'b2', page)).keys[0]?.topics).toEqual(topics)
  expect((await blastRadius(ctx, DeviceId.parse('gw-3'))).keys[0]?.topics).toEqual(topics)
})

test('a station: the devices of every batch that it signed, whatever order is given against it', async () => {
  const before = await stationRadius(ctx, 'line-1', page)
  expect(before).toMatchObject({ station: 'line-1', batches: 2, releases: 0, devices: many + 4, revoked: null, suspended: null })
  expect(before.keys[0]?.epochs[0]?.devices).toBe(many + 3)
  await suspendStation(ctx, operator(), 'line-1', 'missing')
  expect(await stationRadius(ctx, 'line-1', page)).toEqual({ ...before, suspended: { at: ctx.clock.now, by: 'operator:alice', reason: 'missing' } })
  await expect(stationRadius(ctx, 'line-9', page)).rejects.toMatchObject({ code: 'not-found' })
  await expect(batchRadius(ctx, 'b9', page)).rejects.toMatchObject({ code: 'not-found' })
})

test('pages of keys add up to all of them, each once; a page is bounded', async () => {
  const device = DeviceId.parse('mv-0')
  const names = Array.from({ length: keyCount }, (_, number) => KeyId.parse(`k${number}`))
  for (const id of names) await createKey(ctx, operator(), { id, protection: 'sealed' })
  await ctx.store.commit({ writes: names.map((key): Write => ({ table: 'holding', do: 'insert', row: held(device, key, ctx.now()) })), entries: [anEntry()] })
  const seen: string[] = []
  let after: string | undefined
  for (let pages = 0; pages < 10; pages++) {
    const { keys, keyCount: all, next } = await batchRadius(ctx, 'b2', { limit: 20, ...(after === undefined ? {} : { after }) })
    expect(all).toBe(keyCount + 1)
    expect(keys.length).toBeLessThanOrEqual(20)
    seen.push(...keys.map(({ key }) => key))
    if (next === null) break
    after = next
  }
  expect(seen).toEqual([...names, telemetry].toSorted())
})

test('of a key with a long past the newest epochs and topics are listed, and how many more there are is said', async () => {
  const device = DeviceId.parse('mv-1')
  const epoch = await ctx.store.get('epoch', 'telemetry/1')
  if (epoch === undefined) throw new Error('no epoch')
  const past = Array.from({ length: 250 }, (_, number) => Epoch.parse(number + 2))
  await ctx.store.commit({
    writes: past.flatMap((number): Write[] => [
      {
        table: 'epoch',
        do: 'insert',
        row: { ...epoch, id: `telemetry/${number}`, version: 0, epoch: number, activatedAt: ctx.now() + number, deactivatedAt: ctx.now() + number + 1 },
      },
      { table: 'holding', do: 'insert', row: { ...held(device, telemetry, ctx.now()), id: `${device}/telemetry/${number}`, epoch: number } },
    ]),
    entries: [anEntry()],
  })
  const [key] = (await blastRadius(ctx, device)).keys
  expect(key?.epochs.map((one) => one.epoch)).toEqual(Array.from({ length: 100 }, (_, number) => 152 + number))
  expect(key?.more).toEqual({ epochs: 151, topics: 0 })
})

test('what an order against one device would do is what it does', async () => {
  const device = DeviceId.parse('gw-7')
  expect(await previewDeviceOrder(ctx, device, 'suspend')).toEqual({ already: false, keys: [telemetry], campaigns: [] })
  await setGroupPolicy(ctx, operator(), plant, { rotateOnLeave: false })
  expect(await previewDeviceOrder(ctx, device, 'suspend')).toEqual({ already: false, keys: [], campaigns: [] })
  expect(await previewDeviceOrder(ctx, device, 'reinstate')).toMatchObject({ already: true })
  expect(await suspendDevice(ctx, operator(), device, 'repair')).toMatchObject({ already: false, keys: [] })
  expect(await previewDeviceOrder(ctx, device, 'suspend')).toMatchObject({ already: true })
  expect(await previewDeviceOrder(ctx, device, 'reinstate')).toMatchObject({ already: false })
  expect(await previewDeviceOrder(ctx, device, 'revoke')).toEqual({ already: false, keys: [telemetry], campaigns: [] })
  expect(await revokeDevice(ctx, operator(), device, 'lost')).toMatchObject({ already: false, keys: [telemetry] })
  for (const order of ['revoke', 'suspend', 'reinstate'] as const)
    expect(await previewDeviceOrder(ctx, device, order)).toEqual({ already: true, keys: [], campaigns: [] })
  await expect(previewDeviceOrder(ctx, DeviceId.parse('gw-999'), 'revoke')).rejects.toMatchObject({ code: 'not-found' })
})
