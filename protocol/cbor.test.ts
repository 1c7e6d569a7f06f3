import { decode as cborgDecode, encode as cborgEncode, rfc8949EncodeOptions } from 'cborg'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { decode, encode } from './cbor.ts'
import { Problem } from './problem.ts'

const runs = process.env['FLEETKEY_LONG'] === '1' ? 20_000 : 300
const hex = (text: string): Uint8Array => new Uint8Array(Buffer.from(text.replaceAll(' ', ''), 'hex'))
const leaf = fc.oneof(
  fc.integer({ min: -(2 ** 40), max: 2 ** 40 }),
  fc.string({ maxLength: 20 }),
  fc.boolean(),
  fc.constant(null),
  fc.uint8Array({ maxLength: 40 }),
)
const key = fc.string({ minLength: 1, maxLength: 8 }).filter((text) => text !== '__proto__')
const value = fc.oneof(
  leaf,
  fc.array(leaf, { maxLength: 5 }),
  fc.dictionary(key, fc.oneof(leaf, fc.array(leaf, { maxLength: 3 })), { maxKeys: 6, noNullPrototype: true }),
)

test('what was encoded decodes to the same, and encodes to the same bytes', () =>
  fc.assert(
    fc.property(value, (of) => {
      const bytes = encode(of)
      const again = decode(bytes)
      expect(again).toEqual(of)
      expect(Buffer.from(encode(again))).toEqual(Buffer.from(bytes))
    }),
    { numRuns: runs },
  ))

/** The same rules by the library alone: strict decoding, and encoding again. Undefined for what is refused. */
const judged = (bytes: Uint8Array, useMaps: boolean): { value: unknown } | undefined => {
  const strict = { strict: true, allowIndefinite: false, allowUndefined: false, allowInfinity: false, allowNaN: false, allowBigInt: false }
  try {
    const value: unknown = cborgDecode(bytes, { ...strict, rejectDuplicateMapKeys: true, useMaps })
    return Buffer.compare(cborgEncode(value, rfc8949EncodeOptions), bytes) === 0 ? { value } : undefined
  } catch {
    return undefined
  }
}
const ours = (bytes: Uint8Array, useMaps: boolean): { value: unknown } | undefined => {
  try {
    return { value: decode(bytes, { useMaps }) }
  } catch (thrown) {
    if (!(thrown instanceof Problem)) throw thrown
    return undefined
  }
}

const anything = fc.letrec((tie) => ({
  value: fc.oneof(
    { maxDepth: 6, depthSize: 'small' },
    leaf,
    fc.double({ noDefaultInfinity: true, noNaN: true }),
    fc.integer({ min: Number.MIN_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER }),
    fc.string({ unit: 'binary', maxLength: 300 }).filter((text) => text.isWellFormed()),
    fc.constantFrom(23, 24, 255, 256, 65_535, 65_536, 2 ** 32 - 1, 2 ** 32, -24, -25, -256, -257, -65_536, -65_537, -(2 ** 32), -(2 ** 32) - 1, 0.5, -0),
    fc.array(tie('value'), { maxLength: 30 }),
    fc.dictionary(fc.string({ maxLength: 30 }), tie('value'), { maxKeys: 30, noNullPrototype: true }),
    fc
      .uniqueArray(fc.tuple(fc.oneof(fc.integer({ min: -300, max: 70_000 }), fc.string({ maxLength: 4 })), tie('value')), {
        selector: ([key]) => key,
        maxLength: 6,
      })
      .map((pairs) => new Map(pairs)),
  ),
})).value

test('writes what the library writes', () =>
  fc.assert(
    fc.property(anything, (of) => {
      expect(Buffer.from(encode(of)).toString('hex')).toBe(Buffer.from(cborgEncode(of, rfc8949EncodeOptions)).toString('hex'))
    }),
    { numRuns: runs * 3 },
  ))

