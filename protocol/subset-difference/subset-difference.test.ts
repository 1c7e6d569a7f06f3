import { randomBytes } from 'node:crypto'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { Secret } from '../secret.ts'
import { isFor, openWraps, wrapFor, type BroadcastContext } from './broadcast.ts'
import { cover } from './cover.ts'
import { labelCount, labelFor, labelLength, labelOf, labelsOf } from './labels.ts'
import { contains, everybody, slots, type Subset } from './tree.ts'

const master = new Secret(randomBytes(32))
const material = new Secret(randomBytes(32))
const context: BroadcastContext = { tenant: 'plant', group: 'sensors', key: 'telemetry', shard: 3, generation: 2, epoch: 7, nonce: randomBytes(16) }

/** How many subsets of a small tree hold each slot, by looking at every leaf below every node. */
const holders = (subsets: readonly Subset[], size: number): readonly number[] => {
  const below = (node: number): number[] => (node >= size ? [node - size] : [...below(2 * node), ...below(2 * node + 1)])
  const counts = Array.from({ length: size }, () => 0)
  for (const { under, except } of subsets) {
    const not = new Set(except === 0 ? [] : below(except))
    for (const slot of below(under)) if (!not.has(slot)) counts[slot] = (counts[slot] ?? 0) + 1
  }
  return counts
}

describe('the cover', () => {
  test('every choice of excluded and given slots in trees of 2 to 16 slots', () => {
    const wrong: unknown[] = []
    for (const size of [2, 4, 8, 16])
      for (let given = 0; given <= size; given++)
        for (let bits = 0; bits < 2 ** given; bits++) {
          const excluded = Array.from({ length: given }, (_, slot) => slot).filter((slot) => (bits >> slot) & 1)
          const subsets = cover(excluded, given, size)
          const wanted = Array.from({ length: size }, (_, slot) => (slot < given && !((bits >> slot) & 1) ? 1 : 0))
          const found = holders(subsets, size)
          if (found.some((count, slot) => count !== wanted[slot])) wrong.push({ size, given, excluded, found })
          // Naor, Naor, Lotspiech 2001, lemma 2: at most 2r - 1 subsets for r excluded; a tail is at most as many subtrees as the tree is high.
          const most = Math.max(1, 2 * (excluded.length + (given < size ? Math.log2(size) : 0)) - 1)
          if (subsets.length > most) wrong.push({ size, given, excluded, subsets })
        }
    expect(wrong.slice(0, 3)).toEqual([])
  })

  test('any choice in a whole shard: exactly one subset for each member, none for anybody else', () => {
    fc.assert(
      fc.property(fc.uniqueArray(fc.nat(slots - 1), { maxLength: 300 }), fc.nat(slots), (some, given) => {
        const excluded = some.filter((slot) => slot < given).toSorted((one, other) => one - other)
        const out = new Set(excluded)
        const found = holders(cover(excluded, given), slots)
        return found.every((count, slot) => count === (slot < given && !out.has(slot) ? 1 : 0))
      }),
      { numRuns: 60 },
    )
  })

  test('nobody excluded is one subset, one excluded is one, a tail is at most twelve', () => {
    expect(cover([], slots)).toEqual([everybody])
    for (const slot of [0, 1, 1000, slots - 1]) expect(cover([slot], slots)).toHaveLength(1)
    for (let given = 1; given < slots; given++) expect(cover([], given).length).toBeLessThanOrEqual(12)
    expect(cover([], 0)).toEqual([])
  })
})

describe('labels', () => {
  test('a member holds 79, and they are those that the server derives for each subset it is in', () => {
    fc.assert(
      fc.property(fc.nat(slots - 1), fc.array(fc.nat(slots - 1), { minLength: 1, maxLength: 40 }), fc.nat(slots), (slot, some, given) => {
        const labels = labelsOf(master, slot)
        expect(labels).toHaveLength(79 * labelLength)
        const excluded = [...new Set(some)].filter((one) => one < given).toSorted((one, other) => one - other)
        for (const subset of [everybody, ...cover(excluded, given)]) {
          const own = labelFor(labels, slot, subset)
          if (contains(subset, slot)) expect(Buffer.from(own ?? [])).toEqual(labelOf(master, subset))
          else expect(own).toBeUndefined()
        }
      }),
      { numRuns: 60 },
    )
    expect(labelCount).toBe(79)
  })

  test('no pooling of labels gives one of a subset that none of the pool is in', () => {
    fc.assert(
      fc.property(fc.uniqueArray(fc.nat(slots - 1), { minLength: 1, maxLength: 60 }), (some) => {
        const pool = some.toSorted((one, other) => one - other)
        const held = new Set<string>()
        for (const slot of pool) {
          const labels = labelsOf(master, slot)
          for (let at = 0; at < labelCount; at++) held.add(Buffer.from(labels.subarray(at * labelLength, (at + 1) * labelLength)).toString('hex'))
        }
        // What the pool could derive a label from: the label of the same subtree, for any node on the way from it to what is excepted.
        return cover(pool, slots).every(({ under, except }) => {
          for (let node = except; node !== under; node >>= 1) if (held.has(Buffer.from(labelOf(master, { under, except: node })).toString('hex'))) return false
          return true
        })
      }),
      { numRuns: 30 },
    )
  })
})

