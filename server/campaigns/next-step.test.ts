import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import { defaultPolicy, inStage, isForward, placeOf, stages, waveOf, type Campaign, type CampaignPolicy, type Stage, type Target } from './campaign.ts'
import { nextStep, type Progress } from './next-step.ts'

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
  ...of,
})
const counts = (of: Partial<Record<Stage, number>>): Record<Stage, number> => ({
  ...(Object.fromEntries(stages.map((stage) => [stage, 0])) as Record<Stage, number>),
  ...of,
})
const none = counts({ pending: 10 })

const table: readonly [string, Campaign, Progress, number, number | null, unknown][] = [
  ['nothing has happened yet: wait until the deadline', campaignOf(), [none, none], 0, null, { do: 'wait', until: 1000 }],
  ['just below the success threshold: wait', campaignOf(), [counts({ installed: 8, pending: 2 }), none], 10, null, { do: 'wait', until: 1000 }],
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
  [
    'at the deadline the silent ones time out',
    campaignOf(),
    [counts({ installed: 5, pending: 3, delivered: 2 }), none],
    1000,
    null,
    { do: 'time-out', waves: [0], stages: ['pending', 'delivered'] },
  ],
  ['timed out is settled', campaignOf(), [counts({ installed: 5, 'timed-out': 5 }), none], 1001, null, { do: 'open-wave', wave: 1 }],
  [
    'too few succeed and nobody is left: halt',
    campaignOf({}, { errorThreshold: 1 }),
    [counts({ installed: 5, failed: 5 }), none],
    10,
    null,
    { do: 'halt', because: 'wave 1: 5 of 10 settled, 5 failed' },
  ],
  [
    'a wave that is not open does not count',
    campaignOf(),
    [counts({ installed: 8, pending: 2 }), counts({ failed: 10 })],
    10,
    null,
    { do: 'wait', until: 1000 },
  ],
  [
    'the last wave waits for everybody',
    campaignOf({ wave: 1 }),
    [counts({ installed: 10 }), counts({ installed: 9, pending: 1 })],
    10,
    null,
    { do: 'wait', until: 1000 },
  ],
  ['everybody has it: activate', campaignOf({ wave: 1 }), [counts({ installed: 10 }), counts({ installed: 9, 'timed-out': 1 })], 10, null, { do: 'activate' }],
  ['nobody at all: activate', campaignOf({ waves: 1 }), [counts({})], 0, null, { do: 'activate' }],
  [
    'activating waits for the proofs',
    campaignOf({ state: 'activating', wave: 1 }),
    [counts({ active: 10 }), counts({ active: 9, installed: 1 })],
    10,
    5000,
    { do: 'wait', until: 1000 },
  ],
  [
    'activating: who is silent at the deadline times out',
    campaignOf({ state: 'activating', wave: 1 }),
    [counts({ active: 10 }), counts({ active: 9, installed: 1 })],
    1000,
    5000,
    { do: 'time-out', waves: [0, 1], stages: ['pending', 'delivered', 'installed'] },
  ],
  [
    'the old epoch is still readable: wait',
    campaignOf({ state: 'activating', wave: 1 }),
    [counts({ active: 10 }), counts({ active: 10 })],
    10,
    5000,
    { do: 'wait', until: 5000 },
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
    { do: 'wait', until: 1000 },
  ],
  [
    'retiring: silent ones time out',
    campaignOf({ state: 'retiring', wave: 1 }),
    [counts({ retired: 9, active: 1 }), counts({ retired: 10 })],
    1000,
    null,
    { do: 'time-out', waves: [0, 1], stages: ['active'] },
  ],
  ['all retired: finish', campaignOf({ state: 'retiring', wave: 1 }), [counts({ retired: 10 }), counts({ retired: 10 })], 10, null, { do: 'finish' }],
  ...(['paused', 'halted', 'aborted', 'done'] as const).map((state): (typeof table)[number] => [
    `${state}: nothing happens by itself`,
    campaignOf({ state }),
    [counts({ installed: 10 }), none],
    9_999_999,
    null,
    { do: 'wait', until: null },
  ]),
]

test.each(table)('%s', (_, campaign, progress, now, readableUntil, want) => {
  expect(nextStep(campaign, progress, now, readableUntil)).toEqual(want)
  expect(nextStep(campaign, progress, now, readableUntil)).toEqual(want)
})

test('whatever the devices do, a campaign ends, and its targets add up', () =>
  fc.assert(
    fc.property(
      fc.array(fc.constantFrom('installs', 'fails', 'silent'), { minLength: 0, maxLength: 40 }),
      fc.constantFrom([1], [0.5, 1], [0.1, 0.5, 1]),
      fc.constantFrom(0, 0.5, 1),
      fc.constantFrom(0, 0.1, 1),
      (devices, waves, successThreshold, errorThreshold) => {
        let campaign = campaignOf({ waves: waves.length }, { waves, successThreshold, errorThreshold })
        const targets = devices.map((does, at) => ({ does, wave: waveOf(at, devices.length, waves), stage: 'pending' as Stage }))
        let now = 0
        for (let steps = 0; ; steps++) {
          expect(steps).toBeLessThan(500)
          const progress = waves.map((_, wave) =>
            counts(Object.fromEntries(stages.map((stage) => [stage, targets.filter((one) => one.wave === wave && one.stage === stage).length]))),
          )
          expect(progress.flatMap((of) => Object.values(of)).reduce((sum, count) => sum + count, 0)).toBe(devices.length)
          const step = nextStep(campaign, progress, now, 2_000)
          if (campaign.state === 'done' || campaign.state === 'halted') break
          const open = targets.filter(({ wave }) => wave <= campaign.wave)
          if (step.do === 'halt') campaign = { ...campaign, state: 'halted' }
          else if (step.do === 'finish') campaign = { ...campaign, state: 'done' }
          else if (step.do === 'open-wave') campaign = { ...campaign, wave: step.wave, since: now }
          else if (step.do === 'activate') campaign = { ...campaign, state: 'activating', since: now }
          else if (step.do === 'retire') campaign = { ...campaign, state: 'retiring', since: now }
          else if (step.do === 'time-out') {
            for (const one of open) if (step.stages.includes(one.stage)) one.stage = 'timed-out'
          } else {
            const next = open.find(
              ({ does, stage }) =>
                (does !== 'silent' && stage === 'pending') ||
                (does === 'installs' && ((campaign.state === 'activating' && stage === 'installed') || (campaign.state === 'retiring' && stage === 'active'))),
            )
            if (next === undefined) now = step.until ?? now
            else next.stage = next.stage === 'pending' ? (next.does === 'fails' ? 'failed' : 'installed') : next.stage === 'installed' ? 'active' : 'retired'
          }
        }
        // The first wave of a halted campaign is all that was touched when the second never opened.
        for (const { wave, stage } of targets) if (wave > campaign.wave) expect(stage).toBe('pending')
      },
    ),
    { numRuns: process.env['FLEETKEY_LONG'] === '1' ? 5_000 : 200 },
  ))

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
})
