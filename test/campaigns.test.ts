import { createHash } from 'node:crypto'
import { afterEach, describe, expect, test } from 'vitest'
import { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { isUnfinished, stages, type Campaign, type Stage } from '@fleetkey/server/campaigns/campaign.ts'
import { behindOf, countsOf, needCampaign } from '@fleetkey/server/flows/campaign.ts'
import { advanceCampaign, approveCampaign, confirmCut, controlCampaign, retryCampaign, rollBack } from '@fleetkey/server/flows/campaign-order.ts'
import type { Context, Store } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { mayBeCut } from '@fleetkey/server/flows/cut.ts'
import { drive } from '@fleetkey/server/flows/drive.ts'
import { addMembers, createGroup, removeMember, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { destroyEpochs } from '@fleetkey/server/flows/old-epochs.ts'
import { reportUsage } from '@fleetkey/server/flows/report-usage.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { rotateCompromised, startRotation, type PolicyInput } from '@fleetkey/server/flows/rotate.ts'
import { rotateWhatIsDue } from '@fleetkey/server/flows/rotate-due.ts'
import { usedOf } from '@fleetkey/server/flows/usage.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { answeringFleet, plant, type AnsweringDevice } from './answering.ts'
import { operator, type TestContext } from './harness.ts'

const telemetry = KeyId.parse('telemetry')
const hour = 3_600_000
const bob: Caller = { kind: 'operator', id: 'bob', roles: ['owner'], from: 'test' }
const open: TestContext[] = []
afterEach(async () => {
  for (const ctx of open.splice(0)) await ctx.close()
})

/** A fleet whose devices are connected and use epoch 1. */
const openFleet = async (count: number, of: { recipientUsage?: number; onStep?: (name: string) => void } = {}) => {
  const { ctx, devices } = await answeringFleet(count, of.onStep === undefined ? {} : { onStep: of.onStep })
  open.push(ctx)
  const known = new Set<string>()
  /** Campaigns go on and devices answer, until nothing happens any more. `after`: between any two things. */
  const settle = async (after: () => Promise<void> | void = () => undefined, on: Context = ctx): Promise<void> => {
    for (let round = 0; round < 200; round++) {
      for (const id of ctx.woken.splice(0)) known.add(id)
      for (const id of known) {
        await drive(on, id)
        await after()
      }
      let heard = 0
      for (const device of devices) {
        heard += await device.answer(on)
        await after()
      }
      if (heard === 0 && ctx.woken.length === 0) return
    }
    throw new Error('it does not come to rest')
  }
  await createKey(ctx, operator(), { id: telemetry, protection: 'sealed', recipientUsage: of.recipientUsage ?? 0 })
  await grantKey(ctx, operator(), telemetry, plant)
  for (const device of devices) await device.connect()
  await settle()
  const rotate = async (policy: PolicyInput = {}, more: Partial<Parameters<typeof startRotation>[3]> = {}): Promise<string> =>
    (await startRotation(ctx, operator(), telemetry, { policy, because: 'test', ...more })).campaign
  const show = async (id: string): Promise<Campaign> => await needCampaign(ctx, id)
  /** Stages that occur, counted. */
  const counts = async (id: string): Promise<Partial<Record<Stage, number>>> => {
    const waves = await countsOf(ctx, await show(id))
    const all = stages.map((stage) => [stage, waves.reduce((sum, of_) => sum + of_[stage], 0)] as const)
    return Object.fromEntries(all.filter(([, count]) => count > 0))
  }
  const epoch = async (number: number) => await ctx.store.get('epoch', `${telemetry}/${number}`)
  return { ctx, devices, settle, rotate, show, counts, epoch, known }
}
type Fleet = Awaited<ReturnType<typeof openFleet>>

/** I2 for each device: the server can still open what it protects with. */
const allShare = async ({ devices, epoch }: Fleet): Promise<void> => {
  for (const device of devices) {
    const row = await epoch(device.current(telemetry))
    expect(row?.material, `${device.id} uses epoch ${device.current(telemetry)}, which is ${row?.state}`).not.toBeNull()
    expect(['active', 'deactivated', 'compromised']).toContain(row?.state)
  }
}

test('an undisturbed rotation: installed everywhere, activated, the old one retired and destroyed', async () => {
  const fleet = await openFleet(5)
  const id = await fleet.rotate({ waves: [{ devices: 1 }, 0.6, 1] })
  await fleet.settle(async () => await allShare(fleet))
  expect(await fleet.show(id)).toMatchObject({ state: 'done', sizes: [1, 2, 2] })
  expect(await fleet.counts(id)).toEqual({ retired: 5 })
  expect((await fleet.epoch(1))?.state).toBe('destroyed')
  for (const device of fleet.devices) expect(device.epochs(telemetry)).toEqual([2])
})

test('nobody is given up before it was told, however busy the server was', async () => {
  let late = 0
  const fleet = await openFleet(3, { onStep: (name) => name === 'rotate.prepare' && (fleet.ctx.clock.now += late) })
  late = 2 * hour
  const id = await fleet.rotate({ deadline: hour })
  await drive(fleet.ctx, id)
  expect(await fleet.counts(id)).toEqual({ delivered: 3 })
  await fleet.settle()
  expect(await fleet.counts(id)).toEqual({ retired: 3 })
})

test('who was given up while it installed and is connected is told of the epoch once it is in use, not at its next report', async () => {
  const fleet = await openFleet(3)
  const id = await fleet.rotate({ deadline: hour })
  await drive(fleet.ctx, id)
  // Lost on its way.
  expect(fleet.ctx.bus.take('gw-001')).toHaveLength(1)
  await fleet.devices[1]?.answer(fleet.ctx)
  await fleet.devices[2]?.answer(fleet.ctx)
  fleet.ctx.clock.now += hour
  await drive(fleet.ctx, id)
  expect(await fleet.show(id)).toMatchObject({ state: 'activating' })
  await fleet.settle()
  expect(await fleet.counts(id)).toEqual({ retired: 3 })
  for (const device of fleet.devices) expect(device.epochs(telemetry)).toEqual([2])
})

describe('who is a target', () => {
  const isTargets = ({ entries }: Parameters<Store['commit']>[0]): boolean => entries[0]?.detail.startsWith('targets ') === true
  /** The context with something between the decision on a commit and the commit itself, once. */
  const before = (ctx: Context, is: typeof isTargets, work: () => Promise<unknown>): Context => {
    let done = false
    const commit: Store['commit'] = async (changes, options) => {
      if (!done && is(changes)) {
        done = true
        await work()
      }
      return await ctx.store.commit(changes, options)
    }
    return { ...ctx, store: Object.assign(Object.create(ctx.store) as Store, { commit }) }
  }
  /** Nothing rotates because somebody leaves. */
  const stayingFleet = async (count: number): Promise<Fleet> => {
    const fleet = await openFleet(count)
    await setGroupPolicy(fleet.ctx, operator(), plant, { rotateOnLeave: false })
    return fleet
  }
  const targetOf = async ({ ctx }: Fleet, id: string, at: string): Promise<Stage | undefined> => (await ctx.store.get('target', `${id}/gw-00${at}`))?.stage

  test('not who leaves while its page is being written', async () => {
    const fleet = await stayingFleet(3)
    const id = await fleet.rotate()
    const leaves = before(fleet.ctx, isTargets, async () => await removeMember(fleet.ctx, operator(), plant, DeviceId.parse('gw-002')))
    await drive(leaves, id)
    expect([await targetOf(fleet, id, '1'), await targetOf(fleet, id, '2'), await targetOf(fleet, id, '3')]).toEqual(['delivered', undefined, 'delivered'])
    expect(await fleet.show(id)).toMatchObject({ sizes: [2] })
  })

  test('nor who is leaving when it is written: it is dropped again', async () => {
    const fleet = await stayingFleet(3)
    const id = await fleet.rotate()
    const isLeaving: typeof isTargets = ({ entries }) => entries[0]?.action === 'group.change'
    const driven = before(fleet.ctx, isLeaving, async () => {
      await drive(fleet.ctx, id)
      expect(await targetOf(fleet, id, '2')).toBe('delivered')
    })
    await removeMember(driven, operator(), plant, DeviceId.parse('gw-002'))
    expect(await targetOf(fleet, id, '2')).toBe('left')
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'done' })
  })

  test('who joins behind a page that was written has the epoch all the same, and is none', async () => {
    const fleet = await stayingFleet(4)
    await removeMember(fleet.ctx, operator(), plant, DeviceId.parse('gw-001'))
    await fleet.settle()
    const id = await fleet.rotate()
    const joins = before(
      fleet.ctx,
      ({ entries }) => entries[0]?.detail.includes('devices, ') === true,
      async () => {
        await addMembers(fleet.ctx, operator(), plant, { devices: [DeviceId.parse('gw-001')] })
      },
    )
    await drive(joins, id)
    await fleet.settle()
    expect(await targetOf(fleet, id, '1')).toBeUndefined()
    expect(await fleet.show(id)).toMatchObject({ state: 'done', sizes: [3] })
    expect(fleet.devices.map((device) => device.current(telemetry))).toEqual(
      Array.from({ length: 4 }, () => (fleet.devices[1] as AnsweringDevice).current(telemetry)),
    )
  })
})

