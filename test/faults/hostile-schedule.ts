import assert from 'node:assert/strict'
import { join } from 'node:path'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { Refused } from '@fleetkey/cli/client.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { evidenceOf } from '../invariants/agent-evidence.ts'
import { invariants } from '../invariants/invariants.ts'
import { openWorld, until, using, type Machine, type World } from '../world.ts'
import { hostileBus, type HostileBus } from './hostile-bus.ts'

const sleep = async (milliseconds: number): Promise<void> => await new Promise((resolve) => void setTimeout(resolve, milliseconds))

/** For each thing that has to come about: other worlds run beside this one. Less than the time after which a device reports of its own accord. */
const patience = 120_000

/** Asked ten times a second: each look at the server costs it something. */
const comesAbout = async (what: string, holds: () => boolean | Promise<boolean>): Promise<void> =>
  await until(
    what,
    async () => {
      if (await holds()) return true
      await sleep(80)
      return false
    },
    patience,
  )

/** Each key is granted to a group of both devices. */
const groups = { telemetry: 'cell', 'command-auth': 'plant' } as const
const keys = ['telemetry', 'command-auth'] as const
type Key = (typeof keys)[number]

/** Two devices of one group under a broker that may be hostile, and what their operators do. */
interface Scene {
  readonly client: World['client']
  readonly first: Machine
  readonly second: Machine
  /** Power on, or off and on again. */
  switchOn(machine: Machine): void
  switchOff(machine: Machine): void
  agent(machine: Machine): Agent | undefined
  latest(key: Key): Promise<number>
  /** An order that the moment may refuse. Whether it was taken. */
  tried(order: Promise<unknown>): Promise<boolean>
}

/** Silent devices are given up after this many milliseconds: nobody waits for what the broker has swallowed. */
const brief = { deadline: 800, successThreshold: 0, errorThreshold: 1 } as const

const idOf = (machine: Machine): string => machine.serial.toLowerCase()

/** What goes on while the broker is hostile. */
const courses: Readonly<Record<string, (scene: Scene) => Promise<void>>> = {
  /** Both keys are rotated, and one device starts anew. */
  async rotation({ client, first, switchOn }) {
    await sleep(700)
    for (const key of keys) await client.call('key.rotate', { params: { id: key }, body: brief })
    await sleep(500)
    switchOn(first)
    await sleep(500)
  },

  /** Waves, retries, a canary's patience and a person's: paused, resumed, advanced, taken back. */
  async campaign({ client, first, switchOn, tried }) {
    await sleep(300)
    const waves = { ...brief, waves: [{ devices: 1 }, 1], retries: 1 }
    const [one, other] = await Promise.all([
      client.call('key.rotate', { params: { id: 'telemetry' }, body: { ...waves, successThreshold: 0.5 } }),
      client.call('key.rotate', { params: { id: 'command-auth' }, body: { ...waves, advance: 'manual' } }),
    ])
    await sleep(300)
    await tried(client.call('campaign.pause', { params: { id: one.campaign } }))
    await tried(client.call('campaign.advance', { params: { id: other.campaign } }))
    switchOn(first)
    await sleep(400)
    await tried(client.call('campaign.resume', { params: { id: one.campaign }, body: {} }))
    await tried(client.call('campaign.pause', { params: { id: other.campaign } }))
    await tried(client.call('campaign.rollback', { params: { id: other.campaign } }))
    await sleep(300)
    await tried(client.call('campaign.retry', { params: { id: one.campaign } }))
    await sleep(300)
  },

  /** Of a group served by broadcast one device is evicted, labels are made anew, and it is taken back. */
  async eviction({ client, second, agent, latest, tried }) {
    await sleep(300)
    await client.call('group.remove', { params: { id: groups.telemetry, device: idOf(second) } })
    const evicted = await latest('telemetry')
    await sleep(300)
    await tried(client.call('key.rotate', { params: { id: 'telemetry' }, body: brief }))
    await sleep(500)
    const held = agent(second)?.status().holdings ?? []
    assert.ok(
      held.every(({ key, epoch }) => key !== 'telemetry' || epoch < evicted),
      `the evicted device reads epoch ${evicted}: ${JSON.stringify(held)}`,
    )
    await client.call('group.add', { params: { id: groups.telemetry }, body: { devices: [idOf(second)] as never } })
    await tried(client.call('key.rotate', { params: { id: 'telemetry' }, body: brief }))
    await sleep(500)
  },

  /** One device misses five rotations and comes back while the broker is at its worst. */
  async 'catch-up'({ client, second, switchOn, switchOff, latest, tried }) {
    await sleep(300)
    switchOff(second)
    const from = await latest('telemetry')
    for (let missed = 1; missed <= 5; missed++) {
      const rotate = async () => await tried(client.call('key.rotate', { params: { id: 'telemetry' }, body: { ...brief, deadline: 100 } }))
      await comesAbout('the rotation before is in use', rotate)
      await comesAbout('it is in use', async () => (await client.call('key.show', { params: { id: 'telemetry' } })).current === from + missed)
    }
    switchOn(second)
    await sleep(700)
  },
}
export const courseNames: readonly string[] = Object.keys(courses)

/** The operators see to what waits for them. Whether every campaign is over. */
const seeTo = async ({ client, tried }: Scene): Promise<boolean> => {
  const open = (await client.call('campaign.list')).items.filter(({ state }) => !['done', 'aborted', 'rolled-back'].includes(state))
  for (const { id, state, policy } of open) {
    if (state === 'paused') await tried(client.call('campaign.resume', { params: { id }, body: {} }))
    if (state === 'halted') await tried(client.call('campaign.retry', { params: { id } }))
    if (state === 'installing' && policy.advance === 'manual') await tried(client.call('campaign.advance', { params: { id } }))
  }
  return open.length === 0
}

