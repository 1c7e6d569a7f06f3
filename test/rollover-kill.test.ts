import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { missingPoints } from './faults/points.ts'
import { rollOverKilled, type Kills } from './faults/rollover.ts'
import { twoBoards } from './faults/two-boards.ts'

const long = process.env['FLEETKEY_LONG'] === '1'

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

/** What two devices make of it, each of both: four versions of the bundle are acknowledged, both certificates renewed, the new one used. */
const ofDevices = [
  ...['', '#3', '#5', '#6', '#7'].map((count) => `trust.acknowledged${count}`),
  'issue.intended#20',
  'issue.signed#20',
  'issue.signed#21',
  'renew.issued',
  'renew.issued#2',
  'connect.certificate#3',
  'connect.certificate#4',
]

/** Of their agents: each version is written twice (two copies, four times in all), then in force. Counts leave the enrolment behind. */
const agentSteps = [
  ...['', '#2', '#5', '#9', '#16'].flatMap((count) => ['written', 'renamed', 'durable'].map((what) => `trust.${what}${count}`)),
  ...['', '#2', '#3', '#5', '#8'].map((count) => `trust.stored${count}`),
  'renew.prepared',
  'renewal.written',
  'renewal.renamed',
  'renewal.durable',
  'identity.written#5',
  'identity.renamed#5',
  'identity.durable#5',
  'identity.stored#3',
  'renew.stored',
  'renew.stored#2',
]

/** At which the KMS process alone is ended: its own (8 keys are from before), and some of the server's, where it waits. */
const kmsSteps = [
  'kms.key#9',
  'kms.key#10',
  'kms.uses#7',
  'kms.uses#8',
  'kms.destroyed',
  'kms.destroyed#2',
  'rollover.intended',
  'setup.ca/issuing/2',
  'rollover.activating',
  'rollover.tainted',
  'issue.intended#20',
  'rollover.retiring',
  'rollover.destroyed',
]

/** While the CA that signs is revoked. */
const revoking = ['rollover.revoking', 'rollover.revoked', 'rollover.destroyed']
const dropping = ['rollover.dropped', 'rollover.dropped#2']

const devices = twoBoards()
const { factory } = devices

const none: Kills = { server: 0, kms: 0, boards: 0 }

test('every step that a rollover reaches is in the tables', { timeout: 240_000 }, async () => {
  const reached: string[] = []
  for (const root of [false, true]) {
    const [steps, boards] = [join(factory, `${root}.steps`), join(factory, `${root}.boards`)]
    const there = { ...devices, fault: { FLEETKEY_STEPS: boards } }
    expect(await rollOverKilled({ root, fault: { FLEETKEY_STEPS: steps }, ...(root ? { devices: there } : {}) })).toEqual(none)
    reached.push(...readFileSync(steps, 'utf8').trim().split('\n'))
    if (!root) continue
    expect(missingPoints(steps, [...ofDevices, ...kmsSteps])).toEqual([])
    expect(missingPoints(boards, agentSteps)).toEqual([])
  }
  const named = [...new Set(reached)].filter((step) => step.startsWith('rollover.') || /^setup\.ca\/.*(?:2|\d-\d)$/.test(step))
  expect(named.toSorted()).toEqual([...common, ...ofRoot, 'rollover.revoked'].filter((step) => step !== 'kms.destroyed').toSorted())
})

// By itself, where nobody has to be waited for: the keys and certificates that each step leaves.
describe.concurrent('kill -9 of the server in a change of the root, at', { timeout: 240_000 }, () => {
  test.for([...common, ...ofRoot, ...(long ? others : [])])('%s', async (at) =>
    expect(await rollOverKilled({ root: true, fault: { FLEETKEY_KILL_AT: at } })).toEqual({ ...none, server: 1 }),
  )
})

describe.concurrent('kill -9 of the server in a change of the issuing CA, at', { timeout: 240_000 }, () => {
  test.for(['rollover.revoked', 'rollover.destroyed', ...(long ? ['rollover.activated', 'rollover.retiring'] : [])])('%s', async (at) =>
    expect(await rollOverKilled({ root: false, fault: { FLEETKEY_KILL_AT: at } })).toEqual({ ...none, server: 1 }),
  )
})

describe.concurrent('kill -9 of the server while it revokes the CA that signs, at', { timeout: 240_000 }, () => {
  test.for(long ? revoking : revoking.slice(0, 2))('%s', async (at) =>
    expect(await rollOverKilled({ root: at === 'rollover.destroyed', revoked: true, fault: { FLEETKEY_KILL_AT: at } })).toEqual({ ...none, server: 1 }),
  )
})

/** Steps by what is changed: the root, the issuing CA alone, or that one is revoked. */
const withDevices: readonly (readonly [what: 'root' | 'issuing CA' | 'revocation', at: string])[] = long
  ? [
      ...[...common, ...ofRoot, ...others, ...ofDevices].map((at) => ['root', at] as const),
      ...[...common, 'rollover.revoked', 'renew.issued'].map((at) => ['issuing CA', at] as const),
      ...[...revoking, ...dropping].map((at) => ['revocation', at] as const),
    ]
  : [
      ['root', 'rollover.tainted'],
      ['revocation', 'rollover.dropped'],
    ]

// Two devices are connected, to whom all of it is told; they renew, or are cut off by a revocation while keys are on their way to them.
describe.concurrent('both devices come under the next CA after kill -9 of', { timeout: 240_000 }, () => {
  test.for(withDevices)('the server, %s: %s', async ([what, at]) =>
    expect(await rollOverKilled({ root: what === 'root', revoked: what === 'revocation', fault: { FLEETKEY_KILL_AT: at }, devices })).toEqual({
      ...none,
      server: 1,
    }),
  )

  test.for(long ? agentSteps : ['trust.renamed'])('the agents, with their TPMs: %s', async (at) =>
    expect(await rollOverKilled({ root: true, fault: {}, devices: { ...devices, fault: { FLEETKEY_KILL_AT: at } } })).toEqual({ ...none, boards: 1 }),
  )

  // The server lives: nobody but it notices.
  test.for(long ? kmsSteps : ['kms.destroyed'])('the KMS process: %s', async (at) =>
    expect(await rollOverKilled({ root: true, fault: { FLEETKEY_KILL_AT: at, FLEETKEY_KILL_KMS: '1' }, devices })).toEqual({ ...none, kms: 1 }),
  )
})