describe('how fast', () => {
  test('no more than so many devices are at it, whoever connects meanwhile', async () => {
    const fleet = await openFleet(7)
    const [first, second] = fleet.devices as [AnsweringDevice, AnsweringDevice]
    for (const device of [first, second]) device.disconnect()
    const id = await fleet.rotate({ concurrency: 2 })
    let most = 0
    await fleet.settle(async () => {
      most = Math.max(most, (await fleet.counts(id)).delivered ?? 0)
      // Two that were away come back while the others are at it.
      if (most === 2) for (const device of [first, second]) await device.connect()
    })
    expect(most).toBe(2)
    expect(await fleet.show(id)).toMatchObject({ state: 'done' })
    expect(await fleet.counts(id)).toEqual({ retired: 7 })
  })

  test('outside its window nothing is installed, not even on a device that connects; nobody runs out of time', async () => {
    const fleet = await openFleet(3)
    // 2027-01-01T00:00Z: the window opens at two.
    const window = { from: 120, minutes: 60, days: [0, 1, 2, 3, 4, 5, 6], offset: 0 }
    const id = await fleet.rotate({ window, deadline: 600_000 })
    await fleet.settle()
    for (const device of fleet.devices) await device.report()
    await fleet.settle()
    expect(await fleet.counts(id)).toEqual({ pending: 3 })
    fleet.devices[2]?.disconnect()
    fleet.ctx.clock.now += 2 * hour
    await fleet.settle()
    expect(await fleet.counts(id)).toEqual({ installed: 2, pending: 1 })
    fleet.ctx.clock.now += 599_999
    await fleet.settle()
    expect(await fleet.counts(id)).toEqual({ installed: 2, pending: 1 })
    fleet.ctx.clock.now += 1
    await fleet.settle()
    expect(await fleet.counts(id)).toEqual({ active: 2, 'timed-out': 1 })
  })

  test('canaries go first; a wave soaks, and a person lets it pass', async () => {
    const fleet = await openFleet(4)
    const lab = GroupId.parse('lab')
    await createGroup(fleet.ctx, operator(), lab)
    await addMembers(fleet.ctx, operator(), lab, { devices: [DeviceId.parse('gw-003')] })
    const id = await fleet.rotate({ canary: lab, soak: hour, advance: 'manual' })
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'installing', wave: 0, waves: 2, sizes: [1, 3], succeededAt: fleet.ctx.clock.now })
    expect(fleet.devices.map((device) => device.epochs(telemetry))).toEqual([[1], [1], [1, 2], [1]])
    fleet.ctx.clock.now += hour
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ wave: 0 })
    await advanceCampaign(fleet.ctx, operator('operator'), id)
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ wave: 1 })
    fleet.ctx.clock.now += hour
    await fleet.settle()
    // Activation is a step that a person takes, too.
    expect(await fleet.show(id)).toMatchObject({ state: 'installing', wave: 1 })
    await advanceCampaign(fleet.ctx, operator(), id)
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'done' })
    await expect(advanceCampaign(fleet.ctx, operator(), id)).rejects.toMatchObject({ code: 'conflict' })
  })

  test('another person approves, and it starts at its time; nothing before', async () => {
    const fleet = await openFleet(2)
    const id = await fleet.rotate({ approval: true, startAt: fleet.ctx.clock.now + hour })
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'waiting' })
    await expect(approveCampaign(fleet.ctx, operator(), id)).rejects.toMatchObject({ code: 'forbidden' })
    await approveCampaign(fleet.ctx, bob, id)
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'scheduled' })
    fleet.ctx.clock.now += hour - 1
    await fleet.settle()
    for (const device of fleet.devices) expect(device.epochs(telemetry)).toEqual([1])
    fleet.ctx.clock.now += 1
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'done' })
    // Good for one use.
    await expect(approveCampaign(fleet.ctx, bob, id)).rejects.toMatchObject({ code: 'conflict' })
  })

  test('an approval that nobody gave in a day is none', async () => {
    const fleet = await openFleet(1)
    const id = await fleet.rotate({ approval: true })
    await fleet.settle()
    fleet.ctx.clock.now += 25 * hour
    await expect(approveCampaign(fleet.ctx, bob, id)).rejects.toMatchObject({ code: 'expired' })
    await controlCampaign(fleet.ctx, operator(), id, { order: 'abort' })
    expect((await fleet.epoch(2))?.state).toBe('destroyed')
  })
})

