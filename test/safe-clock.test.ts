import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { safeClock } from '@fleetkey/device-agent/safe-clock.ts'
import type { Board } from '@fleetkey/firmware-sim/board/board.ts'
import { readClockState, type ClockState } from '@fleetkey/tpm2/clock.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport } from '@fleetkey/tpm2/transport.ts'
import { hasProgram } from './programs.ts'
import { startSwtpm } from './swtpm.ts'
import { openWorld, random, until, type Machine, type World } from './world.ts'

const minutes = (n: number): number => n * 60_000
const clock = (safeWithin: number): ClockState => ({ resetCount: 1, restartCount: 0, safe: safeWithin === 0, safeWithin })

describe('waiting for a clock', () => {
  /** A clock that becomes safe after this many milliseconds, whatever it says. */
  const wait = async (after: number, says: (left: number) => number = (left) => left) => {
    const pauses: number[] = []
    const told: string[] = []
    let passed = 0
    const safe = await safeClock({
      read: async () => clock(passed >= after ? 0 : Math.max(1, says(after - passed))),
      pause: async (milliseconds) => {
        pauses.push(milliseconds)
        passed += milliseconds
      },
      tell: (words) => void told.push(words),
    })
    return { safe, pauses, told, passed }
  }
  test('that is safe: not at all', async () => expect(await wait(0)).toEqual({ safe: true, pauses: [], told: [], passed: 0 }))
  test('of a chip: as long as it says, looking at it twice a minute', async () => {
    const { safe, pauses, told, passed } = await wait(minutes(70))
    expect([safe, passed]).toEqual([true, minutes(70)])
    expect(Math.max(...pauses)).toBeLessThanOrEqual(30_000)
    expect(told[0]).toBe('the TPM calls its clock unsafe after a power cut; it becomes safe within 1 h 10 min; waiting')
    expect(told.at(-1)).toMatch(/within 30 s; waiting$/)
  })
  test('that is a little late', async () => expect((await wait(5, () => 1)).safe).toBe(true))
  test('that never becomes safe: not for ever', async () => {
    const { safe, passed } = await wait(Infinity, () => minutes(70))
    expect(safe).toBe(false)
    expect(passed).toBeLessThan(minutes(90))
  })
})

test.skipIf(!hasProgram('swtpm'))('swtpm after a power cut: unsafe for no longer than it says', { timeout: 60_000 }, async () => {
  const swtpm = await startSwtpm()
  const look = async <R>(work: (tpm: Tpm) => Promise<R>): Promise<R> => {
    const transport = await openTransport(swtpm.spec)
    try {
      const tpm = new Tpm(transport, { random })
      await tpm.startup()
      return await work(tpm)
    } finally {
      await transport.close()
    }
  }
  try {
    await look(async (tpm) => await tpm.shutdown())
    await swtpm.restart()
    expect(await look(readClockState)).toMatchObject({ safe: true, safeWithin: 0 })
    await swtpm.restart()
    const cut = await look(readClockState)
    expect(cut.safe).toBe(false)
    expect(cut.safeWithin).toBeLessThanOrEqual(2 ** 22)
    expect(cut.safeWithin).toBeGreaterThan(0)
    // The interval of this implementation is seconds; waited for only then.
    expect(cut.safeWithin).toBeLessThan(20_000)
    await new Promise((resolve) => void setTimeout(resolve, cut.safeWithin + 500))
    expect((await look(readClockState)).safe).toBe(true)
  } finally {
    await swtpm.stop()
  }
})

describe('a board after a power cut', () => {
  let world: World
  let board: Machine & { readonly board: Board }
  beforeAll(async () => {
    world = await openWorld()
    board = await world.simulated('GW-1')
    await world.enlist([board], 'plant')
  }, 60_000)
  afterAll(async () => await world.stop())

  const refusals = async () =>
    (await world.client.call('audit.list', { query: { after: 0, limit: 1000 } })).items.filter(
      ({ action, outcome }) => action.startsWith('enrol') && outcome === 'refused',
    )
  const clockSafe = async () => (await world.client.call('device.show', { params: { id: 'gw-1' } })).claims.find(({ name }) => name === 'clock-safe')?.value

  test('enrols for the first time without a refusal: the agent waits for the clock, and says so', { timeout: 90_000 }, async () => {
    board.board.boot({ shutdown: 'none' })
    expect((await readClockState(new Tpm(await board.openTpm(), { random }))).safe).toBe(false)
    const agent = world.agent(board)
    const problems = new Set<string>()
    agent.onChange(({ problem }) => void problems.add(problem ?? ''))
    await until('enrolled', () => agent.status().connected, 60_000)
    expect([...problems].join('\n')).toMatch(/^the TPM calls its clock unsafe after a power cut; it becomes safe within \d s; waiting$/m)
    expect(world.lines.filter((line) => line.includes('GW-1: the TPM calls its clock safe'))).toHaveLength(1)
    expect(agent.status().problem).toBeNull()
    expect([await refusals(), await clockSafe()]).toEqual([[], 'yes'])
    await agent.stop()
  })

  test('enrolled, it attests at once: its record explains the clock', { timeout: 90_000 }, async () => {
    board.board.boot({ shutdown: 'none' })
    const before = world.lines.length
    const agent = world.agent(board)
    await until('attested', async () => (await clockSafe()) === 'no', 60_000)
    expect(world.lines.slice(before).filter((line) => line.includes('unsafe'))).toEqual([])
    expect((await world.client.call('device.show', { params: { id: 'gw-1' } })).state).toBe('enrolled')
    await agent.stop()
  })
})
