import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { assuranceLevels, type GroupPolicy } from './device.ts'
import { defaultPolicy, isAssured, strictestPolicy } from './policy.ts'

const lax: GroupPolicy = {
  connectionProof: false,
  rotateOnLeave: false,
  rotateOnJoin: false,
  history: true,
  releases: 'any',
  minimumRelease: 0,
  onUnknown: 'warn',
  onWithdrawn: 'warn',
  onDebug: 'warn',
  ima: 'ignored',
  onUnlisted: 'warn',
  assurance: 'token',
  attestAge: 86_400,
  rotateOnQuarantine: false,
}

/** One group is lax, the other not in one way: that way holds. */
const stricter: readonly Partial<GroupPolicy>[] = [
  { connectionProof: true },
  { rotateOnLeave: true },
  { rotateOnJoin: true },
  { history: false },
  { releases: ['m/1'] },
  { releases: [] },
  { minimumRelease: 7 },
  { onUnknown: 'quarantine' },
  { onWithdrawn: 'quarantine' },
  { onDebug: 'quarantine' },
  { ima: 'required' },
  { ima: 'listed' },
  { onUnlisted: 'quarantine' },
  { assurance: 'attested' },
  { attestAge: 60 },
  { rotateOnQuarantine: true },
]

describe('of several groups the strictest wins', () => {
  test.each(stricter)('%o', (change) => {
    const strict = { ...lax, ...change }
    for (const groups of [
      [lax, strict],
      [strict, lax],
      [lax, strict, lax],
    ])
      expect(strictestPolicy(groups)).toEqual(strict)
  })

  test('of two lists only what both accept', () =>
    expect(
      strictestPolicy([
        { ...lax, releases: ['m/1', 'm/2'] },
        { ...lax, releases: ['m/2', 'm/3'] },
      ]).releases,
    ).toEqual(['m/2']))

  test('one group: its own; none: the default', () => {
    expect(strictestPolicy([lax])).toEqual(lax)
    expect(strictestPolicy([])).toEqual(defaultPolicy)
  })

  test('order does not matter, and one more group never allows more', () => {
    const severity = fc.constantFrom<'quarantine' | 'warn'>('quarantine', 'warn')
    const policies = fc.array(
      fc.record<GroupPolicy>({
        connectionProof: fc.boolean(),
        rotateOnLeave: fc.boolean(),
        rotateOnJoin: fc.boolean(),
        history: fc.boolean(),
        releases: fc.oneof(fc.constant('any' as const), fc.subarray(['m/1', 'm/2', 'm/3'])),
        minimumRelease: fc.nat(9),
        onUnknown: severity,
        onWithdrawn: severity,
        onDebug: severity,
        ima: fc.constantFrom('ignored', 'required', 'listed'),
        onUnlisted: severity,
        assurance: fc.constantFrom(...assuranceLevels),
        attestAge: fc.integer({ min: 60, max: 90_000 }),
        rotateOnQuarantine: fc.boolean(),
      }),
      { minLength: 1, maxLength: 5 },
    )
    fc.assert(
      fc.property(policies, (groups) => {
        const all = strictestPolicy(groups)
        expect(strictestPolicy(groups.toReversed())).toEqual(all)
        for (const one of groups) expect(strictestPolicy([all, one])).toEqual(all)
      }),
    )
  })
})

test('assurance from low to high', () => {
  const admitted = assuranceLevels.map((least) => assuranceLevels.filter((level) => isAssured(level, least)))
  expect(admitted).toEqual([['token', 'simulated', 'idevid', 'attested'], ['simulated', 'idevid', 'attested'], ['idevid', 'attested'], ['attested']])
})