describe('who fails', () => {
  test('is tried again while its budget lasts', async () => {
    const fleet = await openFleet(2)
    const [weak] = fleet.devices as [AnsweringDevice]
    weak.habit = 'cannot-open'
    let tries = 0
    const id = await fleet.rotate({ retries: 3, errorThreshold: 0 })
    await fleet.settle(async () => {
      const target = await fleet.ctx.store.get('target', `${id}/${weak.id}`)
      tries = target?.attempts ?? 0
      if (tries === 2) weak.habit = 'answers'
    })
    expect(tries).toBe(2)
    expect(await fleet.show(id)).toMatchObject({ state: 'done' })
  })

  test('counts when it is used up, and halts; retried, it goes on from where it was', async () => {
    const fleet = await openFleet(4)
    const weak = fleet.devices.slice(0, 2)
    for (const device of weak) device.habit = 'cannot-open'
    const id = await fleet.rotate({ retries: 1, errorThreshold: 0.25 })
    await fleet.settle(async () => await allShare(fleet))
    expect(await fleet.show(id)).toMatchObject({ state: 'halted', resumeTo: 'installing', halted: 'wave 1: 2 of 4 failed' })
    // Resumed as it is it halts again.
    await controlCampaign(fleet.ctx, operator(), id, { order: 'resume' })
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'halted' })
    for (const device of weak) device.habit = 'answers'
    await retryCampaign(fleet.ctx, operator('operator'), id)
    await fleet.settle(async () => await allShare(fleet))
    expect(await fleet.show(id)).toMatchObject({ state: 'done', halted: null })
    expect(await fleet.counts(id)).toEqual({ retired: 4 })
  })

  test('exactly at its threshold it does not halt; one more, and it does', async () => {
    for (const [failing, state] of [
      [3, 'activating'],
      [4, 'halted'],
    ] as const) {
      const fleet = await openFleet(10)
      for (const device of fleet.devices.slice(0, failing)) device.habit = 'cannot-open'
      const id = await fleet.rotate({ errorThreshold: 0.3, successThreshold: 0.6 })
      await fleet.settle(async () => await allShare(fleet))
      expect(await fleet.show(id)).toMatchObject({ state })
    }
  })

  test('a campaign is taken back before its epoch was in use: everybody uses the one they used all along', async () => {
    const fleet = await openFleet(4)
    for (const device of fleet.devices.slice(2)) device.habit = 'cannot-open'
    const id = await fleet.rotate()
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'halted' })
    expect(await rollBack(fleet.ctx, operator('operator'), id)).toMatchObject({ id, state: 'rolled-back' })
    expect((await fleet.epoch(2))?.state).toBe('destroyed')
    await allShare(fleet)
    for (const device of fleet.devices) {
      device.habit = 'answers'
      await device.report()
      expect(device.current(telemetry)).toBe(1)
    }
    await fleet.settle()
    // The number is spent.
    await fleet.rotate()
    await fleet.settle(async () => await allShare(fleet))
    for (const device of fleet.devices) expect(device.epochs(telemetry)).toEqual([3])
  })

  test('a campaign is taken back after that: a further epoch replaces both, and each device shares one all the time', async () => {
    const fleet = await openFleet(4, { recipientUsage: hour })
    const weak = fleet.devices.slice(2)
    for (const device of weak) device.habit = 'cannot-use'
    const id = await fleet.rotate({ retries: 1 })
    await fleet.settle(async () => await allShare(fleet))
    expect(await fleet.show(id)).toMatchObject({ state: 'halted', resumeTo: 'activating' })
    expect(fleet.devices.map((device) => device.current(telemetry))).toEqual([2, 2, 1, 1])
    // However long it takes somebody to look at it: who uses epoch 1 can still be read, by everybody.
    fleet.ctx.clock.now += 30 * 24 * hour
    for (const device of fleet.devices) await device.report()
    await fleet.settle(async () => await allShare(fleet))
    for (const device of fleet.devices) expect(device.epochs(telemetry)).toContain(1)
    for (const device of weak) device.habit = 'answers'
    const next = await rollBack(fleet.ctx, operator(), id)
    expect(next).toMatchObject({ to: 3, because: `rollback of campaign ${id}` })
    expect(await fleet.show(id)).toMatchObject({ state: 'rolled-back' })
    await fleet.settle(async () => await allShare(fleet))
    fleet.ctx.clock.now += hour
    await fleet.settle(async () => await allShare(fleet))
    expect(await fleet.show(next.id)).toMatchObject({ state: 'done' })
    for (const device of fleet.devices) expect(device.epochs(telemetry)).toEqual([3])
  })

  test('only what stands still is taken back', async () => {
    const fleet = await openFleet(1)
    fleet.devices[0]?.disconnect()
    const id = await fleet.rotate()
    await fleet.settle()
    await expect(rollBack(fleet.ctx, operator(), id)).rejects.toMatchObject({ code: 'conflict' })
    await controlCampaign(fleet.ctx, operator(), id, { order: 'pause' })
    expect(await rollBack(fleet.ctx, operator(), id)).toMatchObject({ state: 'rolled-back' })
  })
})

