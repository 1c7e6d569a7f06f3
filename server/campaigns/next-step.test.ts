import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import {
  defaultPolicy,
  faultOf,
  gaveUp,
  inStage,
  isForward,
  placeOf,
  waveEnds,
  waveOf,
  type Campaign,
  type CampaignPolicy,
  type Stage,
  type Target,
} from './campaign.ts'
import { nextStep, type WaveProgress } from './next-step.ts'

const campaignOf = (of: Partial<Campaign> = {}, policy: Partial<CampaignPolicy> = {}): Campaign => ({
  id: 'c1',
  version: 1,
  key: KeyId.parse('telemetry'),
  from: 1,
  to: Epoch.parse(2),
  state: 'installing',
  resumeTo: null,
  because: 'test',
  createdAt: 0,
  createdBy: 'operator:alice',
  finishedAt: null,
  policy: { ...defaultPolicy, waves: [0.5, 1], successThreshold: 0.9, errorThreshold: 0.1, deadline: 1000, ...policy },
  wave: 0,
  waves: 2,
  since: 0,
  sizes: [10, 10],
  opened: [0],
  due: 1000,
  succeededAt: null,
  cleared: -1,
  approval: null,
  mayCut: null,
  halted: null,
  ...of,
})
const counts = (of: Partial<Record<Stage, number>>): WaveProgress => ({ total: Object.values(of).reduce((sum, count) => sum + count, 0), counts: of })
const none = counts({ pending: 10 })

const table: readonly [string, Campaign, readonly WaveProgress[], number, number | null, unknown][] = [
  ['nothing has happened yet: wait until the deadline', campaignOf(), [none, none], 0, null, { do: 'wait', for: 'devices', until: 1000 }],
  ['just below the success threshold: wait', campaignOf(), [counts({ installed: 8, pending: 2 }), none], 10, null, { do: 'wait', for: 'devices', until: 1000 }],
  ['exactly the success threshold opens the next wave', campaignOf(), [counts({ installed: 9, pending: 1 }), none], 10, null, { do: 'open-wave', wave: 1 }],
  ['who is current already counts as settled', campaignOf(), [counts({ 'already-current': 9, pending: 1 }), none], 10, null, { do: 'open-wave', wave: 1 }],
  ['exactly the error threshold does not halt', campaignOf(), [counts({ installed: 9, failed: 1 }), none], 10, null, { do: 'open-wave', wave: 1 }],
  ['above the error threshold halts', campaignOf(), [counts({ installed: 8, failed: 2 }), none], 10, null, { do: 'halt', because: 'wave 1: 2 of 10 failed' }],
  [
    'errors are judged before success',
    campaignOf({}, { successThreshold: 0 }),
    [counts({ installed: 5, failed: 5 }), none],
    10,
    null,
    { do: 'halt', because: 'wave 1: 5 of 10 failed' },
  ],
  ['at the deadline the silent ones time out', campaignOf(), [counts({ installed: 5, pending: 3, delivered: 2 }), none], 1000, null, { do: 'time-out' }],
  ['timed out is settled', campaignOf(), [counts({ installed: 5, 'timed-out': 5 }), none], 1001, null, { do: 'open-wave', wave: 1 }],
  [
    'too few succeed and nobody is left: halt',
    campaignOf({}, { errorThreshold: 1 }),
    [counts({ installed: 5, failed: 5 }), none],
    10,
    null,
    { do: 'halt', because: 'wave 1: 5 of 10 succeeded, 5 failed' },
  ],
  [
    'a wave that is not open does not count',
    campaignOf(),
    [counts({ installed: 8, pending: 2 }), counts({ failed: 10 })],
    10,
    null,
    { do: 'wait', for: 'devices', until: 1000 },
  ],
  [
    'the last wave waits for everybody',
    campaignOf({ wave: 1 }),
    [counts({ installed: 10 }), counts({ installed: 9, pending: 1 })],
    10,
    null,
    { do: 'wait', for: 'devices', until: 1000 },
  ],
  ['everybody has it: activate', campaignOf({ wave: 1 }), [counts({ installed: 10 }), counts({ installed: 9, 'timed-out': 1 })], 10, null, { do: 'activate' }],
  ['nobody at all: activate', campaignOf({ waves: 1 }), [counts({})], 0, null, { do: 'activate' }],
  [
    'activating waits for the proofs',
    campaignOf({ state: 'activating', wave: 1 }),
    [counts({ active: 10 }), counts({ active: 9, installed: 1 })],
    10,
    5000,
    { do: 'wait', for: 'devices', until: 1000 },
  ],
  [
    'activating: who is silent at the deadline times out',
    campaignOf({ state: 'activating', wave: 1 }),
    [counts({ active: 10 }), counts({ active: 9, installed: 1 })],
    1000,
    5000,
    { do: 'time-out' },
  ],
  [
    'the old epoch is still readable: wait',
    campaignOf({ state: 'activating', wave: 1 }),
    [counts({ active: 10 }), counts({ active: 10 })],
    10,
    5000,
    { do: 'wait', for: 'readers', until: 5000 },
  ],
  ['its time is over: retire', campaignOf({ state: 'activating', wave: 1 }), [counts({ active: 10 }), counts({ active: 10 })], 5000, 5000, { do: 'retire' }],
  [
    'activating halts on errors as well',
    campaignOf({ state: 'activating', wave: 1 }),
    [counts({ active: 8, failed: 2 }), counts({ active: 10 })],
    10,
    5000,
    { do: 'halt', because: 'wave 1: 2 of 10 failed' },
  ],
  [
    'retiring waits for the statements',
    campaignOf({ state: 'retiring', wave: 1 }),
    [counts({ retired: 9, active: 1 }), counts({ retired: 10 })],
    10,
    null,
    { do: 'wait', for: 'devices', until: 1000 },
  ],
  [
    'retiring: silent ones time out',
    campaignOf({ state: 'retiring', wave: 1 }),
    [counts({ retired: 9, active: 1 }), counts({ retired: 10 })],
    1000,
    null,
    { do: 'time-out' },
  ],
  ['all retired: finish', campaignOf({ state: 'retiring', wave: 1 }), [counts({ retired: 10 }), counts({ retired: 10 })], 10, null, { do: 'finish' }],
  ...(['paused', 'halted', 'aborted', 'done'] as const).map((state): (typeof table)[number] => [
    `${state}: nothing happens by itself`,
    campaignOf({ state }),
    [counts({ installed: 10 }), none],
    9_999_999,
    null,
    { do: 'wait', for: 'nothing', until: null },
  ]),
]

