import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Release } from '@fleetkey/firmware-sim/release/release.ts'
import type { Changes, Context, Store } from '@fleetkey/server/flows/context.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { withdrawRelease } from '@fleetkey/server/flows/withdraw-release.ts'
import type { Evidence } from './invariants/evidence.ts'
import { boundKeysStayInTheirTpm, nothingStaysOwed, withdrawnFirmwareOpensNothing } from './invariants/invariants.ts'
import { evidenceOf } from './invariants/agent-evidence.ts'
import { openBoard, type SimulatedBoard } from './simulation/board.ts'
import { diceOf } from './simulation/dice.ts'
import { idOf, openedByThieves } from './simulation/firmware.ts'
import { openNetwork } from './simulation/network.ts'
import { startSimulatedServer } from './simulation/server.ts'
import { virtualTime, type VirtualTime } from './simulation/time.ts'
import { alice, firmware, makeFleet, type Fleet } from './simulation/world.ts'

let fleet: Fleet
beforeAll(async () => void (fleet = await makeFleet(3, 2)), 60_000)
afterAll(async () => await fleet.close())

type Write = Changes['writes'][number]

/** The store of a server that forgets to write some of what it should. */
const forgetful = (store: Store, forgets: (write: Write) => boolean): Store =>
  new Proxy(store, {
    get: (of, name: keyof Store) =>
      name !== 'commit'
        ? (of[name] as (...args: readonly unknown[]) => unknown).bind(of)
        : async (changes: Changes, options?: Parameters<Store['commit']>[1]) =>
            await of.commit({ ...changes, writes: changes.writes.filter((write) => !forgets(write)) }, options),
  })

interface Running {
  readonly ctx: Context
  readonly store: Store
  readonly time: VirtualTime
  readonly boards: readonly SimulatedBoard[]
  /** The disk is full when this step is next reached, until `makeRoom`. */
  fillAt(step: string): void
  makeRoom(): void
}

/** A copy of the fleet, all switched on and connected. */
const running = async <R>(story: (of: Running) => Promise<R>, forgets: (write: Write) => boolean = () => false): Promise<R> => {
  let fullAt: string | undefined
  let isFull = false
  const time = virtualTime(fleet.at)
  const dice = diceOf(5)
  const network = openNetwork({ time, dice })
  const store = forgetful(fleet.store.fork(), forgets)
  const log = (): void => undefined
  const boards = fleet.boards.map((made) => openBoard({ ...made, network, time, dice, log, trust: fleet.trust, inUse: log }))
  try {
    const step = (name: string): void => {
      if (name !== fullAt) return
      fullAt = undefined
      isFull = true
    }
    const world = { store, kms: fleet.kms, network, time, random: dice.bytes, log, step, isFull: () => isFull, begun: log }
    const { ctx, crash } = await startSimulatedServer(world)
    for (const board of boards) board.switchOn()
    await time.run(30_000, () => boards.every(({ agent }) => agent?.status().connected === true))
    const told = await story({ ctx, store, time, boards, fillAt: (name) => void (fullAt = name), makeRoom: () => void (isFull = false) })
    crash()
    return told
  } finally {
    for (const board of boards) board.cut()
    time.end()
  }
}

const using = (boards: readonly SimulatedBoard[], epoch: number): boolean =>
  boards.every(({ agent, hasTpm }) => fleet.keys.every(({ id, protection }) => agent?.status().current[id] === epoch || (protection === 'tpm' && !hasTpm)))
const stateOf = async (store: Store): Promise<readonly (string | undefined)[]> =>
  await Promise.all(['b-1', 'b-2', 'b-3'].map(async (id) => (await store.get('device', id))?.state))

/** A release comes, and is put on every board that measures what it runs. */
const updated = async (ctx: Context, boards: readonly SimulatedBoard[], release: Release): Promise<void> => {
  await importRelease(ctx, alice, fleet.reference(release))
  for (const board of boards.filter(({ hasTpm }) => hasTpm)) {
    board.install(release)
    board.switchOn()
  }
}