describe('who belongs to it', () => {
  test.each([
    ['frozen', { retired: 2 }],
    ['live', { retired: 3 }],
  ] as const)('%s targets, and one that joins while it installs', async (targets, want) => {
    const fleet = await openFleet(3)
    const [joins, waits] = fleet.devices as [AnsweringDevice, AnsweringDevice]
    await removeMember(fleet.ctx, operator(), plant, joins.id)
    await fleet.settle()
    waits.disconnect()
    const id: string = await fleet.rotate({ targets })
    await fleet.settle()
    await addMembers(fleet.ctx, operator(), plant, { devices: [joins.id] })
    await fleet.settle()
    await waits.connect()
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'done', sizes: [Object.values(want)[0]] })
    expect(await fleet.counts(id)).toEqual(want)
    for (const device of fleet.devices) expect(device.current(telemetry)).toBe((await fleet.ctx.store.get('key', telemetry))?.current)
  })

  test.each([
    ['leaves', async ({ ctx }: Fleet, id: DeviceId): Promise<unknown> => await removeMember(ctx, operator(), plant, id)],
    ['is revoked', async ({ ctx }: Fleet, id: DeviceId): Promise<unknown> => await revokeDevice(ctx, operator(), id, 'stolen')],
  ] as const)('nobody waits for one that %s', async (_, goes) => {
    const fleet = await openFleet(3)
    const other = KeyId.parse('archive')
    await createKey(fleet.ctx, operator(), { id: other, protection: 'sealed', recipientUsage: 0 })
    const [dead] = fleet.devices as [AnsweringDevice]
    dead.disconnect()
    const id = await fleet.rotate()
    await fleet.settle()
    fleet.ctx.clock.now += hour
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'activating' })
    expect(await fleet.counts(id)).toEqual({ active: 2, 'timed-out': 1 })
    await goes(fleet, dead.id)
    await fleet.settle()
    const running = (await fleet.ctx.store.find('campaign', { limit: 10 })).filter(({ state }) => isUnfinished(state))
    fleet.ctx.clock.now += hour
    await fleet.settle()
    expect(running.every(({ state }) => state !== 'halted')).toBe(true)
    for (const device of fleet.devices.slice(1)) expect(device.epochs(telemetry)).toHaveLength(1)
  })

  test('without a new epoch: who has proven the one in use is already current', async () => {
    const fleet = await openFleet(4)
    const [behind] = fleet.devices as [AnsweringDevice]
    behind.disconnect()
    await fleet.rotate({ deadline: 1000 })
    await fleet.settle()
    fleet.ctx.clock.now += 1000
    await fleet.settle()
    const id = await fleet.rotate({}, { epoch: 'current' })
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ from: 2, to: 2, state: 'installing' })
    expect(await fleet.counts(id)).toEqual({ 'already-current': 3, pending: 1 })
    await behind.connect()
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'done' })
    expect(await fleet.counts(id)).toEqual({ 'already-current': 3, active: 1 })
    expect((await fleet.ctx.store.get('key', telemetry))?.latest).toBe(2)
  })
})

