import { randomBytes } from 'node:crypto'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { buildRelease, referenceValues, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { orderBatch, previewBatchOrder, settleOwedBatches } from '@fleetkey/server/flows/batch-order.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { addMembers, createGroup, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { settleOwedRotations } from '@fleetkey/server/flows/owed-rotation.ts'
import { perform } from '@fleetkey/server/flows/perform.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { addStation, removeStation, revokeStation } from '@fleetkey/server/flows/station.ts'
import { reinstateDevice, suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import { withdrawRelease } from '@fleetkey/server/flows/withdraw-release.ts'
import { expectCut, stepClock } from './cut.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'
import { dial } from './mqtt-wire.ts'
import { openWorld, until, using, type Machine, type World } from './world.ts'

const id = (name: string): DeviceId => DeviceId.parse(name)

describe('with real boards', () => {
  let world: World
  const steps = stepClock()
  const agents: Agent[] = []
  const machines: Machine[] = []
  const call = (): World['client'] => world.client
  const show = async (name: string) => await call().call('device.show', { params: { id: name } })
  const radius = async (name: string) => await call().call('device.blast-radius', { params: { id: name } })
  const [first, second, third] = ['gw-1', 'gw-2', 'gw-3'] as const

  beforeAll(async () => {
    world = await openWorld({ step: steps.step })
    for (const serial of ['GW-1', 'GW-2']) machines.push(await world.simulated(serial))
    await world.enlist(machines, 'plant')
    machines.push(await world.simulated('GW-3'))
    await world.enlist(machines.slice(2), 'yard')
    await call().call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await call().call('key.create', { body: { id: 'unsent', protection: 'sealed' } })
    for (const group of ['plant', 'yard']) await call().call('key.grant', { params: { id: 'telemetry' }, body: { group } })
    for (const machine of machines) agents.push(world.agent(machine))
    await until('all use the key', () => using(agents, 'telemetry', 1), 60_000)
    const proven = async (name: string): Promise<boolean> => (await show(name)).holdings.some(({ stage }) => stage === 'active')
    await until('all have proven it', async () => (await proven(first)) && (await proven(second)) && (await proven(third)), 60_000)
  }, 120_000)
  afterAll(async () => await world.stop())

  test('suspended: cut at once, refused with a public code and a private reason, its keys go on without it', async () => {
    const [agent] = agents
    if (agent === undefined) throw new Error('no agent')
    const suspend = async () => await call().call('device.suspend', { params: { id: first }, body: { reason: 'under repair' } })
    const { socket } = await dial(world.server.mqttPort)
    const session = await new Promise<Buffer>((resolve) => void socket.once('session', resolve))
    const resumes = async (): Promise<boolean> => (await dial(world.server.mqttPort, { session })).socket.isSessionReused()
    expect(await resumes()).toBe(true)
    const done = await expectCut({ order: suspend, isCut: () => !agent.status().connected, durable: () => steps.at('suspend.committed') })
    expect(done).toMatchObject({ already: false, keys: ['telemetry'] })
    // Nor does anybody resume what began before.
    expect(await resumes()).toBe(false)
    await until('it has tried to connect', async () => (await show(first)).lastRefusal?.reason === 'certificate.held', 60_000)
    expect(agent.status()).toMatchObject({ connected: false })
    const view = await show(first)
    expect(view).toMatchObject({ state: 'suspended', suspensionReason: 'under repair', groups: ['plant'], lastRefusal: { code: 'forbidden' } })
    expect(view.certificates.every(({ status }) => status === 'held')).toBe(true)
    await until('the others use the next epoch', () => using(agents.slice(1), 'telemetry', 2), 60_000)
    expect(agent.status().current['telemetry']).toBe(1)
    expect(await suspend()).toMatchObject({ already: true, keys: [] })
  })

  test('its blast radius ends where the next epoch begins', async () => {
    const { identity, topics, keys, notDelivered } = await radius(first)
    expect(identity?.until).toBe((await show(first)).suspendedAt)
    expect(topics).toEqual(['fk/1/gw-1/up', 'fk/1/gw-1/down'])
    expect(keys).toMatchObject([{ key: 'telemetry', epochs: [{ epoch: 1, proof: 'active', state: 'deactivated', heldUntil: null }] }])
    expect(keys[0]?.epochs).toHaveLength(1)
    expect(keys[0]?.epochs[0]?.usedUntil).toBeGreaterThanOrEqual(identity?.until ?? Infinity)
    expect(notDelivered).toEqual([])
  })

  test('reinstated: it comes back by itself and converges', async () => {
    expect(await call().call('device.reinstate', { params: { id: first } })).toEqual({ already: false })
    expect(await call().call('device.reinstate', { params: { id: first } })).toEqual({ already: true })
    await until('it uses the epoch of the others', () => using(agents, 'telemetry', 2), 90_000)
    const view = await show(first)
    expect(view).toMatchObject({ state: 'enrolled', suspendedAt: null })
    expect(view.certificates.every(({ status }) => status === 'valid')).toBe(true)
  })

  test('revoked: the blast radius before, and after its keys were rotated', async () => {
    await call().call('key.grant', { params: { id: 'unsent' }, body: { group: 'yard' } })
    await until('it has proven both keys', async () => (await radius(third)).keys[1]?.epochs[0]?.proof === 'active', 60_000)
    const before = await radius(third)
    expect(before.identity?.until).toBeNull()
    expect(before.keys.map(({ key }) => key)).toEqual(['telemetry', 'unsent'])
    expect(before.keys[1]?.epochs).toMatchObject([{ epoch: 1, state: 'active', usedUntil: null }])
    const agent = agents[2]
    if (agent === undefined) throw new Error('no agent')
    const revoke = async () => await call().call('device.revoke', { params: { id: third }, body: { reason: 'stolen from the yard', code: 'keyCompromise' } })
    await expectCut({ order: revoke, isCut: () => !agent.status().connected, durable: () => steps.at('revoke.committed') })
    expect(await revoke()).toMatchObject({ already: true, keys: [] })
    await until(
      'its keys are superseded',
      async () => (await radius(third)).keys.every(({ epochs }) => epochs.every(({ usedUntil }) => usedUntil !== null)),
      60_000,
    )
    const after = await radius(third)
    expect(after.identity).toEqual({ from: before.identity?.from, until: (await show(third)).revokedAt })
    expect(after.keys.map(({ key, epochs }) => [key, epochs.map(({ epoch, proof }) => [epoch, proof])])).toEqual(
      before.keys.map(({ key, epochs }) => [key, epochs.map(({ epoch, proof }) => [epoch, proof])]),
    )
    expect(await show(third)).toMatchObject({ state: 'revoked', revocationCode: 'keyCompromise', groups: [] })
    await expect(call().call('device.reinstate', { params: { id: third } })).rejects.toMatchObject({ code: 'conflict' })
    await expect(call().call('device.suspend', { params: { id: third }, body: { reason: 'x' } })).rejects.toMatchObject({ code: 'conflict' })
  })

  test('a batch: every session is cut at once, and comes back with the batch', async () => {
    expect(await call().call('batch.preview', { params: { id: 'batch-1', order: 'suspend' } })).toMatchObject({ devices: 2, keys: ['telemetry'] })
    const shared = async () => await call().call('batch.blast-radius', { params: { id: 'batch-1' }, query: {} })
    const before = await shared()
    expect(before).toMatchObject({ devices: 2, connected: 2, standing: null, states: { enrolled: 2 }, identity: { until: null }, keyCount: 1, next: null })
    expect(before.keys[0]?.epochs.at(-1)).toMatchObject({ devices: 2, state: 'active', usedUntil: null })
    const live = agents.slice(0, 2)
    const done = await expectCut({
      order: async () => await call().call('batch.suspend', { params: { id: 'batch-1' }, body: { reason: 'recall' } }),
      isCut: () => live.every((agent) => !agent.status().connected),
      durable: () => steps.at('batch.ordered'),
    })
    expect(done).toMatchObject({ already: false, devices: 2, keys: ['telemetry'] })
    const after = await shared()
    expect(after).toMatchObject({ devices: 2, connected: 0, waiting: 0, states: { suspended: 2 } })
    expect(after.identity?.until).toBeGreaterThan(before.identity?.from ?? Infinity)
    await until(
      'the epoch that they could read ends',
      async () => (await shared()).keys[0]?.epochs.every(({ usedUntil }) => usedUntil !== null) === true,
      60_000,
    )
    expect(await call().call('batch.show', { params: { id: 'batch-1' } })).toMatchObject({
      standing: { state: 'suspended', reason: 'recall' },
      states: { suspended: 2 },
    })
    await expect(call().call('device.reinstate', { params: { id: first } })).rejects.toMatchObject({ code: 'conflict' })
    expect(await call().call('batch.reinstate', { params: { id: 'batch-1' } })).toMatchObject({ devices: 2 })
    const { current } = await call().call('key.show', { params: { id: 'telemetry' } })
    await until('both are back with the newest epoch', () => using(live, 'telemetry', current), 120_000)
    expect(await show(second)).toMatchObject({ state: 'enrolled' })
  })

  test('a station on hold: nothing is taken from it until it is reinstated', async () => {
    const params = { id: 'line-1' }
    expect(await call().call('station.suspend', { params, body: { reason: 'missing since Tuesday' } })).toMatchObject({
      already: false,
      releases: ['gateway/1.0.0'],
    })
    expect(await call().call('station.suspend', { params, body: { reason: 'again' } })).toMatchObject({ already: true })
    await expect(world.importRelease(world.build('1.1.0', 2))).rejects.toMatchObject({ code: 'forbidden' })
    expect((await call().call('station.list')).items).toMatchObject([{ revoked: null, suspended: { reason: 'missing since Tuesday' } }])
    expect(await call().call('station.reinstate', { params })).toEqual({ already: false })
    expect(await call().call('station.reinstate', { params })).toEqual({ already: true })
    await world.importRelease(world.build('1.1.0', 2))
  })

  test('a station: what it signed is shown, and nothing more is taken from it', async () => {
    const signed = await call().call('station.revoke', { params: { id: 'line-1' }, body: { reason: 'keyCompromise' } })
    expect(signed).toMatchObject({
      already: false,
      batches: [
        { id: 'batch-1', rows: 2 },
        { id: 'batch-2', rows: 1 },
      ],
      releases: ['gateway/1.0.0', 'gateway/1.1.0'],
    })
    await expect(call().call('station.reinstate', { params: { id: 'line-1' } })).rejects.toMatchObject({ code: 'conflict' })
    await expect(world.enlist([await world.simulated('GW-9')], 'plant')).rejects.toMatchObject({ code: 'forbidden' })
    await expect(world.importRelease(world.build('1.2.0', 3))).rejects.toMatchObject({ code: 'forbidden' })
    await expect(call().call('station.remove', { params: { id: 'line-1' } })).rejects.toMatchObject({ code: 'conflict' })
    expect((await call().call('station.list')).items).toMatchObject([{ id: 'line-1', revoked: { code: 'keyCompromise' } }])
    const radius = await call().call('station.blast-radius', { params: { id: 'line-1' }, query: {} })
    expect(radius).toMatchObject({ revoked: { code: 'keyCompromise' }, batches: 2, releases: 2, devices: 3, states: { enrolled: 2, revoked: 1 } })
    expect(radius.keys.map(({ key }) => key)).toEqual(['telemetry', 'unsent'])
  })

  test('each of it is in the log', async () => {
    const { items } = await call().call('audit.list', { query: { limit: 1000 } })
    const said = new Set(items.filter(({ outcome }) => outcome === 'done').map(({ action }) => action))
    for (const action of [
      'device.suspend',
      'device.reinstate',
      'device.revoke',
      'batch.suspend',
      'batch.reinstate',
      'station.suspend',
      'station.reinstate',
      'station.revoke',
    ])
      expect(said).toContain(action)
  })
})

describe('orders against many', () => {
  let ctx: TestContext
  let crashAt: { step: string; left: number } | undefined
  const factory = station()
  const rows = 150
  const telemetry = KeyId.parse('telemetry')

  beforeEach(async () => {
    crashAt = undefined
    ctx = await testContext({
      onStep: (name) => {
        if (name === crashAt?.step && crashAt.left-- === 0) throw new Error('crash')
      },
    })
    await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
    const manifest = {
      format: 'fleetkey/batch/1',
      batch: 'b1',
      model: 'gateway',
      station: factory.id,
      rows: Array.from({ length: rows }, (_, at) => ({ serial: `GW-${at}`, ek: randomBytes(32).toString('hex') })),
    }
    await importBatch(ctx, operator(), { ...factory.signed(JSON.stringify(manifest)), format: 'json' })
    await createGroup(ctx, operator(), GroupId.parse('plant'))
    await addMembers(ctx, operator(), GroupId.parse('plant'), { batch: 'b1' })
    await createKey(ctx, operator(), { id: telemetry, protection: 'sealed' })
    await grantKey(ctx, operator(), telemetry, GroupId.parse('plant'))
  })
  afterEach(async () => await ctx.close())

  const states = async (): Promise<Record<string, number>> => {
    const found = await ctx.store.find('device', { where: { batch: 'b1' }, limit: 1000 })
    return Object.fromEntries(Object.entries(Object.groupBy(found, ({ state }) => state)).map(([state, of]) => [state, of.length]))
  }

  test.each([
    ['batch.ordered', 0],
    ['batch.keys', 0],
    ['batch.device', 70],
    ['batch.settled', 0],
  ] as const)('a crash at %s leaves nobody admitted, and the next start goes on', async (step, left) => {
    crashAt = { step, left }
    await expect(orderBatch(ctx, operator(), 'b1', { order: 'revoke', why: 'keyCompromise' })).rejects.toThrow('crash')
    crashAt = undefined
    expect((await ctx.store.get('batch', 'b1'))?.standing).toMatchObject({ state: 'revoked', code: 'keyCompromise' })
    await settleOwedBatches(ctx)
    await settleOwedRotations(ctx)
    expect(await states()).toEqual({ revoked: rows })
    // Also when the memberships that told of it were gone before the crash.
    expect((await ctx.store.get('key', telemetry))?.latest).toBe(2)
    expect(await ctx.store.find('setting', { prefix: 'owed-', limit: 10 })).toEqual([])
    // One entry of its own for each device, whatever happened in between.
    const revoked = (await ctx.entries()).filter(({ action, outcome }) => action === 'device.revoke' && outcome === 'done').map(({ subject }) => subject)
    expect(new Set(revoked).size).toBe(rows)
    expect(await orderBatch(ctx, operator(), 'b1', { order: 'revoke', why: 'again' })).toMatchObject({ already: true, devices: 0 })
  })

  test('who was suspended alone stays so when the batch comes back', async () => {
    await suspendDevice(ctx, operator(), id('gw-7'), 'lost')
    expect(await previewBatchOrder(ctx, 'b1', 'suspend')).toMatchObject({ devices: rows - 1 })
    await orderBatch(ctx, operator(), 'b1', { order: 'suspend', why: 'recall' })
    expect(await states()).toEqual({ suspended: rows })
    await orderBatch(ctx, operator(), 'b1', { order: 'reinstate', why: 'over' })
    expect(await states()).toEqual({ registered: rows - 1, suspended: 1 })
    await reinstateDevice(ctx, operator(), id('gw-7'))
    expect(await states()).toEqual({ registered: rows })
  })

  test('a revoked batch is revoked for good', async () => {
    await suspendDevice(ctx, operator(), id('gw-7'), 'lost')
    await orderBatch(ctx, operator(), 'b1', { order: 'revoke', why: 'counterfeit' })
    expect(await states()).toEqual({ revoked: rows })
    for (const order of ['suspend', 'reinstate'] as const)
      await expect(orderBatch(ctx, operator(), 'b1', { order, why: 'x' })).rejects.toMatchObject({ code: 'conflict' })
  })

  test('two orders at a time: whoever comes first, revoked holds', async () => {
    await Promise.allSettled([
      orderBatch(ctx, operator(), 'b1', { order: 'suspend', why: 'recall' }),
      orderBatch(ctx, operator(), 'b1', { order: 'revoke', why: 'counterfeit' }),
    ])
    expect(await states()).toEqual({ revoked: rows })
  })

  test.each(['suspend.committed', 'revoke.committed'] as const)('a crash at %s: barred already; the next start cuts the session and settles', async (step) => {
    ctx.bus.connect({ client: 'gw-3', device: 'gw-3' })
    crashAt = { step, left: 0 }
    const order = step === 'suspend.committed' ? suspendDevice : revokeDevice
    await expect(order(ctx, operator(), id('gw-3'), 'lost')).rejects.toThrow('crash')
    crashAt = undefined
    expect((await ctx.store.get('device', id('gw-3')))?.state).toBe(step === 'suspend.committed' ? 'suspended' : 'revoked')
    await settleOwedRotations(ctx)
    expect(ctx.bus.kicked).toContain('gw-3')
    expect(await ctx.store.find('setting', { prefix: 'owed-', limit: 10 })).toEqual([])
  })

  // mosquitto CVE-2021-34434 and CVE-2018-12546: what was subscribed to, or retained, was delivered after the right to it had gone.
  test.each(['suspend', 'revoke'] as const)('CVE-2021-34434, CVE-2018-12546: nothing that waits for a device outlives its right (%s)', async (order) => {
    const device = id('gw-4')
    const caller = { kind: 'system', id: 'converge', from: 'server' } as const
    await perform(ctx, { caller, action: 'key.deliver', subject: device }, (tx) => {
      for (const subject of ['delivery/telemetry/1', 'retire/telemetry'])
        tx.insert('outbox', { id: `${device}/${subject}`, device, subject, bytes: randomBytes(8), createdAt: ctx.now() })
    })
    ctx.bus.connect({ client: device, device })
    await (order === 'suspend' ? suspendDevice : revokeDevice)(ctx, operator(), device, 'lost')
    expect(await ctx.store.find('outbox', { where: { device }, limit: 10 })).toEqual([])
    expect(ctx.bus.online(device)).toBe(false)
    expect(ctx.bus.take(device)).toEqual([])
  })

  const queued = async (devices: readonly string[]): Promise<void> => {
    const caller = { kind: 'system', id: 'converge', from: 'server' } as const
    for (const device of devices.map(id))
      await perform(ctx, { caller, action: 'key.deliver', subject: device }, (tx) =>
        tx.insert('outbox', { id: `${device}/delivery/telemetry/1`, device, subject: 'delivery/telemetry/1', bytes: randomBytes(8), createdAt: ctx.now() }),
      )
  }
  const waiting = async (): Promise<readonly string[]> => (await ctx.store.find('outbox', { limit: 1000 })).map(({ device }) => device).toSorted()
  const latest = async (): Promise<number> => (await ctx.store.get('key', telemetry))?.latest ?? 0

  test.each([
    ['suspend', true, ['telemetry']],
    ['suspend', false, []],
    ['revoke', true, ['telemetry']],
    ['revoke', false, ['telemetry']],
  ] as const)('%s of a batch, rotate-on-leave %s: what waits for its devices is dropped, nobody else’s; rotated: %s', async (order, rotateOnLeave, keys) => {
    await setGroupPolicy(ctx, operator(), GroupId.parse('plant'), { rotateOnLeave })
    const line = factory.signed(
      JSON.stringify({
        format: 'fleetkey/batch/1',
        batch: 'b2',
        model: 'gateway',
        station: factory.id,
        rows: [{ serial: 'OTHER', ek: randomBytes(32).toString('hex') }],
      }),
    )
    await importBatch(ctx, operator(), { ...line, format: 'json' })
    await queued(['gw-0', 'gw-149', 'other'])
    for (const device of ['gw-0', 'other']) ctx.bus.connect({ client: device, device })
    const before = await latest()
    expect(await previewBatchOrder(ctx, 'b1', order)).toMatchObject({ devices: rows, keys })
    expect(await latest()).toBe(before)
    expect(await orderBatch(ctx, operator(), 'b1', { order, why: 'recall' })).toMatchObject({ devices: rows, keys })
    expect(await waiting()).toEqual(['other'])
    expect(await latest()).toBe(before + keys.length)
    expect([ctx.bus.online('gw-0'), ctx.bus.online('other')]).toEqual([false, true])
    expect(ctx.bus.take('gw-0')).toEqual([])
  })

  test('a station: nothing waits for it and it holds no key; what it signed goes on until its batches are ordered away', async () => {
    await queued(['gw-0'])
    ctx.bus.connect({ client: 'gw-0', device: 'gw-0' })
    const before = await latest()
    const { batches } = await revokeStation(ctx, operator(), factory.id, 'copied')
    expect([await waiting(), await latest(), ctx.bus.online('gw-0')]).toEqual([['gw-0'], before, true])
    for (const batch of batches) await orderBatch(ctx, operator(), batch.id, { order: 'revoke', why: 'signed by a station that was copied' })
    expect([await waiting(), await latest(), ctx.bus.online('gw-0')]).toEqual([[], before + 1, false])
  })

  test('keys that a suspended device holds are rotated when its firmware is withdrawn', async () => {
    await setGroupPolicy(ctx, operator(), GroupId.parse('plant'), { rotateOnLeave: false })
    await importRelease(
      ctx,
      operator(),
      factory.signed(referenceValues(buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('g', new Uint8Array(1))).manifest)),
    )
    for (let at = 0; at < rows; at++) if (at !== 5) await revokeDevice(ctx, operator(), id(`gw-${at}`), 'superseded')
    const before = (await ctx.store.get('key', telemetry))?.latest ?? 0
    expect(await suspendDevice(ctx, operator(), id('gw-5'), 'lost')).toMatchObject({ keys: [] })
    expect((await ctx.store.get('key', telemetry))?.latest).toBe(before)
    await withdrawRelease(ctx, operator(), 'gateway/1.0.0', 'a hole')
    expect((await ctx.store.get('key', telemetry))?.latest).toBe(before + 1)
  })

  test('the key of a revoked station does not come back under another name', async () => {
    await revokeStation(ctx, operator(), factory.id, 'copied')
    expect(await revokeStation(ctx, operator(), factory.id, 'copied')).toMatchObject({ already: true })
    await expect(addStation(ctx, operator(), { id: 'line-2', publicKey: factory.publicKey })).rejects.toMatchObject({ reason: 'station.revoked' })
    await expect(removeStation(ctx, operator(), factory.id)).rejects.toMatchObject({ code: 'conflict' })
  })

  // step-ca PR #2491 (CVE-2025-44005): revoking took whoever could reach it for somebody who may.
  test('CVE-2025-44005: who may not revoke is refused, and the refusal is in the log', async () => {
    const nobody = operator('auditor')
    const attempts = [
      async () => await revokeDevice(ctx, nobody, id('gw-1'), 'x'),
      async () => await suspendDevice(ctx, nobody, id('gw-1'), 'x'),
      async () => await reinstateDevice(ctx, nobody, id('gw-1')),
      async () => await orderBatch(ctx, nobody, 'b1', { order: 'revoke', why: 'x' }),
      async () => await orderBatch(ctx, operator('factory'), 'b1', { order: 'suspend', why: 'x' }),
      async () => await revokeStation(ctx, operator('operator'), factory.id, 'x'),
    ]
    for (const one of attempts) await expect(one()).rejects.toBeInstanceOf(Problem)
    expect((await ctx.entries()).filter(({ outcome, code }) => outcome === 'refused' && code === 'forbidden')).toHaveLength(attempts.length)
    expect(await states()).toEqual({ registered: rows })
  })
})