test.each(table)('%s', (_, campaign, progress, now, readableUntil, want) => {
  const facts = { progress, now, readableUntil, approved: false }
  expect(nextStep(campaign, facts)).toEqual(want)
  expect(nextStep(campaign, facts)).toEqual(want)
})

const nightly = { from: 120, minutes: 60, days: [0, 1, 2, 3, 4, 5, 6], offset: 0 }
const two = 120 * 60_000
const [half, all] = [counts({ installed: 9, pending: 1 }), counts({ installed: 10 })]

/** Parts of a policy of its own each. */
const policies: readonly [string, Campaign, readonly WaveProgress[], number, unknown][] = [
  ['targets are written first', campaignOf({ state: 'preparing' }), [], 0, { do: 'prepare' }],
  ['nobody has approved it', campaignOf({ state: 'waiting' }), [], 0, { do: 'wait', for: 'approval', until: null }],
  ['before its time', campaignOf({ state: 'scheduled' }, { startAt: 5 }), [], 4, { do: 'wait', for: 'start-time', until: 5 }],
  ['at its time', campaignOf({ state: 'scheduled' }, { startAt: 5 }), [], 5, { do: 'start' }],
  ['outside the window nothing opens', campaignOf({}, { window: nightly }), [half, none], 10, { do: 'wait', for: 'window', until: two }],
  ['nor runs anybody out of time', campaignOf({}, { window: nightly }), [none, none], 5000, { do: 'wait', for: 'window', until: two }],
  ['the deadline counts from the opening', campaignOf({}, { window: nightly }), [none, none], two + 999, { do: 'wait', for: 'devices', until: two + 1000 }],
  ['and is over then', campaignOf({}, { window: nightly }), [none, none], two + 1000, { do: 'time-out' }],
  [
    'errors halt outside the window as well',
    campaignOf({}, { window: nightly }),
    [counts({ failed: 10 }), none],
    10,
    { do: 'halt', because: 'wave 1: 10 of 10 failed' },
  ],
  ['a success begins to soak', campaignOf({}, { soak: 100 }), [half, none], 10, { do: 'soak', since: 10 }],
  ['and soaks', campaignOf({ succeededAt: 10 }, { soak: 100 }), [half, none], 109, { do: 'wait', for: 'soak', until: 110 }],
  [
    'a success that is none any more does not',
    campaignOf({ succeededAt: 10 }, { soak: 100 }),
    [counts({ installed: 8, pending: 2 }), none],
    20,
    { do: 'soak', since: null },
  ],
  ['after the soak the next wave opens', campaignOf({ succeededAt: 10 }, { soak: 100 }), [half, none], 110, { do: 'open-wave', wave: 1 }],
  ['a person opens it', campaignOf({}, { advance: 'manual' }), [all, none], 10, { do: 'wait', for: 'person', until: null }],
  ['and has', campaignOf({ cleared: 0 }, { advance: 'manual' }), [all, none], 10, { do: 'open-wave', wave: 1 }],
  ['and activates', campaignOf({ wave: 1, cleared: 0 }, { advance: 'manual' }), [all, all], 10, { do: 'wait', for: 'person', until: null }],
  [
    'the silent are errors',
    campaignOf({}, { silent: 'error' }),
    [counts({ installed: 8, 'timed-out': 2 }), none],
    10,
    { do: 'halt', because: 'wave 1: 2 of 10 failed' },
  ],
  ['the silent are nobody', campaignOf({}, { silent: 'neither' }), [counts({ installed: 1, 'timed-out': 9 }), none], 10, { do: 'open-wave', wave: 1 }],
  ['who left is nobody', campaignOf(), [counts({ installed: 9, failed: 1, left: 80 }), none], 10, { do: 'open-wave', wave: 1 }],
  ['nobody is left: the wave succeeds', campaignOf(), [counts({ left: 10 }), none], 10, { do: 'open-wave', wave: 1 }],
  [
    '29 of 100 is not above 0.29',
    campaignOf({}, { errorThreshold: 0.29, successThreshold: 0.71 }),
    [counts({ installed: 71, failed: 29 }), none],
    10,
    { do: 'open-wave', wave: 1 },
  ],
  [
    'the last wave is judged as well',
    campaignOf({ wave: 1 }, { errorThreshold: 1 }),
    [all, counts({ installed: 5, failed: 5 })],
    10,
    { do: 'halt', because: 'wave 2: 5 of 10 succeeded, 5 failed' },
  ],
  ['without a new epoch there is none to retire', campaignOf({ state: 'activating', from: 2 }), [counts({ active: 10 })], 10, { do: 'finish' }],
]
test.each(policies)('%s', (_, campaign, progress, now, want) =>
  expect(nextStep(campaign, { progress, now, readableUntil: null, approved: false })).toEqual(want),
)