describe('who was away', () => {
  test('for five rotations is back with one exchange, reads what was written meanwhile, and its trail has no gap', async () => {
    const fleet = await openFleet(3, { recipientUsage: 24 * hour })
    const [away, other] = fleet.devices as [AnsweringDevice, AnsweringDevice]
    away.disconnect()
    const campaigns: string[] = []
    for (let count = 0; count < 5; count++) {
      campaigns.push(await fleet.rotate({ deadline: 1000 }))
      await fleet.settle(async () => await allShare(fleet))
      fleet.ctx.clock.now += 1000
      await fleet.settle(async () => await allShare(fleet))
    }
    expect(away.current(telemetry)).toBe(1)
    expect(other.epochs(telemetry)).toEqual([1, 2, 3, 4, 5, 6])
    const before = (await fleet.ctx.entries()).length
    await away.connect()
    // One answer to one report: in one commit, with one entry.
    const answers = (await fleet.ctx.entries()).slice(before).filter(({ action }) => action === 'key.deliver')
    expect(answers.map(({ detail }) => detail)).toEqual([
      'deliver telemetry/2 as readable; deliver telemetry/3 as readable; deliver telemetry/4 as readable; deliver telemetry/5 as readable; deliver telemetry/6 as active',
    ])
    expect(await away.answer()).toBe(5)
    expect(away.current(telemetry)).toBe(6)
    expect(away.epochs(telemetry)).toEqual([1, 2, 3, 4, 5, 6])
    for (let epoch = 1; epoch <= 6; epoch++)
      expect(away.held.get(`telemetry/${epoch}`)?.secret.equals(other.held.get(`telemetry/${epoch}`)?.secret as never)).toBe(true)
    for (let epoch = 1; epoch <= 6; epoch++)
      expect(await fleet.ctx.store.get('holding', `${away.id}/telemetry/${epoch}`)).toMatchObject({
        stage: epoch === 1 || epoch === 6 ? 'active' : 'installed',
        deliveredAt: expect.any(Number) as number,
        [epoch === 1 || epoch === 6 ? 'activeAt' : 'installedAt']: expect.any(Number) as number,
      })
    const said = (await fleet.ctx.entries()).filter(({ action, caller }) => action === 'device.acknowledge' && caller === `device:${away.id}`)
    for (let epoch = 2; epoch <= 5; epoch++) expect(said.filter(({ detail }) => detail === `telemetry/${epoch} installed`)).toHaveLength(1)
    expect(said.filter(({ detail }) => detail === 'telemetry/6 active')).toHaveLength(1)
    // When their time is over the old ones go, everywhere.
    fleet.ctx.clock.now += 24 * hour
    await fleet.settle(async () => await allShare(fleet))
    expect(await fleet.show(campaigns[4] ?? '')).toMatchObject({ state: 'done' })
    for (const device of fleet.devices) expect(device.epochs(telemetry)).toEqual([6])
  })

  test('and uses an old epoch can be read by everybody until it is back, however long that takes', async () => {
    const fleet = await openFleet(3)
    const [away, other] = fleet.devices as [AnsweringDevice, AnsweringDevice]
    away.disconnect()
    for (let count = 0; count < 3; count++) {
      await fleet.rotate({ deadline: 1000 })
      await fleet.settle()
      fleet.ctx.clock.now += 365 * 24 * hour
      await fleet.settle()
    }
    for (const device of fleet.devices.slice(1)) {
      await device.report()
      await device.answer()
    }
    await destroyEpochs(fleet.ctx, telemetry)
    expect(other.held.get('telemetry/1')?.secret.equals(away.held.get('telemetry/1')?.secret as never)).toBe(true)
    await allShare(fleet)
    await away.connect()
    await fleet.settle(async () => await allShare(fleet))
    for (const device of fleet.devices) expect(device.epochs(telemetry)).toEqual([4])
    for (const number of [1, 2, 3]) expect((await fleet.epoch(number))?.state).toBe('destroyed')
  })

  test('too many old epochs are not kept silently: the next rotation says so', async () => {
    const fleet = await openFleet(2)
    fleet.devices[0]?.disconnect()
    for (let count = 0; count < 12; count++) {
      await fleet.rotate({ deadline: 100 })
      await fleet.settle()
      fleet.ctx.clock.now += 1000
      await fleet.settle()
    }
    await expect(fleet.rotate()).rejects.toMatchObject({ code: 'conflict', reason: 'campaign.overlaps' })
    await createKeyPolicyDue(fleet)
    // Revoked, it is waited for no more.
    await revokeDevice(fleet.ctx, operator(), fleet.devices[0]?.id as DeviceId, 'lost')
    await fleet.settle()
    fleet.ctx.clock.now += hour
    await fleet.settle()
    expect(fleet.devices[1]?.epochs(telemetry)).toHaveLength(1)
    await fleet.rotate()
  })

  test('a strict end says first whom it would cut, and cuts nobody that no person agreed to', async () => {
    const fleet = await openFleet(5, { recipientUsage: hour })
    const away = fleet.devices.slice(0, 2)
    for (const device of away) device.disconnect()
    const preview = await mayBeCut(fleet.ctx, telemetry, { limit: 1 })
    expect(preview).toMatchObject({ devices: 5, count: 2, items: [{ device: away[0]?.id, because: 'away' }], next: away[0]?.id })
    expect((await mayBeCut(fleet.ctx, telemetry, { limit: 1, after: String(preview.next) })).items).toMatchObject([{ device: away[1]?.id }])
    await expect(fleet.rotate({ overlap: 'strict' })).rejects.toMatchObject({ code: 'conflict', reason: 'campaign.cut' })
    const id = await fleet.rotate({ overlap: 'strict', deadline: 1000 }, { mayCut: 2 })
    // A third one is gone before it has it.
    fleet.devices[2]?.disconnect()
    await fleet.settle()
    fleet.ctx.clock.now += 2 * hour
    await fleet.settle()
    fleet.ctx.clock.now += 2 * hour
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'activating', mayCut: 2 })
    expect(await behindOf(fleet.ctx, await fleet.show(id))).toBe(3)
    expect((await fleet.epoch(1))?.overlap).toBe(true)
    await expect(confirmCut(fleet.ctx, operator(), id, 2)).rejects.toMatchObject({ code: 'conflict' })
    await expect(confirmCut(fleet.ctx, operator('operator'), id, 3)).rejects.toMatchObject({ code: 'forbidden' })
    await confirmCut(fleet.ctx, operator(), id, 3)
    await fleet.settle()
    expect(await fleet.show(id)).toMatchObject({ state: 'done' })
    for (const device of fleet.devices.slice(3)) expect(device.epochs(telemetry)).toEqual([2])
    // Cut is not lost: it keeps what it has until it has proven the new one.
    await allShare(fleet)
    for (const device of away) await device.connect()
    await fleet.settle(async () => await allShare(fleet))
    for (const device of away) expect(device.epochs(telemetry)).toEqual([2])
  })
})

