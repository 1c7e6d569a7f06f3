import { expect, test } from 'vitest'
import { systemRandom } from './random.ts'

test.each([0, 1, 12, 15, 16, 17, 32, 64, 65, 5_000])('%i bytes: so many, of their own, never the same', (length) => {
  const random = systemRandom()
  const seen = new Set<string>()
  // The small ones go through what is drawn ahead several times.
  for (let call = 0; call < 1_000; call++) {
    const bytes = random(length)
    expect(bytes.length).toBe(length)
    expect(bytes.buffer.byteLength).toBe(length)
    seen.add(Buffer.from(bytes).toString('hex'))
  }
  expect(seen.size).toBe(length === 0 ? 1 : length === 1 ? seen.size : 1_000)
})

test('every byte occurs about as often as any other', () => {
  const random = systemRandom()
  const counts = new Uint32Array(256)
  for (let call = 0; call < 40_000; call++) for (const byte of random(16)) counts[byte] = (counts[byte] ?? 0) + 1
  // 2,500 are expected of each; six deviations.
  for (const count of counts) expect(Math.abs(count - 2_500)).toBeLessThan(300)
})
