import { randomInt } from 'node:crypto'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { hostileBus } from './faults/hostile-bus.ts'
import { evidenceOf } from './invariants/agent-evidence.ts'
import type { DeviceEvidence } from './invariants/evidence.ts'
import { invariants } from './invariants/invariants.ts'
import { openWorld, until, using, type Machine } from './world.ts'

// The whole number is run by the long tests; otherwise a share, from a seed that is printed.
const long = process.env['FLEETKEY_LONG'] === '1'
const schedules = long ? 200 : 12
const first = Number(process.env['FLEETKEY_SEED'] ?? randomInt(1_000_000_000))
process.stdout.write(`hostile broker: ${schedules} of 200 schedules from seed ${first} (FLEETKEY_SEED=${first} runs them again)\n`)

const sleep = async (milliseconds: number): Promise<void> => await new Promise((resolve) => void setTimeout(resolve, milliseconds))

const treated = new Map<string, number>()

describe.concurrent('a hostile broker changes liveness only', { timeout: 120_000 }, () => {
  test.for(Array.from({ length: schedules }, (_, at) => first + at))('schedule %d', async (seed) => {
    const hostile = hostileBus(String(seed))
    const world = await openWorld({ bus: hostile.wrap })
    const history: { device: string; key: string; epoch: number }[] = []
    const agents = new Map<Machine, Agent>()
    const switchOn = (machine: Machine): void => {
      agents.get(machine)?.kill()
      const agent = world.agent(machine)
      agents.set(machine, agent)
      agent.onChange(({ device, current }) => {
        if (device !== null) for (const [key, epoch] of Object.entries(current)) history.push({ device, key, epoch })
      })
    }
    let log = ''
    let auditKey: Uint8Array = new Uint8Array()
    const devices: DeviceEvidence[] = []
    try {
      const machines = await Promise.all(['GW-1', 'GW-2'].map(async (serial) => await world.simulated(serial)))
      await world.enlist(machines, 'plant')
      const { client } = world
      await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
      await client.call('key.create', { body: { id: 'command-auth', protection: 'tpm', recipientUsage: 0 } })
      for (const key of ['telemetry', 'command-auth']) await client.call('key.grant', { params: { id: key }, body: { group: 'plant' } })

      // Every third schedule is hostile from the first message on: few devices get an identity then. The others are hostile from the keys on.
      if (seed % 3 === 0) hostile.attack()
      for (const machine of machines) switchOn(machine)
      if (seed % 3 !== 0) {
        await until(`seed ${seed}: both are enrolled`, () => [...agents.values()].every((agent) => agent.status().connected))
        hostile.attack()
      }
      await sleep(700)
      for (const key of ['telemetry', 'command-auth'])
        await client.call('key.rotate', { params: { id: key }, body: { deadline: 800, successThreshold: 0, errorThreshold: 1 } })
      await sleep(500)
      if (machines[0] !== undefined) switchOn(machines[0])
      await sleep(500)

      // Calm: both start anew and converge.
      hostile.calm()
      for (const machine of machines) switchOn(machine)
      const all = (): Agent[] => [...agents.values()]
      const epoch = async (key: string): Promise<number> => (await client.call('key.show', { params: { id: key } })).current
      await until(
        `seed ${seed}: both converge`,
        async () => using(all(), 'telemetry', await epoch('telemetry')) && using(all(), 'command-auth', await epoch('command-auth')),
        60_000,
      )
      await until(
        `seed ${seed}: the rotations end`,
        async () => (await client.call('campaign.list')).items.every(({ state }) => state === 'done' || state === 'halted' || state === 'aborted'),
        60_000,
      )
      await until(
        `seed ${seed}: every statement has arrived`,
        async () => {
          const views = await Promise.all(['gw-1', 'gw-2'].map(async (id) => await client.call('device.show', { params: { id } })))
          // At rest: the newest epoch is proven, and of every older one the erasure is stated.
          return views.every(({ holdings }) =>
            ['telemetry', 'command-auth'].every((key) => {
              const [newest, ...older] = holdings.filter((one) => one.key === key).toSorted((x, y) => y.epoch - x.epoch)
              return newest?.stage === 'active' && older.every(({ stage }) => stage !== 'installed' && stage !== 'active')
            }),
          )
        },
        60_000,
      )
      await client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
      auditKey = Buffer.from((await client.call('audit.key')).spki, 'base64')
      for (const [machine, agent] of agents) devices.push(evidenceOf(machine.serial.toLowerCase(), agent))
      await world.server.stop()
      const store = await openSqliteStore(join(world.folder, 'server', 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
      try {
        for (const invariant of invariants) await invariant({ store, devices, history, log, auditKey })
      } finally {
        await store.close()
      }
      for (const [treatment, count] of Object.entries(hostile.done)) treated.set(treatment, (treated.get(treatment) ?? 0) + count)
    } finally {
      await world.stop()
    }
  })
})

test('every treatment was given', () => {
  process.stdout.write(`hostile broker: ${[...treated].map(([treatment, count]) => `${treatment} ${count}`).join(', ')}\n`)
  expect([...treated.values()].every((count) => count > 0)).toBe(true)
})