test('reads what the library reads, and refuses what it refuses', () => {
  const mutated = fc.tuple(anything, fc.array(fc.tuple(fc.nat(), fc.nat(255)), { maxLength: 3 }), fc.nat(3)).map(([of, changes, cut]) => {
    const bytes = encode(of)
    for (const [at, byte] of changes) bytes[at % bytes.length] = byte
    return bytes.subarray(0, bytes.length - (cut === 3 ? 1 : 0))
  })
  fc.assert(
    fc.property(fc.oneof(mutated, fc.uint8Array({ maxLength: 30 })), fc.boolean(), (bytes, useMaps) => {
      const [want, got] = [judged(bytes, useMaps), ours(bytes, useMaps)]
      if (got !== undefined) expect(got.value).toEqual(want?.value)
      // Narrower in two ways: labels of headers are text or integers, and nothing is nested deeper than 16.
      if (want !== undefined && got === undefined) expect(isNarrower(want.value)).toBe(true)
      expect(got === undefined || want !== undefined).toBe(true)
    }),
    { numRuns: runs * 10 },
  )
})

const isNarrower = (value: unknown, depth = 0): boolean => {
  if (typeof value !== 'object' || value === null || value instanceof Uint8Array) return false
  const [keys, items] = value instanceof Map ? [[...value.keys()], [...value.values()]] : [[], Object.values(value)]
  if (keys.some((key) => typeof key !== 'string' && typeof key !== 'number')) return true
  return depth >= 16 || items.some((item) => isNarrower(item, depth + 1))
}

test('any bytes: a value that encodes to exactly them, or malformed; never another error', () =>
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 60 }), fc.boolean(), (bytes, useMaps) => {
      try {
        expect(Buffer.from(encode(decode(bytes, { useMaps })))).toEqual(Buffer.from(bytes))
      } catch (thrown) {
        if (!(thrown instanceof Problem)) throw thrown
        expect(thrown.code).toBe('malformed')
      }
    }),
    { numRuns: runs * 3 },
  ))

describe('refused', () => {
  test.each([
    ['an integer in two bytes that fits in one', '18 05'],
    ['an integer in three bytes that fits in two', '19 00ff'],
    ['a length in two bytes that fits in one', '58 01 00'],
    ['indefinite bytes', '5f 41 00 ff'],
    ['an indefinite array', '9f 01 ff'],
    ['an indefinite map', 'bf 61 61 01 ff'],
    ['a key twice', 'a2 61 61 01 61 61 02'],
    ['keys in another order', 'a2 61 62 01 61 61 02'],
    ['a float that is an integer', 'fb 3ff0000000000000'],
    ['a half float', 'f9 3c00'],
    ['infinity', 'f9 7c00'],
    ['NaN', 'f9 7e00'],
    ['undefined', 'f7'],
    ['bytes after the value', '01 01'],
    ['nothing', ''],
    ['an array that ends early', '83 01 02'],
    ['a string of 4 GB', '7a ffffffff'],
    ['text that is no UTF-8', '61 ff'],
    ['a tag', 'c0 60'],
    ['a simple value', 'e0'],
    ['a break', 'ff'],
    ['17 arrays in each other', `${'81'.repeat(17)} 01`],
    ['100,000 arrays in each other', `${'81'.repeat(100_000)} 01`],
  ])('%s', (_, text) => expect(() => decode(hex(text))).toThrow(Problem))
})

test('maps whose keys are arrays or maps', () => {
  for (const text of ['a2 80 01 81 00 02', 'a2 a0 01 a1 00 00 02', '84 40 a2 80 01 81 00 02 40 40'])
    expect(() => decode(hex(text), { useMaps: true }), text).toThrow(Problem)
})

test('integer labels with maps', () =>
  expect(decode(hex('a2 01 26 04 41 00'), { useMaps: true })).toEqual(
    new Map<number, unknown>([
      [1, -7],
      [4, hex('00')],
    ]),
  ))

test('__proto__ is a key like any other: it reaches no prototype', () => {
  const hostile = decode(hex(`a1 69 ${Buffer.from('__proto__').toString('hex')} a1 61 61 01`)) as { a?: unknown }
  expect(Object.getOwnPropertyNames(hostile)).toEqual(['__proto__'])
  expect(hostile.a).toBeUndefined()
})
