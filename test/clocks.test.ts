import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { openWorld, storedIdentity, until, using, type Machine, type World } from './world.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'

const [hour, day] = [3_600_000, 86_400_000]
/** Milliseconds by which the server's clock is ahead of this machine's. */
const server = { ahead: 0 }
let jumps = 0

/** What the clocks of boards show: some stand, one jumps at every look. */
const clocks: readonly (readonly [serial: string, now: () => number])[] = [
  ['GW-1970', () => 0],
  ['GW-2038', () => Date.UTC(2038, 0, 19, 3, 14, 8)],
  ['GW-2106', () => Date.UTC(2106, 1, 7, 6, 28, 15)],
  ['GW-JUMPS', () => [0, Date.UTC(2106, 1, 7), Date.now(), Date.UTC(2038, 0, 20)][jumps++ % 4] ?? 0],
]

let world: World
let machines: readonly Machine[]
let agents: readonly Agent[]

const connected = (): boolean => agents.every((agent) => agent.status().connected)
const view = async (machine: Machine) => await world.client.call('device.show', { params: { id: machine.serial.toLowerCase() } })
const restart = async (): Promise<void> => {
  await Promise.all(agents.map(async (agent) => await agent.stop()))
  agents = machines.map((machine, at) => world.agent(machine, { now: clocks[at]?.[1] ?? Date.now }))
}
const rotate = async (): Promise<void> => {
  const { campaign } = await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
  const { latest } = await world.client.call('key.show', { params: { id: 'telemetry' } })
  await until(`all use epoch ${latest}`, () => using(agents, 'telemetry', latest), 60_000)
  await until('the campaign is over', async () => (await world.client.call('campaign.show', { params: { id: campaign } })).state === 'done', 60_000)
}

beforeAll(async () => {
  world = await openWorld({ now: () => Date.now() + server.ahead })
  machines = await Promise.all(clocks.map(async ([serial]) => await world.simulated(serial)))
  await world.enlist(machines, 'plant')
  agents = machines.map((machine, at) => world.agent(machine, { now: clocks[at]?.[1] ?? Date.now }))
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
  await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
}, 60_000)
afterAll(async () => await world.stop())

describe('boards whose clocks show 1970, 2038, 2106, and jump', () => {
  test('enrol and rotate', { timeout: 120_000 }, async () => {
    await until('all are connected', connected, 60_000)
    await rotate()
  })

  test('start again: each tries the certificate that it has, none proves itself anew', { timeout: 120_000 }, async () => {
    await restart()
    await until('all are connected', connected, 60_000)
    expect(await Promise.all(machines.map(async (machine) => (await view(machine)).recovery?.begun))).toEqual(machines.map(() => []))
  })

  test('renew when it is time by the server, whatever they show', { timeout: 120_000 }, async () => {
    const before = await Promise.all(machines.map(async (machine) => (await view(machine)).tlsNotAfter ?? 0))
    server.ahead = 34 * hour
    await restart()
    await until(
      'all use newer certificates',
      async () => (await Promise.all(machines.map(view))).every(({ tlsNotAfter, renewal }, at) => (tlsNotAfter ?? 0) > (before[at] ?? 0) && renewal === null),
      60_000,
    )
    await until('all are connected', connected, 60_000)
    await rotate()
  })

  test('come back by a fresh quote after their certificates have expired, each on one recovery', { timeout: 120_000 }, async () => {
    await Promise.all(agents.map(async (agent) => await agent.stop()))
    server.ahead = 6 * day
    await restart()
    await until('all are connected', connected, 60_000)
    for (const machine of machines) {
      const { recovery, state } = await view(machine)
      expect([machine.serial, state, recovery?.begun.length, recovery?.attempts]).toEqual([machine.serial, 'enrolled', 1, 0])
    }
    await rotate()
  })

  test('are none the worse for a server that was five days ahead for a while', { timeout: 120_000 }, async () => {
    server.ahead = 1 * day
    await restart()
    await until('all are connected', connected, 60_000)
    await rotate()
    await Promise.all(agents.map(async (agent) => await agent.stop()))
    for (const machine of machines) {
      const { notAfter } = parseCertificate((await storedIdentity(world, machine)).tls)
      expect(notAfter).toBeLessThan(Date.now() + 4 * day)
    }
  })
})
