import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { catchUp } from './faults/kill-tables.ts'
import { missingPoints } from './faults/points.ts'
import { runScenario } from './faults/scenario.ts'
import { twoBoards } from './faults/two-boards.ts'

const { factory, serials } = twoBoards()

const run = async (of: { readonly server?: NodeJS.ProcessEnv; readonly boards?: NodeJS.ProcessEnv }): Promise<number> =>
  (await runScenario({ factory, serials, misses: true, ...of })).kills

const long = process.env['FLEETKEY_LONG'] === '1'

// In the short run the few points below say it of themselves.
test.for(long ? ['misses five rotations and returns'] : [])('the path %s: it reaches the steps below', { timeout: 240_000 }, async () => {
  const [server, boards] = [join(factory, 'server.steps'), join(factory, 'boards.steps')]
  expect(await run({ server: { FLEETKEY_STEPS: server }, boards: { FLEETKEY_STEPS: boards } })).toBe(0)
  expect(missingPoints(server, catchUp.all.server)).toEqual([])
  expect(missingPoints(boards, catchUp.all.agent)).toEqual([])
})

describe.concurrent('kill -9 of the server at', { timeout: 240_000 }, () => {
  test.for(catchUp.server)('%s', async (at) => expect(await run({ server: { FLEETKEY_KILL_AT: at } })).toBe(1))
})

describe.concurrent('kill -9 of the agents, with their TPMs, at', { timeout: 240_000 }, () => {
  test.for(catchUp.agent)('%s', async (at) => expect(await run({ boards: { FLEETKEY_KILL_AT: at } })).toBe(1))
})
