import { createHash } from 'node:crypto'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { waveOf, type WaveEnd } from './campaign.ts'
import { drawOf, Sample, waveAt } from './sample.ts'

const shares = fc.uniqueArray(fc.double({ min: 0.01, max: 0.99, noNaN: true }), { maxLength: 3 }).map((some) => some.toSorted((one, other) => one - other))
const counts = fc.uniqueArray(fc.integer({ min: 1, max: 400 }), { maxLength: 3 }).map((some) => some.toSorted((one, other) => one - other))

test('everybody is in the wave of its place in the order of the hashes', () => {
  fc.assert(
    fc.property(fc.nat(600), shares, counts, fc.boolean(), (total, some, ends, countsFirst) => {
      const devices = Array.from({ length: total }, (_, at) => `gw-${at}`)
      const hashOf = (device: string): string => createHash('sha256').update(`c/${device}`).digest('hex')
      const ordered = devices.toSorted((one, other) => (hashOf(one) < hashOf(other) ? -1 : 1))
      const fixed = ends.map((end): WaveEnd => ({ devices: end }))
      const waves = [...(countsFirst ? [...fixed, ...some] : [...some, ...fixed]), 1]
      const sample = new Sample()
      for (const device of devices) sample.add(drawOf('c', device))
      const bounds = sample.bounds(waves)
      expect(ordered.map((device) => waveAt(bounds, drawOf('c', device)))).toEqual(ordered.map((_device, at) => waveOf(at, total, waves)))
    }),
    { numRuns: 60 },
  )
})

test('another campaign has another order', () => expect(drawOf('c', 'gw-1')).not.toBe(drawOf('d', 'gw-1')))
