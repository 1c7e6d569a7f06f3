import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { missingPoints } from './faults/points.ts'
import { runScenario } from './faults/scenario.ts'

const factory = mkdtempSync(join(tmpdir(), 'fk-factory-'))
const serials = ['GATEWAY-BATCH-1-0001', 'GATEWAY-BATCH-1-0002'] as const

/** Durable steps between the first connection and the end of both certificates' replacement. Two boards: counts leave their enrolments behind. */
const serverSteps = [
  'issue.intended#10',
  'issue.signed#10',
  'renew.issued',
  'renew.issued#2',
  'connect.certificate',
  'connect.certificate#2',
  'connect.certificate#3',
  'connect.certificate#4',
  // Of those that were returned with.
  'connect.certificate#5',
  ...(process.env['FLEETKEY_LONG'] === '1' ? ['connect.certificate#6'] : []),
]
const returning = ['enrol.challenged#3', 'enrol.challenged#4', 'enrol.spent#3', 'issue.intended#12', 'issue.signed#12']
const answered = ['enrol.issued#3', 'enrol.issued#4']
const agentSteps = ['renew.prepared', 'renewal.written', 'renewal.renamed', 'renewal.durable', 'renew.stored', 'identity.written#3', 'identity.durable#3']
const back = ['identity.stored#5', 'enrol.hello#3', 'enrol.answered#3', 'enrol.stored#3', 'enrol.answered#4']

beforeAll(async () => {
  const order = { batch: 'batch-1', model: 'gateway', station: 'line-1', devices: 2, release: { name: '1.0.0', number: 1 } }
  await writeBatch(factory, await makeBatch(order, { random: (length) => new Uint8Array(randomBytes(length)), now: () => Date.now() - 20 * 86_400_000 }))
}, 60_000)
afterAll(() => rmSync(factory, { recursive: true, force: true }))

const run = async (of: { readonly server?: NodeJS.ProcessEnv; readonly boards?: NodeJS.ProcessEnv }): Promise<number> =>
  (await runScenario({ factory, serials: [...serials], away: true, ...of })).kills

test('the path renews and returns: it reaches the steps below', { timeout: 240_000 }, async () => {
  const [server, boards] = [join(factory, 'server.steps'), join(factory, 'boards.steps')]
  expect(await run({ server: { FLEETKEY_STEPS: server }, boards: { FLEETKEY_STEPS: boards } })).toBe(0)
  expect(missingPoints(server, [...serverSteps, ...returning, ...answered])).toEqual([])
  expect(missingPoints(boards, [...agentSteps, ...back])).toEqual([])
})

describe.concurrent('kill -9 of the server at', { timeout: 240_000 }, () => {
  test.for([...serverSteps, ...returning, ...answered])('%s', async (at) => expect(await run({ server: { FLEETKEY_KILL_AT: at } })).toBe(1))
})

describe.concurrent('kill -9 of the agent, with its TPM, at', { timeout: 240_000 }, () => {
  test.for([...agentSteps, ...back])('%s', async (at) => expect(await run({ boards: { FLEETKEY_KILL_AT: at } })).toBe(1))
})
