import { expect, test } from 'vitest'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { caStatus } from '@fleetkey/server/flows/ca-status.ts'
import type { Context } from '@fleetkey/server/flows/context.ts'
import { activateCa, distributeCa, prepareCa, retireCa, taintCa } from '@fleetkey/server/flows/rollover.ts'
import { grantApproval } from '@fleetkey/server/flows/second-person.ts'
import { theNextCaWasKnown } from './invariants/invariants.ts'
import { openBoard, type SimulatedBoard } from './simulation/board.ts'
import { diceOf } from './simulation/dice.ts'
import { openNetwork } from './simulation/network.ts'
import { startSimulatedServer } from './simulation/server.ts'
import { virtualTime } from './simulation/time.ts'
import { alice, makeFleet } from './simulation/world.ts'

const count = Number(process.env['FLEETKEY_FLEET'] ?? (process.env['FLEETKEY_LONG'] === '1' ? 10_000 : 200))
/** Off while the next CA is made known, activated and the old one tainted; and of these, off until that is retired. */
const away = Math.round(count * 0.05)
const longAway = Math.max(1, Math.round(away / 10))
const hour = 3_600_000
const bob: Caller = { kind: 'operator', id: 'bob', roles: ['owner'], from: 'simulation' }

// The real server and the real agents in virtual time: TLS, MQTT and SQLite are in test/rollover-fleet.test.ts, with fewer boards.
test(`${count} simulated boards through a new root and a new CA, ${away} of them off: none is stranded`, { timeout: 120_000 + count * 600 }, async () => {
  const begun = process.hrtime.bigint()
  const sinceBegun = (): number => Number(process.hrtime.bigint() - begun) / 1e9
  /** To be seen while it runs: a large one takes a while. */
  const progress = (what: string, milliseconds: number): void => {
    const { user, system } = process.cpuUsage()
    if (count >= 1_000)
      process.stderr.write(
        `rollover: ${what}, ${Math.round(milliseconds / 1_000)} virtual s, ${Math.round(sinceBegun())} s, CPU ${Math.round((user + system) / 1e6)} s\n`,
      )
  }
  const fleet = await makeFleet(count)
  const made = sinceBegun()
  progress('enrolled', 0)
  const time = virtualTime(fleet.at)
  const boards: SimulatedBoard[] = []
  try {
    const dice = diceOf(1)
    const network = openNetwork({ time, dice })
    const store = fleet.store.fork()
    const { ctx, crash } = await startSimulatedServer({
      store,
      kms: fleet.kms,
      network,
      time,
      random: dice.bytes,
      log: () => undefined,
      step: () => undefined,
      isFull: () => false,
      begun: () => undefined,
    })
    for (const one of fleet.boards)
      boards.push(openBoard({ ...one, trust: fleet.trust, network, time, dice: dice.fork(), log: () => undefined, inUse: () => undefined }))
    const [asleep, awake] = [boards.slice(0, away), boards.slice(away)]
    for (const board of awake) board.switchOn()
    const connected = (of: readonly SimulatedBoard[]) => () => of.every(({ agent }) => agent?.status().connected === true)
    /** Runs until it holds, which is asked now and then. */
    const reached = async (what: string, hours: number, holds: (ctx: Context) => Promise<boolean> | boolean): Promise<void> => {
      let last = 0
      const is = await time.run(hours * hour, async () => {
        if (time.now() - last < 5_000) return false
        last = time.now()
        return await holds(ctx)
      })
      progress(what, time.now() - fleet.at)
      expect(is, what).toBe(true)
    }
    const acknowledged = async (): Promise<number> => (await caStatus(ctx)).readiness.acknowledged
    const under = async (): Promise<number> => (await caStatus(ctx)).generations[0]?.devices ?? count

    await reached('those that are there are connected', 1, connected(awake))
    await prepareCa(ctx, alice, { root: true })
    await distributeCa(ctx, alice)
    await reached('they have acknowledged the next CA', 2, async () => (await acknowledged()) === count - away)
    await activateCa(ctx, alice, null)
    await reached('and that it signs', 2, async () => (await acknowledged()) === count - away)
    await taintCa(ctx, alice, { within: 600 })
    await reached('they have renewed', 4, async () => (await under()) === away)
    for (const board of asleep.slice(longAway)) board.switchOn()
    await reached('those that slept have renewed', 4, async () => (await under()) === longAway)

    // Somebody is still away: nobody retires that CA alone.
    const asked = await retireCa(ctx, alice, { force: null }).catch((thrown: unknown) => thrown as Error)
    expect(asked).toBeInstanceOf(Error)
    const { approval } = await retireCa(ctx, alice, { force: { reason: 'the last ones come back by themselves' } })
    await grantApproval(ctx, bob, approval ?? '')
    await retireCa(ctx, alice, { force: { reason: 'the last ones come back by themselves' } })
    await time.run(hour / 6)
    for (const board of asleep.slice(0, longAway)) board.switchOn()
    await reached('those that slept through all of it are back', 4, connected(boards))
    await reached('everybody trusts the new root alone', 2, async () => (await acknowledged()) === count)
    const { readiness, generations } = await caStatus(ctx)
    expect(readiness).toMatchObject({ devices: count, acknowledged: count, stranded: 0 })
    expect(generations.map(({ state }) => state)).toEqual(['retired', 'active'])
    await theNextCaWasKnown({ store })
    const took = sinceBegun()
    process.stdout.write(
      `rollover of ${count} simulated boards, ${away} off, ${longAway} of them through all of it: ${((time.now() - fleet.at) / hour).toFixed(1)} virtual hours in ` +
        `${(took - made).toFixed(0)} s, after ${made.toFixed(0)} s of enrolment, ` +
        `${Math.round(process.resourceUsage().maxRSS / 1024)} MiB; 0 stranded\n`,
    )
    for (const board of boards) board.cut()
    crash()
  } finally {
    for (const board of boards) board.cut()
    time.end()
    await fleet.close()
  }
})
