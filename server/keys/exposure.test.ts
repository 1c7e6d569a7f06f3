import { expect, test } from 'vitest'
import { sharedBy, topicsRead, type Exposure } from './exposure.ts'
import type { Span } from './span.ts'

const span = (topic: string, from: number, until: number | null): Span => ({
  id: `topic/${topic}/${from}`,
  version: 0,
  of: `topic/${topic}`,
  by: 'key/k',
  from,
  until,
  open: null,
  lot: null,
  topic,
})
const used = (usedFrom: number | null, usedUntil: number | null) => ({ usedFrom, usedUntil })

test.each([
  ['the whole time of both', [span('a', 10, 20)], [used(0, 30)], [{ topic: 'a', from: 10, until: 20 }]],
  ['what both have in common', [span('a', 10, 20)], [used(15, null)], [{ topic: 'a', from: 15, until: 20 }]],
  ['still', [span('a', 10, null)], [used(5, null)], [{ topic: 'a', from: 10, until: null }]],
  ['epochs that follow each other are one time', [span('a', 0, null)], [used(10, 20), used(20, 30), used(30, null)], [{ topic: 'a', from: 10, until: null }]],
  [
    'an epoch in between that it did not have is a gap',
    [span('a', 0, null)],
    [used(10, 20), used(30, 40)],
    [
      { topic: 'a', from: 10, until: 20 },
      { topic: 'a', from: 30, until: 40 },
    ],
  ],
  [
    'a topic that was given up and taken up again',
    [span('a', 0, 5), span('b', 0, null), span('a', 8, null)],
    [used(1, 9)],
    [
      { topic: 'a', from: 1, until: 5 },
      { topic: 'a', from: 8, until: 9 },
      { topic: 'b', from: 1, until: 9 },
    ],
  ],
  ['nothing under an epoch that was never in use', [span('a', 0, null)], [used(null, null)], []],
  ['nothing before it, nothing after it', [span('a', 0, 10), span('b', 20, null)], [used(10, 20)], []],
  ['an open end within another', [span('a', 0, null)], [used(10, null), used(15, 20)], [{ topic: 'a', from: 10, until: null }]],
] as const)('topics that could be read: %s', (_name, spans, epochs, want) => expect(topicsRead(spans, epochs)).toEqual(want))

test('what several could read is what the first began and the last ended', () => {
  const one = (heldFrom: number, heldUntil: number | null): Exposure => ({ epoch: 1, state: 'active', proof: 'active', heldFrom, heldUntil, ...used(1, 9) })
  const all = [one(5, 7), one(3, 6), one(8, 9)].reduce(sharedBy, undefined as ReturnType<typeof sharedBy> | undefined)
  expect(all).toEqual({ epoch: 1, state: 'active', devices: 3, heldFrom: 3, heldUntil: 9, usedFrom: 1, usedUntil: 9 })
  expect(sharedBy(all, one(9, null)).heldUntil).toBeNull()
  expect(sharedBy(sharedBy(undefined, one(1, null)), one(1, 2)).heldUntil).toBeNull()
})