/** A release is withdrawn after everybody has the next one; what is left then. `clone`: the second board has a copy of the TPM of the first. */
const withdrawal = async (of: { readonly forgets?: (write: Write) => boolean; readonly clone?: boolean } = {}): Promise<readonly string[]> =>
  await running(async ({ ctx, store, time, boards }) => {
    const [first, second] = [firmware(1), firmware(2)]
    await updated(ctx, boards, second)
    await time.run(30_000)
    await withdrawRelease(ctx, alice, idOf(first), 'a hole')
    await time.run(600_000, () => using(boards, 2))
    // Old epochs are erased, what is owed is done.
    await time.run(300_000)
    const thieves = boards.map((board, at) => ({
      board: of.clone === true && at === 1 ? { ...board, device: board.device, hasTpm: true, blank: () => (boards[0] ?? board).blank() } : board,
      copies: [fleet.boards[at]?.contents ?? new Map<string, Uint8Array>()],
    }))
    const opened = await openedByThieves({ fleet, store, time, dice: diceOf(1), boards: thieves })
    const devices = boards.flatMap(({ device, agent }) => (agent === undefined ? [] : [evidenceOf(device, agent)]))
    const evidence: Evidence = { store, devices, opened, history: [], log: '', auditKey: fleet.auditKey }
    const found: string[] = opened.length === 5 ? [] : [`${opened.length} tries`]
    for (const invariant of [withdrawnFirmwareOpensNothing, boundKeysStayInTheirTpm, nothingStaysOwed])
      try {
        await invariant(evidence)
      } catch (thrown) {
        found.push(thrown instanceof Error ? thrown.message : String(thrown))
      }
    return found
  }, of.forgets)

const isSetting = (write: Write, prefix: string): boolean => write.table === 'setting' && (write.do === 'delete' ? write.id : write.row.id).startsWith(prefix)

describe('a release that is withdrawn', { timeout: 180_000 }, () => {
  test('opens nothing that is in use, no medium opens beside another TPM, nothing stays owed', async () => expect(await withdrawal()).toEqual([]))

  test.each([
    [
      'rotates nothing',
      /^I25: b-[12] opens [a-z-]+\/1, which is in use, with gateway\/1.0 on copy 1/,
      (write: Write) => isSetting(write, 'owed-rotation/withdraw/'),
    ],
    [
      'leaves the keys under the approvals that it has',
      /^I25: b-[12] opens [a-z-]+\/2, which is in use, with gateway\/1.0 on its medium/,
      (write: Write) => isSetting(write, 'firmware/'),
    ],
    ['stays owed', /^I27/, (write: Write) => write.do === 'delete' && isSetting(write, 'owed-rotation/')],
  ] as const)('is found when it %s', async (_, what, forgets) => expect((await withdrawal({ forgets })).join('\n')).toMatch(what))

  test('a medium that opens beside a copy of its TPM is found', async () =>
    expect((await withdrawal({ clone: true })).join('\n')).toMatch(/^I26: what b-1 has/))

  test('and was the only one: its boards start, connect and get nothing new; the next release brings them back', async () =>
    await running(async ({ ctx, store, time, boards }) => {
      const measured = boards.slice(0, 2)
      await withdrawRelease(ctx, alice, idOf(firmware(1)), 'a hole')
      await time.run(120_000)
      for (const board of measured) board.switchOn()
      await time.run(120_000)
      // Their old epochs open as they did, as nothing else does.
      expect(measured.map(({ agent }) => [agent?.status().connected, agent?.status().current['telemetry']])).toEqual([
        [true, 1],
        [true, 1],
      ])
      expect(await stateOf(store)).toEqual(['quarantined', 'quarantined', 'enrolled'])
      await updated(ctx, boards, firmware(2))
      await time.run(300_000, () => using(boards, 2))
      expect([await stateOf(store), using(boards, 2)]).toEqual([['enrolled', 'enrolled', 'enrolled'], true])
    }))

  test.each(['release.withdrawn', 'appraisal.settled', 'rotation.kicked'])(
    'and the disk is full after %s: with room again everybody has new keys, though nobody connects anew',

    async (step) =>
      await running(async ({ ctx, store, time, boards, fillAt, makeRoom }) => {
        await updated(ctx, boards, firmware(2))
        await time.run(30_000)
        fillAt(step)
        await expect(withdrawRelease(ctx, alice, idOf(firmware(1)), 'a hole')).rejects.toThrow('the disk is full')
        makeRoom()
        await time.run(200_000)
        expect([await stateOf(store), using(boards, 2)]).toEqual([['enrolled', 'enrolled', 'enrolled'], true])
      }),
  )

  test('and an older disk takes the place of one that had the keys made since: it makes new ones', async () =>
    await running(async ({ ctx, time, boards }) => {
      await updated(ctx, boards, firmware(2))
      await time.run(30_000)
      // Of a time when both releases were approved: it opens, but for the recipient key that came with the withdrawal.
      const [board] = boards
      const older = board?.medium.contents() ?? new Map()
      await withdrawRelease(ctx, alice, idOf(firmware(1)), 'a hole')
      await time.run(200_000)
      expect(using(boards, 2)).toBe(true)
      board?.restore(older)
      board?.switchOn()
      // It says what it could not open, is asked for a new key, and has everything with its next report, five minutes later.
      await time.run(400_000)
      expect([board?.agent?.status().current['telemetry'], using(boards, 2)]).toEqual([2, true])
    }))
})
