import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { renewal } from './faults/kill-tables.ts'
import { missingPoints } from './faults/points.ts'
import { runScenario } from './faults/scenario.ts'

const factory = mkdtempSync(join(tmpdir(), 'fk-factory-'))
const serials = ['GATEWAY-BATCH-1-0001', 'GATEWAY-BATCH-1-0002'] as const

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
  expect(missingPoints(server, renewal.server)).toEqual([])
  expect(missingPoints(boards, renewal.agent)).toEqual([])
})

describe.concurrent('kill -9 of the server at', { timeout: 240_000 }, () => {
  test.for(renewal.server)('%s', async (at) => expect(await run({ server: { FLEETKEY_KILL_AT: at } })).toBe(1))
})

describe.concurrent('kill -9 of the agent, with its TPM, at', { timeout: 240_000 }, () => {
  test.for(renewal.agent)('%s', async (at) => expect(await run({ boards: { FLEETKEY_KILL_AT: at } })).toBe(1))
})
