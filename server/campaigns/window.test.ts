import fc from 'fast-check'
import { expect, test } from 'vitest'
import { windowAt, type Window } from './window.ts'

const at = (text: string): number => Date.parse(text)
const every = [0, 1, 2, 3, 4, 5, 6]

const table: readonly [string, Window, string, ReturnType<typeof windowAt>][] = [
  ['before it', { from: 120, minutes: 60, days: every, offset: 0 }, '2027-01-01T01:59:59.999Z', { open: false, opens: at('2027-01-01T02:00:00Z') }],
  [
    'its first moment',
    { from: 120, minutes: 60, days: every, offset: 0 },
    '2027-01-01T02:00:00Z',
    { open: true, since: at('2027-01-01T02:00:00Z'), until: at('2027-01-01T03:00:00Z') },
  ],
  ['its end is outside', { from: 120, minutes: 60, days: every, offset: 0 }, '2027-01-01T03:00:00Z', { open: false, opens: at('2027-01-02T02:00:00Z') }],
  [
    'past midnight it belongs to the day before',
    { from: 22 * 60, minutes: 360, days: [5], offset: 0 },
    '2027-01-02T03:00:00Z',
    { open: true, since: at('2027-01-01T22:00:00Z'), until: at('2027-01-02T04:00:00Z') },
  ],
  ['another day of the week', { from: 120, minutes: 60, days: [0], offset: 0 }, '2027-01-01T02:30:00Z', { open: false, opens: at('2027-01-03T02:00:00Z') }],
  [
    'an hour ahead of UTC',
    { from: 0, minutes: 60, days: [6], offset: 60 },
    '2027-01-01T23:30:00Z',
    { open: true, since: at('2027-01-01T23:00:00Z'), until: at('2027-01-02T00:00:00Z') },
  ],
  ['ten behind', { from: 0, minutes: 60, days: [5], offset: -600 }, '2027-01-01T09:59:00Z', { open: false, opens: at('2027-01-01T10:00:00Z') }],
]
test.each(table)('%s', (_, window, now, want) => expect(windowAt(window, at(now))).toEqual(want))

test('whatever it is: open exactly in its minutes, and what is said of the next change is true', () =>
  fc.assert(
    fc.property(
      fc.record({
        from: fc.integer({ min: 0, max: 1439 }),
        minutes: fc.integer({ min: 1, max: 1440 }),
        days: fc.subarray(every, { minLength: 1 }),
        offset: fc.integer({ min: -840, max: 840 }),
      }),
      fc.integer({ min: 0, max: 4_000_000_000_000 }),
      (window, now) => {
        /** By asking every day's window. */
        const isOpen = (when: number): boolean => {
          const local = when + window.offset * 60_000
          for (const back of [0, 1]) {
            const day = Math.floor(local / 86_400_000) - back
            const minute = (local - day * 86_400_000) / 60_000
            if (window.days.includes((day + 4) % 7) && minute >= window.from && minute < window.from + window.minutes) return true
          }
          return false
        }
        const found = windowAt(window, now)
        expect(found.open).toBe(isOpen(now))
        if (found.open) {
          expect(found.since <= now && now < found.until).toBe(true)
        } else {
          expect(found.opens).toBeGreaterThan(now)
          expect(windowAt(window, found.opens).open).toBe(true)
          expect(windowAt(window, found.opens - 1).open).toBe(false)
        }
      },
    ),
    { numRuns: 300 },
  ))
