import { randomBytes } from 'node:crypto'
import { expect, test } from 'vitest'
import { points, pointOf } from './revocation-list.ts'
import { serialOf } from './tbs.ts'

const now = Date.UTC(2027, 0, 1, 12)

test('a serial is its second and 92 bits of what it is given', () => {
  const second = (now / 1000).toString(16)
  expect(serialOf(Buffer.from('a0123456789abcdeffedcba9', 'hex'), now + 999)).toBe(`4${second[0] ?? ''}a${second.slice(1)}0123456789abcdeffedcba`)
  for (const at of [0, now, Date.UTC(2106, 1, 7, 6, 28, 16), Date.UTC(9999, 11, 31)])
    for (const fill of [0, 0xff]) expect(serialOf(new Uint8Array(12).fill(fill), at)).toMatch(/^4[0-9a-f]{31}$/)
})

test('serials of one point ascend with time, and every point has as many', () => {
  const serials = Array.from({ length: 1_600 }, (_, at) => serialOf(randomBytes(12), now + at * 1000))
  for (const point of points) {
    const own = serials.filter((serial) => pointOf(serial) === point)
    expect(own).toEqual(own.toSorted())
    // A hundred are expected: fewer than fifty are one in ten million.
    expect(own.length).toBeGreaterThan(50)
  }
})
