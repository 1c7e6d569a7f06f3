import { randomInt } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { advanceCampaign, controlCampaign } from '@fleetkey/server/flows/campaign-order.ts'
import { addMembers, removeMember, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { startRotation } from '@fleetkey/server/flows/rotate.ts'
import { suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import { openBoard } from './simulation/board.ts'
import { diceOf } from './simulation/dice.ts'
import { openNetwork } from './simulation/network.ts'
import { runSchedule, type Outcome } from './simulation/schedule.ts'
import { startSimulatedServer } from './simulation/server.ts'
import { virtualTime } from './simulation/time.ts'
import { alice, group, keys, makeFleets, type Fleet, type Fleets } from './simulation/world.ts'

const long = process.env['FLEETKEY_LONG'] === '1'
const schedules = long ? 5_000 : 500
/** So many in one test: few enough for its time limit beside other work. */
const inOne = 25
const first = Number(process.env['FLEETKEY_SEED'] ?? randomInt(1_000_000_000))
process.stdout.write(`simulation: ${schedules} schedules from seed ${first} (npm run simulate -- --first ${first} --seeds ${schedules} runs them again)\n`)

let fleets: Fleets
let fleet: Fleet
const outcomes: Outcome[] = []
beforeAll(async () => {
  fleets = await makeFleets(3)
  fleet = fleets.plain
}, 60_000)
afterAll(async () => await fleets.close())

describe('server and agents in virtual time: whatever happens, they come to rest and every invariant holds', { timeout: 180_000 }, () => {
  test.for(Array.from({ length: Math.ceil(schedules / inOne) }, (_, at) => first + at * inOne))('schedules from %d', async (from) => {
    for (let seed = from; seed < Math.min(from + inOne, first + schedules); seed++) {
      const outcome = await runSchedule(fleets.of(seed), seed)
      outcomes.push(outcome)
      expect(outcome.failure, `seed ${seed}; npm run simulate -- --first ${seed} --seeds 1 prints what happened`).toBeNull()
    }
  })
})

test('a schedule is the same each time: a failure can be looked at again', async () => {
  for (const seed of [first, first + 1, first + 2]) {
    // The last of them with TPMs.
    const of = seed === first + 2 ? fleets.measured : fleet
    const [one, other] = [await runSchedule(of, seed), await runSchedule(of, seed)]
    expect(one.trace.length).toBeGreaterThan(20)
    expect(one.trace).toStrictEqual(other.trace)
  }
})

test('a campaign that met a full disk goes on when there is room again, though nothing else happens', async () => {
  const time = virtualTime(fleet.at)
  try {
    const network = openNetwork({ time, dice: diceOf(1) })
    const store = fleet.store.fork()
    let isFull = false
    const { ctx, crash } = await startSimulatedServer({
      store,
      kms: fleet.kms,
      network,
      time,
      random: diceOf(2).bytes,
      log: () => undefined,
      step: () => undefined,
      isFull: () => isFull,
      begun: () => undefined,
    })
    const { campaign } = await startRotation(ctx, alice, keys[0].id, { policy: { deadline: 10_000 }, because: 'nobody is there' })
    isFull = true
    await time.run(60_000)
    expect(await store.get('campaign', campaign)).toMatchObject({ state: 'preparing' })
    isFull = false
    await time.run(60_000)
    // The old epoch is kept for them.
    expect(await store.get('campaign', campaign)).toMatchObject({ state: 'activating' })
    crash()
  } finally {
    time.end()
  }
})

test('what a suspension owes is done when a full disk has room again, though nothing else happens', async () => {
  const time = virtualTime(fleet.at)
  try {
    const network = openNetwork({ time, dice: diceOf(1) })
    const store = fleet.store.fork()
    let isFull = false
    const log = (): void => undefined
    const world = { store, kms: fleet.kms, network, time, random: diceOf(2).bytes, log, step: log, isFull: () => isFull, begun: log }
    const { ctx, crash } = await startSimulatedServer(world)
    isFull = true
    const suspended = suspendDevice(ctx, alice, DeviceId.parse('b-1'), 'lost')
    await expect(suspended).rejects.toThrow('the disk is full')
    await time.run(200_000)
    expect((await store.get('device', 'b-1'))?.state).toBe('suspended')
    const owed = async (): Promise<number> => (await store.find('setting', { prefix: 'owed-', limit: 500 })).length
    expect([await owed(), (await store.get('key', 'telemetry'))?.latest]).toEqual([1, 1])
    isFull = false
    await time.run(200_000)
    expect([await owed(), (await store.get('key', 'telemetry'))?.latest]).toEqual([0, 2])
    crash()
  } finally {
    time.end()
  }
})

test('a device that joined during a rotation erases the old epoch when the others do, not at its next report', async () => {
  const time = virtualTime(fleet.at)
  const dice = diceOf(3)
  const network = openNetwork({ time, dice })
  const store = fleet.store.fork()
  const log = (): void => undefined
  const boards = fleet.boards.map((made) => openBoard({ ...made, network, time, dice, log, trust: fleet.trust, inUse: log }))
  try {
    const { ctx } = await startSimulatedServer({
      store,
      kms: fleet.kms,
      network,
      time,
      random: dice.bytes,
      log,
      step: log,
      isFull: () => false,
      begun: log,
    })
    for (const board of boards) board.switchOn()
    const [joiner] = boards
    const device = DeviceId.parse(joiner?.device)
    await setGroupPolicy(ctx, alice, group, { rotateOnLeave: false, rotateOnJoin: false, history: true })
    await removeMember(ctx, alice, group, device)
    await time.run(60_000)
    const [, { id: key }] = keys
    const { campaign } = await startRotation(ctx, alice, key, { because: 'somebody joins it' })
    await time.run(60_000)
    await addMembers(ctx, alice, group, { devices: [device] })
    await time.run(60_000)
    const held = (): readonly number[] => joiner?.agent?.status().holdings.flatMap((one) => (one.key === key ? [one.epoch] : [])) ?? []
    expect([held(), (await store.get('campaign', campaign))?.state]).toEqual([[1, 2], 'activating'])
    await time.run(900_000, async () => (await store.get('campaign', campaign))?.state === 'done')
    await time.run(2_000)
    expect(held()).toEqual([2])
    expect((await store.get('holding', `${device}/${key}/1`))?.stage).toBe('retired')
  } finally {
    for (const board of boards) board.cut()
    time.end()
  }
})

test('an older disk takes the place of one that had the next epoch, while its rotation is paused: it has that epoch soon after it is in use', async () => {
  const time = virtualTime(fleet.at)
  const dice = diceOf(4)
  const network = openNetwork({ time, dice })
  const store = fleet.store.fork()
  const log = (): void => undefined
  const boards = fleet.boards.map((made) => openBoard({ ...made, network, time, dice, log, trust: fleet.trust, inUse: log }))
  const world = { store, kms: fleet.kms, network, time, random: dice.bytes, log, step: log, isFull: () => false, begun: log }
  try {
    const { ctx } = await startSimulatedServer(world)
    for (const board of boards) board.switchOn()
    await time.run(30_000)
    const [{ id: key }] = keys
    const { campaign } = await startRotation(ctx, alice, key, { policy: { advance: 'manual', errorThreshold: 1 }, because: 'its disk is old' })
    await time.run(30_000)
    await controlCampaign(ctx, alice, campaign, { order: 'pause' })
    const [board] = boards
    board?.restore(fleet.boards[0]?.contents ?? new Map())
    board?.switchOn()
    await time.run(30_000)
    await controlCampaign(ctx, alice, campaign, { order: 'resume' })
    await advanceCampaign(ctx, alice, campaign)
    await time.run(15_000)
    expect(boards.map(({ agent }) => agent?.status().current[key])).toEqual([2, 2, 2])
    expect((await store.get('holding', `${board?.device}/${key}/2`))?.stage).toBe('active')
  } finally {
    for (const board of boards) board.cut()
    time.end()
  }
})

test('there was trouble enough', () => {
  const sum = (of: (outcome: Outcome) => number): number => outcomes.reduce((total, outcome) => total + of(outcome), 0)
  const treated = new Map<string, number>()
  for (const outcome of outcomes) for (const [name, count] of Object.entries(outcome.treated)) treated.set(name, (treated.get(name) ?? 0) + count)
  const met = new Map<string, number>()
  for (const outcome of outcomes) for (const [name, count] of Object.entries(outcome.met)) met.set(name, (met.get(name) ?? 0) + count)
  const rests = outcomes.map(({ recovery }) => recovery / 1000).toSorted((a, b) => a - b)
  process.stdout.write(
    `simulation: server killed ${sum(({ kills }) => kills.server)} times, boards ${sum(({ kills }) => kills.device)}; met ` +
      `${[...met].map(([name, count]) => `${name} ${count}`).join(', ')}; messages ` +
      `${[...treated].map(([name, count]) => `${name} ${count}`).join(', ')}; at rest after ${Math.round(rests[rests.length >> 1] ?? 0)} s (median) of virtual time, ` +
      `at most ${Math.round(rests.at(-1) ?? 0)} s\n`,
  )
  expect(sum(({ kills }) => kills.server)).toBeGreaterThan(schedules)
  expect(sum(({ kills }) => kills.device)).toBeGreaterThan(schedules / 2)
  for (const [name, count] of met) expect(count, name).toBeGreaterThan(schedules / 100)
  for (const name of ['drop', 'repeat', 'late', 'swap', 'flip', 'cut', 'replay']) expect(treated.get(name) ?? 0, name).toBeGreaterThan(10)
})
