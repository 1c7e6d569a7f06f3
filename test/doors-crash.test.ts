import { existsSync, readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { openWorld, until, using, type PlainMachine, type World } from './world.ts'

/** Durable steps of a device without a TPM on its way to its first key, in their order. */
const steps = [
  'software-keys.written',
  'software-keys.renamed',
  'software-keys.durable',
  'software-keys.renamed#2',
  'software-keys.stored',
  'enrol.hello',
  'enrol.answered',
  'software-keys.written#3',
  'software-keys.settled',
  'identity.written',
  'identity.renamed',
  'identity.durable',
  'identity.stored',
  'token.deleted',
  'enrol.stored',
  'keyring.renamed',
  'key.installed',
] as const

/** The power of a board goes at each step. One server; for every step a board with a token and one with a secure element. */
let world: World
const boards: { readonly step: string; readonly machine: PlainMachine; readonly token: string }[] = []
const agents = new Map<string, Agent>()
const killed = new Map<string, string>()

beforeAll(async () => {
  world = await openWorld()
  const machines: PlainMachine[] = []
  for (const [at] of steps.entries()) machines.push({ serial: `PL-${at}` }, await world.withSecureElement(`SE-${at}`))
  const batch = await world.enlist(machines, 'plant')
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
  for (const [at, machine] of machines.entries()) {
    const step = steps[at >> 1] ?? ''
    // A secure element needs no token.
    if (machine.element !== undefined && step.startsWith('token')) continue
    boards.push({ step, machine, token: machine.element === undefined ? await world.token(batch) : '' })
  }
}, 60_000)
afterAll(async () => await world.stop(), 60_000)

const start = ({ step, machine, token }: (typeof boards)[number]): void => {
  const [name = step, count = '1'] = step.split('#')
  let left = Number(count)
  const agent = world.agent(machine, {
    ...(token === '' ? {} : { token }),
    step: (reached) => {
      if (reached !== name || --left > 0 || killed.has(machine.serial)) return
      agents.get(machine.serial)?.kill()
      killed.set(machine.serial, step)
    },
  })
  agents.set(machine.serial, agent)
}

describe('a board without a TPM that loses its power', () => {
  test('at each step, all at once: every one comes back, has its key, and no token was used twice', { timeout: 180_000 }, async () => {
    for (const board of boards) start(board)
    await until('every board has lost its power', () => killed.size === boards.length, 90_000)
    for (const { machine } of boards) agents.set(machine.serial, world.agent(machine))
    await until('all use the key', () => using([...agents.values()], 'telemetry', 1), 90_000)
    const { items } = await world.client.call('token.list', { query: { limit: 1000 } })
    const plain = boards.filter(({ token }) => token !== '')
    expect(items.map(({ spentBy }) => spentBy ?? 'nobody').toSorted()).toEqual(plain.map(({ machine }) => machine.serial.toLowerCase()).toSorted())
    for (const { machine, step } of plain) await until(`${step}: its token is gone`, () => !existsSync(world.tokenFile(machine)))
  })

  test('its files are for its own account only, and it opens its keys without the server', { timeout: 90_000 }, async () => {
    for (const { machine } of boards) {
      await agents.get(machine.serial)?.stop()
      const folder = join(world.folder, 'agents', machine.serial)
      for (const name of readdirSync(folder)) expect([name, statSync(join(folder, name)).mode & 0o777]).toEqual([name, 0o600])
      agents.set(machine.serial, world.agent(machine, { offline: true }))
    }
    await until('all have their key', () => using([...agents.values()], 'telemetry', 1), 60_000)
  })
})