test('approved, it starts', () =>
  expect(nextStep(campaignOf({ state: 'waiting' }), { progress: [], now: 0, readableUntil: null, approved: true })).toEqual({ do: 'start' }))

const overlaps: readonly [string, Partial<CampaignPolicy>, number | null, Partial<Record<Stage, number>>, unknown][] = [
  ['the old epoch is kept for who was silent', {}, null, { active: 9, 'timed-out': 1 }, { do: 'wait', for: 'stragglers', until: null }],
  ['and for who failed', { errorThreshold: 1 }, null, { active: 9, failed: 1 }, { do: 'wait', for: 'stragglers', until: null }],
  ['not for who is quarantined, or left', {}, null, { active: 8, quarantined: 1, left: 1 }, { do: 'retire' }],
  ['a strict one asks', { overlap: 'strict' }, 0, { active: 9, 'timed-out': 1 }, { do: 'wait', for: 'confirmation', until: null }],
  ['agreed to one, two are too many', { overlap: 'strict' }, 1, { active: 8, 'timed-out': 2 }, { do: 'wait', for: 'confirmation', until: null }],
  ['agreed to two', { overlap: 'strict' }, 2, { active: 8, 'timed-out': 2 }, { do: 'retire' }],
  ['a strict one that cuts nobody', { overlap: 'strict' }, null, { active: 10 }, { do: 'retire' }],
]
test.each(overlaps)('%s', (_, policy, mayCut, of, want) => {
  const campaign = campaignOf({ state: 'activating', mayCut }, policy)
  expect(nextStep(campaign, { progress: [counts(of)], now: 5000, readableUntil: 5000, approved: true })).toEqual(want)
  // Before its time nobody is cut, and nothing is asked.
  expect(nextStep(campaign, { progress: [counts(of)], now: 4999, readableUntil: 5000, approved: true })).toMatchObject({ for: 'readers' })
})

