import { afterAll, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { openWorld, until, type World } from './world.ts'
import { rolloverHolds } from './rollover-evidence.ts'

const count = Number(process.env['FLEETKEY_FLEET'] ?? (process.env['FLEETKEY_LONG'] === '1' ? 10_000 : 200))
const away = Math.round(count * 0.05)
const patience = 60_000 + count * 300
/** Boards that start at the same time, and bytes of memory for each of them. */
const atOnce = 32
/** Boards of one manifest. */
const inBatch = 2_000

let world: World | undefined
afterAll(async () => await world?.stop(), patience)

/** Asks now and then: each answer has the server read every device. */
const eventually = async (what: string, holds: () => Promise<boolean>): Promise<void> =>
  await until(
    what,
    async () => {
      if (await holds()) return true
      await new Promise((resolve) => void setTimeout(resolve, count))
      return false
    },
    patience,
  )

const inTurns = async <I>(items: readonly I[], work: (item: I) => Promise<unknown>): Promise<void> => {
  const left = [...items]
  await Promise.all(
    Array.from({ length: atOnce }, async () => {
      for (let item = left.shift(); item !== undefined; item = left.shift()) await work(item)
    }),
  )
}

test(`${count} boards through a rollover of the CA, 5 % of them off meanwhile: none is stranded`, { timeout: 10 * patience }, async () => {
  // Apart: ten thousand connections have ten thousand sockets at each end.
  world = await openWorld({ apart: true })
  const now = world
  const seconds: Record<string, number> = {}
  const timed = async (what: string, work: () => Promise<unknown>): Promise<void> => {
    const begun = Date.now()
    await work()
    seconds[what] = (Date.now() - begun) / 1000
  }
  const machines: Awaited<ReturnType<World['simulated']>>[] = []
  await timed(
    'boards',
    async () =>
      await inTurns(
        Array.from({ length: count }, (_, at) => `RF-${at}`),
        async (serial) => {
          machines.push(await now.simulated(serial))
          // Making one never waits: what the server says meanwhile, that it closes an idle connection, is to be heard.
          await new Promise((resolve) => void setImmediate(resolve))
        },
      ),
  )
  for (let at = 0; at < count; at += inBatch) await now.enlist(machines.slice(at, at + inBatch), 'gateways')
  const agents = new Map<string, Agent>()
  const start = async (of: readonly (typeof machines)[number][]): Promise<void> =>
    await inTurns(of, async (machine) => {
      const agent = now.agent(machine)
      agents.set(machine.serial, agent)
      await until(`${machine.serial} is connected`, () => agent.status().connected, patience).catch((thrown: unknown) => {
        const said = now.lines.filter((line) => line.startsWith(`${machine.serial}: `)).slice(-12)
        throw new Error([String(thrown), JSON.stringify(agent.status()), ...said].join('\n'))
      })
    })
  const readiness = async () => (await now.client.call('ca.status')).readiness
  const acknowledged = async (wanted: number): Promise<void> =>
    await eventually(`${wanted} have acknowledged`, async () => (await readiness()).acknowledged === wanted)
  const under = async (): Promise<number> => (await now.client.call('ca.status')).generations[0]?.devices ?? count

  await timed('enrolment', async () => await start(machines))
  const asleep = machines.slice(0, away)
  for (const { serial } of asleep) await agents.get(serial)?.stop()
  await timed('distributed', async () => {
    await now.client.call('ca.prepare', { body: {} })
    await now.client.call('ca.distribute')
    await acknowledged(count - away)
  })
  expect(await readiness()).toMatchObject({ devices: count, away, waiting: 0, stranded: 0 })
  await timed('activated', async () => {
    await now.client.call('ca.activate', { body: {} })
    await acknowledged(count - away)
  })
  await timed('renewed', async () => {
    await now.client.call('ca.taint', { body: { within: Math.ceil(count / 60) } })
    await eventually('everybody that is there has renewed', async () => (await under()) === away)
  })
  await timed('back', async () => {
    await start(asleep)
    await eventually('those that slept have renewed', async () => (await under()) === 0)
  })
  await timed('retired', async () => {
    await now.client.call('ca.retire', { body: {} })
    await acknowledged(count)
  })
  expect(await readiness()).toMatchObject({ devices: count, acknowledged: count, stranded: 0 })
  await until('all are connected', () => [...agents.values()].every((agent) => agent.status().connected), patience)
  for (const agent of agents.values()) expect(agent.status().lastRefusal).toBeNull()
  process.stdout.write(
    `rollover of ${count} boards, ${away} off: ${Object.entries(seconds)
      .map(([what, took]) => `${what} ${took.toFixed(1)} s`)
      .join(', ')}\n`,
  )
  await rolloverHolds(now)
})
