import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { rollOverKilled } from './faults/rollover.ts'

/** Durable steps of a rollover, in their order. */
const common = [
  'rollover.intended',
  'setup.ca/issuing/2',
  'rollover.prepared',
  'rollover.distributed',
  'rollover.activating',
  'setup.ca/role/challenge/2',
  'setup.ca/role/delivery/2',
  'setup.ca/role/group/2',
  'setup.ca/role/release/2',
  'rollover.activated',
  'rollover.tainted',
  'rollover.retiring',
  'kms.destroyed',
  'rollover.destroyed',
  'rollover.retired',
]
const ofRoot = ['setup.ca/root/2', 'setup.ca/cross/1-2', 'setup.ca/cross/2-1']
/** The same steps at other moments: keys made, signed, destroyed. The server's first start makes 12 keys and certifies 7. */
const others = ['issue.signed#8', 'issue.signed#11', 'kms.destroyed#2', 'rollover.destroyed#2']

test('every step that a rollover reaches is in the tables', { timeout: 120_000 }, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-steps-'))
  try {
    const reached: string[] = []
    for (const root of [false, true]) {
      const steps = join(folder, String(root))
      expect(await rollOverKilled({ root, fault: { FLEETKEY_STEPS: steps } })).toBe(0)
      reached.push(...readFileSync(steps, 'utf8').trim().split('\n'))
    }
    const named = [...new Set(reached)].filter((step) => step.startsWith('rollover.') || /^setup\.ca\/.*(?:2|\d-\d)$/.test(step))
    expect(named.toSorted()).toEqual([...common, ...ofRoot, 'rollover.revoked'].filter((step) => step !== 'kms.destroyed').toSorted())
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
})

describe.concurrent('kill -9 of the server in a change of the root, at', { timeout: 120_000 }, () => {
  test.for([...common, ...ofRoot, ...others])('%s', async (at) => expect(await rollOverKilled({ root: true, fault: { FLEETKEY_KILL_AT: at } })).toBe(1))
})

describe.concurrent('kill -9 of the server in a change of the issuing CA, at', { timeout: 120_000 }, () => {
  test.for(['rollover.activated', 'rollover.retiring', 'rollover.revoked', 'rollover.destroyed'])('%s', async (at) =>
    expect(await rollOverKilled({ root: false, fault: { FLEETKEY_KILL_AT: at } })).toBe(1),
  )
})

describe.concurrent('kill -9 of the server while it revokes the CA that signs, at', { timeout: 120_000 }, () => {
  const points = ['rollover.revoking', 'rollover.destroyed', 'rollover.revoked']
  test.for(process.env['FLEETKEY_LONG'] === '1' ? points : points.slice(0, 2))('%s', async (at) =>
    expect(await rollOverKilled({ root: at === 'rollover.destroyed', revoked: true, fault: { FLEETKEY_KILL_AT: at } })).toBe(1),
  )
})