/** A due rotation that may not be started is not refused every minute: it is said, and nothing is written. */
const createKeyPolicyDue = async ({ ctx }: Fleet): Promise<void> => {
  const key = await ctx.store.get('key', telemetry)
  if (key === undefined) throw new Error('no key')
  await ctx.store.commit({
    writes: [{ table: 'key', do: 'update', row: { ...key, originatorUsage: 1 } }],
    entries: [{ at: 0, caller: 'test', from: 'test', action: 'test', subject: 'test', outcome: 'done', code: null, detail: '' }],
  })
  ctx.clock.now += 1
  const entries = (await ctx.entries()).length
  expect(await rotateWhatIsDue(ctx, telemetry)).toBeUndefined()
  expect(await ctx.entries()).toHaveLength(entries)
  expect(ctx.lines.at(-1)).toMatch(/a person has to decide/)
}

describe('what nobody orders', () => {
  test('an epoch is replaced when it was used for long enough, once', async () => {
    const fleet = await openFleet(2)
    const key = KeyId.parse('short')
    await createKey(fleet.ctx, operator(), { id: key, protection: 'sealed', originatorUsage: 24 * hour, recipientUsage: 0 })
    await grantKey(fleet.ctx, operator(), key, plant)
    await fleet.settle()
    fleet.ctx.clock.now += 24 * hour - 1
    expect(await rotateWhatIsDue(fleet.ctx, key)).toBeUndefined()
    fleet.ctx.clock.now += 1
    const id = await rotateWhatIsDue(fleet.ctx, key)
    expect(await rotateWhatIsDue(fleet.ctx, key)).toBeUndefined()
    expect(await fleet.show(String(id))).toMatchObject({ createdBy: 'system:rotation', because: 'originator-usage period of epoch 1 over' })
    await fleet.settle()
    expect(fleet.devices[0]?.epochs(key)).toEqual([2])
    expect(await rotateWhatIsDue(fleet.ctx, key)).toBeUndefined()
  })

  test('or for enough messages: all its holders together, counted once, and no more than there can be', async () => {
    const fleet = await openFleet(3)
    const key = KeyId.parse('busy')
    await createKey(fleet.ctx, operator(), { id: key, protection: 'sealed', usageLimit: 2 ** 32, recipientUsage: 0 })
    await grantKey(fleet.ctx, operator(), key, plant)
    await fleet.settle()
    const epoch = Epoch.parse(1)
    const used = async (device: number, messages: number): Promise<void> =>
      await reportUsage(fleet.ctx, fleet.devices[device]?.id as DeviceId, { key, epoch, messages })
    await used(0, Number.MAX_SAFE_INTEGER)
    // It has had it for no time.
    expect(await usedOf(fleet.ctx, 'busy/1')).toBe(1_000_000)
    fleet.ctx.clock.now += 24 * hour
    await used(0, 2 ** 30)
    await used(0, 2 ** 30)
    await used(0, 5)
    expect(await usedOf(fleet.ctx, 'busy/1')).toBe(2 ** 30)
    await reportUsage(fleet.ctx, DeviceId.parse('gw-999'), { key, epoch, messages: 2 ** 31 })
    await used(1, 2 ** 30 - 1)
    expect((await fleet.ctx.store.get('key', key))?.campaign).toBeUndefined()
    await used(2, 1)
    const { campaign } = (await fleet.ctx.store.get('key', key)) ?? {}
    expect((await fleet.show(String(campaign))).because).toMatch(/2147483648 messages under epoch 1/)
    await used(2, 10)
    await fleet.settle()
    expect(fleet.devices[0]?.current(key)).toBe(2)
    expect((await fleet.ctx.store.get('key', key))?.latest).toBe(2)
  })

  test('a compromised epoch is one at once, goes to nobody else, and is read by nobody once its successor is in use', async () => {
    const fleet = await openFleet(3, { recipientUsage: 24 * hour })
    const [away, late] = fleet.devices as [AnsweringDevice, AnsweringDevice]
    away.disconnect()
    late.disconnect()
    late.held.clear()
    const { campaign } = await rotateCompromised(fleet.ctx, operator('operator'), telemetry, 'laptop stolen')
    expect(await fleet.epoch(1)).toMatchObject({ state: 'compromised', compromisedAt: fleet.ctx.clock.now })
    await controlCampaign(fleet.ctx, operator(), campaign, { order: 'resume' }).catch(() => undefined)
    await late.connect()
    await late.answer()
    expect(late.epochs(telemetry)).toEqual([])
    await allShare({ ...fleet, devices: [away, ...fleet.devices.slice(2)] })
    await fleet.settle()
    // Nobody waits for the one that is away.
    fleet.ctx.clock.now += 60_000
    await fleet.settle()
    fleet.ctx.clock.now += 60_000
    await fleet.settle()
    expect(await fleet.show(campaign)).toMatchObject({ state: 'done' })
    for (const device of fleet.devices.slice(1)) expect(device.epochs(telemetry)).toEqual([2])
    await away.connect()
    await fleet.settle()
    expect(away.epochs(telemetry)).toEqual([2])
    expect((await fleet.epoch(1))?.state).toBe('compromised')
    fleet.ctx.clock.now += 24 * hour
    await destroyEpochs(fleet.ctx, telemetry)
    expect((await fleet.epoch(1))?.state).toBe('destroyed')
  })
})