/** At rest: the newest epoch is proven, and of every older one the erasure is stated. */
const isAtRest = async ({ client }: Scene, devices: readonly string[]): Promise<boolean> => {
  const views = await Promise.all(devices.map(async (id) => await client.call('device.show', { params: { id } })))
  return views.every(({ holdings }) =>
    keys.every((key) => {
      const [newest, ...older] = holdings.filter((one) => one.key === key).toSorted((x, y) => y.epoch - x.epoch)
      return newest?.stage === 'active' && older.every(({ stage }) => stage !== 'installed' && stage !== 'active')
    }),
  )
}

/**
 * One schedule: a server with two devices, and a broker between them that drops, repeats, holds back, swaps and damages what the seed decides, while its course runs. Then it is
 * calm: both come to use the newest epochs, every campaign ends, every statement arrives, and every invariant holds. Throws with the log of all where one does not.
 */
export const runHostileSchedule = async (seed: number): Promise<{ readonly course: string; readonly treated: HostileBus['done'] }> => {
  const course = courseNames[seed % courseNames.length] ?? 'rotation'
  const hostile = hostileBus(String(seed))
  const world = await openWorld({ bus: hostile.wrap })
  const history: { device: string; key: string; epoch: number }[] = []
  const agents = new Map<Machine, Agent>()
  const told = (line: string): void => void world.lines.push(`-- ${line}`)
  try {
    const [first, second] = await Promise.all([world.simulated('GW-1'), world.simulated('GW-2')])
    const machines = [first, second]
    await world.enlist(machines, groups['command-auth'])
    const { client } = world
    const scene: Scene = {
      client,
      first,
      second,
      switchOff(machine) {
        told(`${machine.serial} is switched off`)
        agents.get(machine)?.kill()
        agents.delete(machine)
      },
      switchOn(machine) {
        agents.get(machine)?.kill()
        told(`${machine.serial} is switched on`)
        const agent = world.agent(machine)
        agents.set(machine, agent)
        agent.onChange(({ device, current }) => {
          if (device !== null) for (const [key, epoch] of Object.entries(current)) history.push({ device, key, epoch })
        })
      },
      agent: (machine) => agents.get(machine),
      latest: async (key) => (await client.call('key.show', { params: { id: key } })).latest,
      tried: async (order) =>
        await order.then(
          () => true,
          (thrown: unknown) => {
            if (!(thrown instanceof Refused) || thrown.code !== 'conflict') throw thrown
            told(`refused: ${thrown.message}`)
            return false
          },
        ),
    }
    const cell = { params: { id: groups.telemetry } }
    await client.call('group.create', { body: { id: groups.telemetry as never } })
    if (course === 'eviction') await client.call('group.policy.set', { ...cell, body: { delivery: 'broadcast', generationLife: 60 } })
    await client.call('group.add', { ...cell, body: { devices: machines.map(idOf) as never } })
    await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
    await client.call('key.create', { body: { id: 'command-auth', protection: 'tpm', recipientUsage: 0 } })
    for (const key of keys) await client.call('key.grant', { params: { id: key }, body: { group: groups[key] as never } })

    // Every third schedule is hostile from the first message on: few devices get an identity then. The others are hostile from the keys on.
    const isHostileAtOnce = seed % 3 === 0
    if (isHostileAtOnce) hostile.attack()
    for (const machine of machines) scene.switchOn(machine)
    const all = (): Agent[] => [...agents.values()]
    if (!isHostileAtOnce) {
      await comesAbout('both are enrolled', () => all().every((agent) => agent.status().connected))
      hostile.attack()
    }
    await courses[course]?.(scene)

    hostile.calm()
    told('calm')
    for (const machine of machines) scene.switchOn(machine)
    await comesAbout('every campaign ends', async () => await seeTo(scene))
    // Who joined a rotation that was taken back waits for the next one.
    for (const key of keys)
      if ((await client.call('campaign.list', { query: { key: key as never } })).items.at(-1)?.state !== 'done')
        await client.call('key.rotate', { params: { id: key }, body: brief })
    await comesAbout('both use the epochs in use', async () => {
      const current = await Promise.all(keys.map(async (id) => (await client.call('key.show', { params: { id } })).current))
      return keys.every((key, at) => using(all(), key, current[at] ?? 0))
    })
    await comesAbout('every campaign has ended', async () => await seeTo(scene))
    await comesAbout('every statement has arrived', async () => await isAtRest(scene, machines.map(idOf)))

    let log = ''
    await client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    const auditKey = Buffer.from((await client.call('audit.key')).spki, 'base64')
    const devices = [...agents].map(([machine, agent]) => evidenceOf(idOf(machine), agent))
    await world.server.stop()
    const store = await openSqliteStore(join(world.folder, 'server', 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
    try {
      for (const invariant of invariants) await invariant({ store, devices, history, log, auditKey })
    } finally {
      await store.close()
    }
    return { course, treated: hostile.done }
  } catch (thrown) {
    const known = await Promise.allSettled([
      world.client.call('campaign.list'),
      ...['gw-1', 'gw-2'].map(async (id) => (await world.client.call('device.show', { params: { id } })).holdings),
    ])
    const statuses = [...agents].map(([{ serial }, agent]) => `${serial}: ${JSON.stringify(agent.status())}`)
    const why = thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown)
    throw new Error([`schedule ${seed}, ${course}: ${why}`, ...statuses, ...known.map((one) => JSON.stringify(one)), ...world.lines.slice(-100)].join('\n'), {
      cause: thrown,
    })
  } finally {
    await world.stop()
  }
}