describe('a broadcast', () => {
  const opened = (wraps: Uint8Array, slot: number, of: BroadcastContext = context): boolean =>
    openWraps(wraps, labelsOf(master, slot), slot, of)?.equals(material) ?? false

  test('every member opens it, every excluded one and whoever joins later does not', () => {
    fc.assert(
      fc.property(fc.uniqueArray(fc.nat(slots - 1), { minLength: 1, maxLength: 100 }), fc.integer({ min: 1, max: slots }), (some, given) => {
        const excluded = some.filter((slot) => slot < given).toSorted((one, other) => one - other)
        const out = new Set(excluded)
        const wraps = wrapFor(master, cover(excluded, given), material, context)
        for (const slot of [...some, 0, given - 1, Math.min(given, slots - 1), slots - 1].flatMap((one) => [one, (one + 1) % slots])) {
          const member = slot < given && !out.has(slot)
          expect(opened(wraps, slot)).toBe(member)
          expect(isFor(wraps, slot)).toBe(member)
        }
      }),
      { numRuns: 25 },
    )
  })

  test('a leaver gets nothing out of any entry, whatever slot it says it has', () => {
    const wraps = wrapFor(master, cover([17, 18, 900], 3000), material, context)
    for (const leaver of [17, 18, 900, 3000]) {
      const labels = labelsOf(master, leaver)
      for (const slot of [16, 19, 2999]) expect(() => openWraps(wraps, labels, slot, context)).toThrow(expect.objectContaining({ reason: 'broadcast.open' }))
    }
  })

  test.each([
    ['tenant', { tenant: 'other' }],
    ['group', { group: 'others' }],
    ['key', { key: 'commands' }],
    ['shard', { shard: 4 }],
    ['generation', { generation: 3 }],
    ['epoch', { epoch: 8 }],
    ['nonce', { nonce: new Uint8Array(16) }],
  ] as const)('opens in no other place: %s', (_field, change) => {
    const wraps = wrapFor(master, cover([5], slots), material, context)
    expect(opened(wraps, 6)).toBe(true)
    expect(() => opened(wraps, 6, { ...context, ...change })).toThrow(expect.objectContaining({ reason: 'broadcast.open' }))
  })

  test('another generation of the same shard opens nothing', () => {
    const wraps = wrapFor(new Secret(randomBytes(32)), cover([5], slots), material, context)
    expect(() => opened(wraps, 6)).toThrow(expect.objectContaining({ reason: 'broadcast.open' }))
  })

  test('an altered, shortened or impossible one is refused', () => {
    const wraps = wrapFor(master, cover([5], slots), material, context)
    const altered = (at: number, value: number): Uint8Array => Uint8Array.from(wraps, (byte, index) => (index === at ? byte ^ value : byte))
    for (let at = 4; at < wraps.length; at++) expect(() => opened(altered(at, 1), 6)).toThrow(expect.objectContaining({ reason: 'broadcast.open' }))
    expect(() => opened(wraps.subarray(1), 6)).toThrow(expect.objectContaining({ reason: 'broadcast.length' }))
    expect(() => opened(new Uint8Array(52 * 901), 6)).toThrow(expect.objectContaining({ reason: 'broadcast.length' }))
    for (const [under, except] of [
      [0, 0],
      [2, 0],
      [1, 1],
      [2, 3],
      [4096, 4096],
      [1, 8192],
      [3, 1],
      [65535, 65535],
    ] as const)
      expect(() => opened(Uint8Array.of(under >> 8, under & 255, except >> 8, except & 255, ...wraps.subarray(4)), 6)).toThrow(
        expect.objectContaining({ reason: 'broadcast.subset' }),
      )
  })
})
