import { expect, test } from 'vitest'
import { FrameReader, frame, framePieces } from './frames.ts'

const values = [null, 'text', [1, new Uint8Array(300), 'x'], { a: 1 }, new Uint8Array(70_000).fill(7)]
const stream = Buffer.concat(values.map(frame))

test.for([1, 2, 3, 5, 7, 1000, 65_536, stream.length])('values come out whole and in order, in pieces of %i bytes', (size) => {
  const reader = new FrameReader(100_000)
  const got: unknown[] = []
  for (let at = 0; at < stream.length; at += size) got.push(...reader.push(stream.subarray(at, at + size)))
  expect(got).toEqual(values)
})

test('in pieces it is the same frame, and long byte strings are not copied', () => {
  const [long, longer] = [new Uint8Array(300_000).fill(1), new Uint8Array(600_000).fill(2)]
  for (const value of [
    ...values,
    [
      7,
      'sign',
      [
        ['key', long],
        ['key', longer],
        ['key', Uint8Array.of(3)],
      ],
    ],
    long,
    [new Map([[1, 'x']]), long],
  ]) {
    const pieces = framePieces(value)
    expect(Buffer.concat(pieces).equals(frame(value))).toBe(true)
  }
  const pieces = framePieces([
    7,
    'sign',
    [
      ['key', long],
      ['key', longer],
    ],
  ])
  expect(pieces.filter((piece) => piece === long || piece === longer)).toEqual([long, longer])
  // What fails leaves nothing behind.
  expect(() => framePieces([long, Symbol('no')])).toThrow()
  expect(Buffer.concat(framePieces('text')).equals(frame('text'))).toBe(true)
})

test('a frame beyond the bound is refused by its length alone, and what is no deterministic CBOR as well', () => {
  const push = (bytes: Uint8Array): unknown[] => [...new FrameReader(1000).push(bytes)]
  expect(() => push(Uint8Array.of(0, 0, 3, 233))).toThrow(expect.objectContaining({ code: 'malformed', reason: 'frame.size' }))
  expect(push(Uint8Array.of(0, 0, 3, 232))).toEqual([])
  expect(() => push(Uint8Array.of(0, 0, 0, 0))).toThrow(expect.objectContaining({ code: 'malformed' }))
  expect(() => push(Uint8Array.of(0, 0, 0, 2, 0x18, 1))).toThrow(expect.objectContaining({ code: 'malformed' }))
  const reader = new FrameReader(10)
  expect(() => [...reader.push(frame('more than ten bytes'))]).toThrow(expect.objectContaining({ reason: 'frame.size' }))
})