test.each([
  [{ waves: [0.5] }, /last wave/],
  [{ waves: [0.5, 0.5, 1] }, /ascending/],
  [{ waves: [{ devices: 5 }, { devices: 5 }, 1] }, /ascending/],
  [{ window: nightly, deadline: 61 * 60_000 }, /window/],
] as const)('a policy that does not hold together: %j', (policy, fault) => expect(faultOf({ ...defaultPolicy, ...policy })).toMatch(fault))
test('one that does', () => expect(faultOf({ ...defaultPolicy, waves: [{ devices: 5 }, 0.1, 1], window: nightly })).toBeUndefined())

describe('stages', () => {
  test.each([
    ['pending', 'delivered', true],
    ['pending', 'active', true],
    ['installed', 'delivered', false],
    ['active', 'installed', false],
    ['active', 'retired', true],
    ['retired', 'active', false],
    ['timed-out', 'installed', true],
    ['timed-out', 'active', true],
    ['timed-out', 'delivered', false],
    ['failed', 'installed', true],
    ['left', 'active', false],
    ['already-current', 'installed', false],
  ] as const)('%s to %s: %s', (from, to, forward) => expect(isForward(from, to)).toBe(forward))

  test('a target in another stage is found in another place', () => {
    const target = {
      id: 'c1/d1',
      version: 1,
      campaign: 'c1',
      device: 'd1',
      wave: 1,
      stage: 'pending',
      place: placeOf('c1', 1, 'pending'),
      changedAt: 0,
      reason: null,
    } as unknown as Target
    expect(inStage(target, 'installed', 7)).toMatchObject({ stage: 'installed', place: 'c1/1/installed', changedAt: 7 })
  })

  test('waves take their shares in order, and everybody has one', () =>
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 500 }), (total) => {
        const waves = [0.01, 0.1, 0.5, 1]
        const all = Array.from({ length: total }, (_, at) => waveOf(at, total, waves))
        expect(all).toEqual(all.toSorted((one, other) => one - other))
        expect(all[0]).toBe(0)
        for (const [wave, share] of waves.entries()) expect(all.filter((one) => one <= wave)).toHaveLength(Math.ceil(share * total))
      }),
    ))

  test('waves by number, by share, and both: one that ends before it begins is empty', () => {
    expect(waveEnds([{ devices: 10 }, 0.1, 1], 1000)).toEqual([10, 100, 1000])
    expect(waveEnds([{ devices: 10 }, 0.1, 1], 50)).toEqual([10, 10, 50])
    expect(waveEnds([{ devices: 10 }, 1], 3)).toEqual([3, 3])
    // 0.07 × 100 is 7.000000000000001 in floating point.
    expect(waveEnds([0.07, 1], 100)).toEqual([7, 100])
  })

  test('a budget of two retries is three tries', () => {
    let target = {
      id: 'c1/d1',
      version: 1,
      campaign: 'c1',
      device: 'd1',
      wave: 0,
      stage: 'delivered',
      place: '',
      changedAt: 0,
      reason: null,
    } as unknown as Target
    const reached: Stage[] = []
    for (let at = 1; at <= 3; at++) {
      target = gaveUp({ ...target, stage: 'delivered' }, { stage: 'failed', retries: 2, reason: 'x', at })
      reached.push(target.stage)
    }
    expect(reached).toEqual(['pending', 'pending', 'failed'])
    expect(gaveUp({ ...target, attempts: 0, stage: 'installed' }, { stage: 'timed-out', retries: 1, reason: null, at: 9 })).toMatchObject({
      stage: 'installed',
      attempts: 1,
    })
  })
})