test('overlapping campaigns of two keys: one exchange, in order', async () => {
  const fleet = await openFleet(2)
  const archive = KeyId.parse('archive')
  await createKey(fleet.ctx, operator(), { id: archive, protection: 'sealed', recipientUsage: 0 })
  await grantKey(fleet.ctx, operator(), archive, plant)
  await fleet.settle()
  const [away] = fleet.devices as [AnsweringDevice]
  away.disconnect()
  for (const key of [telemetry, archive, telemetry])
    await startRotation(fleet.ctx, operator(), key, { policy: { deadline: 1000 }, because: 'test', supersede: 'aborted' })
  await fleet.settle()
  fleet.ctx.clock.now += 1000
  await fleet.settle()
  away.heard.length = 0
  await away.connect()
  await away.answer()
  expect(away.heard).toEqual(['delivery archive/2', 'delivery telemetry/3'])
  await fleet.settle()
  expect([away.epochs(archive), away.epochs(telemetry)]).toEqual([[2], [3]])
  // Of one key there is one campaign at a time.
  const states = (await fleet.ctx.store.find('campaign', { limit: 10 })).map(({ key, to, state }) => `${key}/${to} ${state}`).toSorted()
  expect(states).toEqual(['archive/2 done', 'telemetry/2 aborted', 'telemetry/3 done'])
})

test('an event costs what is left to do, not the fleet', async () => {
  const fleet = await openFleet(100)
  for (const device of fleet.devices.slice(0, 4)) device.disconnect()
  const { ctx } = fleet
  const id = await fleet.rotate()
  await fleet.settle()
  expect(await fleet.counts(id)).toEqual({ installed: 96, pending: 4 })
  const [late] = fleet.devices as [AnsweringDevice]
  await late.connect()
  let rows = 0
  const counting: Store = {
    ...ctx.store,
    get: (async (table: never, key: string) => (rows++, await ctx.store.get(table, key))) as Store['get'],
    find: (async (table: never, query: never) => {
      const found: readonly unknown[] = await ctx.store.find(table, query)
      rows += found.length
      return found
    }) as Store['find'],
  }
  const counted: Context = { ...ctx, store: counting }
  await drive(counted, id)
  // The first look of a process goes through what is pending once.
  expect(rows).toBeLessThan(20)
  rows = 0
  await late.answer(counted)
  await drive(counted, id)
  expect(rows).toBeLessThan(80)
})

