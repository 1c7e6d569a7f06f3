import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { eviction } from './faults/kill-tables.ts'
import { missingPoints } from './faults/points.ts'
import { runScenario } from './faults/scenario.ts'
import { twoBoards } from './faults/two-boards.ts'

const { factory, serials } = twoBoards()

const run = async (of: { readonly server?: NodeJS.ProcessEnv; readonly boards?: NodeJS.ProcessEnv }): Promise<number> =>
  (await runScenario({ factory, serials, groups: true, ...of })).kills

test('the path evicts, makes labels anew and takes the device back: it reaches the steps below', { timeout: 240_000 }, async () => {
  const [server, boards] = [join(factory, 'server.steps'), join(factory, 'boards.steps')]
  expect(await run({ server: { FLEETKEY_STEPS: server }, boards: { FLEETKEY_STEPS: boards } })).toBe(0)
  expect(missingPoints(server, eviction.all.server)).toEqual([])
  expect(missingPoints(boards, eviction.all.agent)).toEqual([])
})

describe.concurrent('kill -9 of the server at', { timeout: 240_000 }, () => {
  test.for(eviction.server)('%s', async (at) => expect(await run({ server: { FLEETKEY_KILL_AT: at } })).toBe(1))
})

describe.concurrent('kill -9 of the agent, with its TPM, at', { timeout: 240_000 }, () => {
  test.for(eviction.agent)('%s', async (at) => expect(await run({ boards: { FLEETKEY_KILL_AT: at } })).toBe(1))
})
