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
