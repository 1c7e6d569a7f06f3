import fc from 'fast-check'
import { afterAll, expect, test } from 'vitest'
import { defaultPolicy, faultOf, isUnfinished, transitions, type CampaignPolicy } from './campaign.ts'
import { begin, drive, help, orders, say, seen, type Deed, type Order } from './test-model.ts'

const minute = 60_000

const policyOf = fc
  .record({
    waves: fc.constantFrom<CampaignPolicy['waves']>([1], [0.5, 1], [0.1, 0.5, 1], [{ devices: 1 }, 1], [{ devices: 2 }, 0.3, 1]),
    successThreshold: fc.constantFrom(0, 0.29, 0.5, 0.95, 1),
    errorThreshold: fc.constantFrom(0, 0.1, 0.29, 0.3, 0.5, 1),
    silent: fc.constantFrom<CampaignPolicy['silent']>('success', 'error', 'neither'),
    advance: fc.constantFrom<CampaignPolicy['advance']>('automatic', 'manual'),
    soak: fc.constantFrom(0, 0, 5 * minute),
    deadline: fc.constantFrom(minute, 10 * minute),
    retries: fc.constantFrom(0, 0, 1, 3),
    window: fc.constantFrom(null, null, { from: 30, minutes: 60, days: [0, 1, 2, 3, 4, 5, 6], offset: 0 }, { from: 0, minutes: 30, days: [5, 6], offset: 60 }),
    startAt: fc.constantFrom(null, null, 20 * minute),
    approval: fc.boolean(),
    overlap: fc.constantFrom<CampaignPolicy['overlap']>('patient', 'strict'),
    targets: fc.constantFrom<CampaignPolicy['targets']>('frozen', 'live'),
  })
  .map((policy): CampaignPolicy => ({ ...defaultPolicy, ...policy }))
  .filter((policy) => faultOf(policy) === undefined)

type Happening =
  | { readonly what: 'device'; readonly at: number; readonly does: Deed }
  | { readonly what: 'help' }
  | { readonly what: 'time'; readonly by: number }
  | { readonly what: 'order'; readonly order: Order }

const happening: fc.Arbitrary<Happening> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      what: fc.constant('device' as const),
      at: fc.nat(11),
      does: fc.constantFrom('go-on' as const, 'go-on' as const, 'go-on' as const, 'fail' as const, 'return' as const, 'leave' as const, 'quarantine' as const),
    }),
  },
  { weight: 3, arbitrary: fc.constant({ what: 'help' as const }) },
  { weight: 2, arbitrary: fc.record({ what: fc.constant('time' as const), by: fc.constantFrom(1, minute, 10 * minute, 60 * minute) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      what: fc.constant('order' as const),
      order: fc.constantFrom<Order>(
        ...([
          'approve',
          'approve',
          'approve',
          'pause',
          'pause',
          'resume',
          'resume',
          'retry',
          'rollback',
          'advance',
          'advance',
          'confirm',
          'join',
          'join',
          'abort',
        ] as const),
      ),
    }),
  },
)

const long = process.env['FLEETKEY_LONG'] === '1'

test('whatever devices, persons and the clock do: every step is allowed, it halts exactly at its threshold, its stages add up, and it comes to an end', () =>
  fc.assert(
    fc.property(policyOf, fc.nat(12), fc.boolean(), fc.array(happening, { maxLength: 60, size: 'max' }), (policy, devices, current, happenings) => {
      const model = begin(policy, { devices, current, readers: 30 * minute })
      seen.states.add('preparing')
      for (const one of happenings) {
        if (one.what === 'time') model.now += one.by
        else if (one.what === 'help') help(model, drive(model))
        else if (one.what === 'device') say(model, one.at, one.does)
        else orders[one.order](model)
        drive(model)
      }
      // In the end everybody does what is asked, and persons see to what waits for them: nothing hangs.
      for (let rounds = 0; isUnfinished(model.campaign.state); rounds++) {
        expect(rounds, JSON.stringify(model.campaign)).toBeLessThan(400)
        const wait = drive(model)
        if (wait.for === 'nothing' && isUnfinished(model.campaign.state)) (rounds > 200 ? orders.rollback : orders.retry)(model)
        else help(model, wait)
      }
      expect(drive(model)).toEqual({ do: 'wait', for: 'nothing', until: null })
    }),
    // The same each time, so that what it covers can be asked below; the long run goes elsewhere.
    long ? { numRuns: 20_000 } : { numRuns: 800, seed: 5 },
  ))

afterAll(() => {
  // Every state, every step, and every way from one to the other was taken. What ends a campaign from outside (a newer one of the same key) is `abort` here, but for `done`.
  expect([...seen.states].toSorted()).toEqual(Object.keys(transitions).toSorted())
  const wanted = Object.entries(transitions).flatMap(([from, to]) => to.map((one) => `${from} ${one}`))
  expect(wanted.filter((edge) => !seen.edges.has(edge))).toEqual([])
  expect([...seen.steps].toSorted()).toEqual(['activate', 'finish', 'halt', 'open-wave', 'prepare', 'retire', 'soak', 'start', 'time-out'])
  expect([...seen.waits].toSorted()).toEqual([
    'approval',
    'confirmation',
    'devices',
    'nothing',
    'person',
    'readers',
    'soak',
    'start-time',
    'stragglers',
    'window',
  ])
})