describe('a crash at any step', () => {
  /** What an operator goes through with a campaign: approved, by waves, with a failing device, retried, taken back, ordered anew, a device that was away. */
  const story = async (fleet: Fleet, on: Context, done: { repaired: boolean }): Promise<void> => {
    const { ctx, devices, settle, epoch } = fleet
    const [away, weak] = devices as [AnsweringDevice, AnsweringDevice]
    const find = async (to: number): Promise<Campaign | undefined> => (await ctx.store.find('campaign', { limit: 20 })).find((one) => one.to === to)
    const latest = async (): Promise<number> => (await ctx.store.get('key', telemetry))?.latest ?? 0
    const at = async (to: number): Promise<string> => (await find(to))?.state ?? 'none'
    const id = async (to: number): Promise<string> => (await find(to))?.id ?? ''
    const policy = { waves: [0.5, 1], approval: true, errorThreshold: 0.2, soak: 1000, startAt: 0 }
    away.disconnect()
    if (!done.repaired) weak.habit = 'cannot-open'
    if ((await latest()) === 1) await startRotation(on, operator(), telemetry, { policy, because: 'first' })
    await settle(undefined, on)
    if ((await at(2)) === 'waiting') await approveCampaign(on, bob, await id(2))
    for (const _ of [0, 1]) {
      await settle(undefined, on)
      ctx.clock.now += 2 * hour
    }
    await settle(undefined, on)
    expect(['halted', 'rolled-back']).toContain(await at(2))
    if ((await at(2)) === 'halted') await rollBack(on, operator(), await id(2))
    if ((await latest()) === 2) await startRotation(on, operator(), telemetry, { policy: { waves: [0.5, 1], errorThreshold: 0.2 }, because: 'second' })
    for (const _ of [0, 1]) {
      await settle(undefined, on)
      ctx.clock.now += 2 * hour
    }
    await settle(undefined, on)
    weak.habit = 'answers'
    done.repaired = true
    if ((await at(3)) === 'halted') await retryCampaign(on, operator(), await id(3))
    for (const _ of [0, 1, 2]) {
      await settle(undefined, on)
      ctx.clock.now += 2 * hour
    }
    await settle(undefined, on)
    await away.connect(on)
    await settle(undefined, on)
    expect(await at(3)).toBe('done')
    // As the clock does every minute.
    await destroyEpochs(on, telemetry)
    expect((await epoch(1))?.state).toBe('destroyed')
  }

  /** The story from its beginning; the server dies at the step with this number. The steps that it went through before. */
  const run = async (crashAt: number): Promise<readonly string[]> => {
    const steps: string[] = []
    let left = Number.POSITIVE_INFINITY
    let died: string | undefined
    let started = false
    const fleet = await openFleet(4, {
      onStep: (name) => {
        if (started && died === undefined) steps.push(name)
        if (--left > 0) return
        left = Number.POSITIVE_INFINITY
        died = name
        throw new Error('power')
      },
    })
    left = crashAt
    started = true
    const { ctx } = fleet
    const done = { repaired: false }
    // The same in every run, or a step would have another number: the order of the waves follows from it.
    let drawn = 0
    const random = (length: number): Uint8Array => new Uint8Array(createHash('sha256').update(`story ${++drawn}`).digest().subarray(0, length))
    for (let start = 0; ; start++) {
      // A process that starts: nothing in its memory, every unfinished campaign is looked at.
      const on: Context = { ...ctx, random, store: { ...ctx.store } }
      for (const { id, state } of await ctx.store.find('campaign', { limit: 20 })) if (isUnfinished(state)) fleet.known.add(id)
      try {
        await story(fleet, on, done)
        break
      } catch (thrown) {
        if (!(thrown instanceof Error) || thrown.message !== 'power' || start > 0)
          throw new Error(`killed at ${died ?? 'nothing'} (${crashAt})`, { cause: thrown })
        // Devices lose their connection with it, and come back.
        for (const device of fleet.devices) device.disconnect()
        for (const device of fleet.devices.slice(1)) await device.connect()
      }
    }
    await allShare(fleet)
    for (const device of fleet.devices) expect(device.current(telemetry), `killed at ${died ?? 'nothing'}`).toBe(3)
    for (const campaign of await ctx.store.find('campaign', { limit: 20 })) {
      const all = (await countsOf(ctx, campaign)).flatMap((wave) => Object.values(wave)).reduce((sum, count) => sum + count, 0)
      expect(all).toBe(campaign.sizes.reduce((sum, size) => sum + size, 0))
    }
    const log = (await ctx.entries()).map(({ action, subject, outcome, detail }) => `${action} ${subject} ${outcome} ${detail}`)
    const once = log.filter((line) => /^device\.acknowledge .* done telemetry\/\d+ (installed|active)$/.test(line))
    expect(new Set(once).size, `killed at ${died ?? 'nothing'}`).toBe(once.length)
    await ctx.close()
    open.splice(open.indexOf(ctx), 1)
    expect(died !== undefined).toBe(Number.isFinite(crashAt))
    return steps
  }

  test('the whole story is told all the same', { timeout: 120_000 }, async () => {
    const steps = await run(Number.POSITIVE_INFINITY)
    const wanted = ['rotate.started', 'rotate.targets', 'rotate.prepare', 'approval.granted', 'rotate.start', 'rotate.soak', 'rotate.halt', 'rotate.open-wave']
    for (const step of [
      ...wanted,
      'rotate.time-out',
      'rotate.timed-out',
      'campaign.rollback',
      'campaign.retried',
      'campaign.retry',
      'rotate.activate',
      'rotate.retire',
      'rotate.finish',
    ])
      expect(steps, step).toContain(step)
    // Each step once, the first time it is come to; in the long run each time.
    const points = steps.flatMap((step, at) => (process.env['FLEETKEY_LONG'] === '1' || steps.indexOf(step) === at ? [at] : []))
    for (const at of points) expect((await run(at + 1)).at(-1)).toBe(steps[at])
    process.stdout.write(`campaigns: killed at ${points.length} of ${steps.length} points, ${new Set(steps).size} steps\n`)
  })
})
