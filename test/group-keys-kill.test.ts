import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { missingPoints } from './faults/points.ts'
import { runScenario } from './faults/scenario.ts'

const long = process.env['FLEETKEY_LONG'] === '1'
const factory = mkdtempSync(join(tmpdir(), 'fk-factory-'))
const serials = ['GATEWAY-BATCH-1-0001', 'GATEWAY-BATCH-1-0002'] as const

/** Durable steps of a group served by broadcast, from its first place to labels of a new generation: those in the middle of the eviction, and with the long tests the others. */
const eviction = ['group.remove', 'broadcast.recorded', 'group.generation']
const others = [
  'rotate.started',
  'broadcast.signed#2',
  'group.placed#3',
  'group.placed',
  'group.placed#2',
  'key.grant#3',
  'broadcast.signed',
  'broadcast.signed#3',
  'broadcast.signed#4',
  'rotation.started',
  'rotation.settled',
  'rotate.activate',
  'rotate.activate#2',
  'group.add#2',
  'group.add#3',
]
const serverSteps = long ? [...eviction, ...others] : eviction
const agentSteps = long ? ['labels.stored', 'labels.stored#2', 'labels.stored#3', 'labels.stored#4'] : ['labels.stored#3']

beforeAll(async () => {
  const order = { batch: 'batch-1', model: 'gateway', station: 'line-1', devices: 2, release: { name: '1.0.0', number: 1 } }
  await writeBatch(factory, await makeBatch(order, { random: (length) => new Uint8Array(randomBytes(length)), now: () => Date.now() }))
}, 60_000)
afterAll(() => rmSync(factory, { recursive: true, force: true }))

const run = async (of: { readonly server?: NodeJS.ProcessEnv; readonly boards?: NodeJS.ProcessEnv }): Promise<number> =>
  (await runScenario({ factory, serials: [...serials], groups: true, ...of })).kills

test('the path evicts, makes labels anew and takes the device back: it reaches the steps below', { timeout: 240_000 }, async () => {
  const [server, boards] = [join(factory, 'server.steps'), join(factory, 'boards.steps')]
  expect(await run({ server: { FLEETKEY_STEPS: server }, boards: { FLEETKEY_STEPS: boards } })).toBe(0)
  expect(missingPoints(server, [...eviction, ...others])).toEqual([])
  expect(missingPoints(boards, ['labels.stored#4'])).toEqual([])
})

describe.concurrent('kill -9 of the server at', { timeout: 240_000 }, () => {
  test.for(serverSteps)('%s', async (at) => expect(await run({ server: { FLEETKEY_KILL_AT: at } })).toBe(1))
})

describe.concurrent('kill -9 of the agent, with its TPM, at', { timeout: 240_000 }, () => {
  test.for(agentSteps)('%s', async (at) => expect(await run({ boards: { FLEETKEY_KILL_AT: at } })).toBe(1))
})
