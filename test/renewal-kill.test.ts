import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { renewal } from './faults/kill-tables.ts'
import { missingPoints } from './faults/points.ts'
import { runScenario } from './faults/scenario.ts'
import { twoBoards } from './faults/two-boards.ts'

const { factory, serials } = twoBoards(() => Date.now() - 20 * 86_400_000)

const run = async (of: { readonly server?: NodeJS.ProcessEnv; readonly boards?: NodeJS.ProcessEnv }): Promise<number> =>
  (await runScenario({ factory, serials, away: true, ...of })).kills

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
