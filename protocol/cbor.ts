import { decode as cborgDecode, encode as cborgEncode, rfc8949EncodeOptions } from 'cborg'
import { Problem } from './problem.ts'

/*
 * Every message, row and audit entry passes here, several times each: what they are made of (integers, text, bytes, arrays, maps, true, false, null) is read and
 * written by hand, in one pass that checks the deterministic form as it goes. What is rare (fractions, bigints) is the library's, which in the tests is the judge of
 * both directions.
 */

let buffer = Buffer.allocUnsafe(64 << 10)
let end = 0

/** Room for `more` bytes. */
const reserve = (more: number): void => {
  if (end + more <= buffer.length) return
  const grown = Buffer.allocUnsafe(Math.max(buffer.length * 2, end + more))
  grown.set(buffer.subarray(0, end))
  buffer = grown
}
/** A larger buffer is not kept. */
const usual = 1 << 20

/** Pieces that are complete, where a value is written in pieces. */
let pieces: Uint8Array[] | undefined
/** A byte string of so many bytes or more is a piece of its own then: no key or secret is as long. */
const apart = 256 << 10

/** Head of an item: major type and argument in the shortest form (RFC 8949 §3). */
const head = (major: number, value: number): void => {
  reserve(9)
  const type = major << 5
  if (value < 24) buffer[end++] = type | value
  else if (value < 0x100) {
    buffer[end++] = type | 24
    buffer[end++] = value
  } else if (value < 0x1_0000) {
    buffer[end++] = type | 25
    end = buffer.writeUInt16BE(value, end)
  } else if (value < 0x1_0000_0000) {
    buffer[end++] = type | 26
    end = buffer.writeUInt32BE(value, end)
  } else {
    buffer[end++] = type | 27
    end = buffer.writeUInt32BE(Math.floor(value / 0x1_0000_0000), end)
    end = buffer.writeUInt32BE(value % 0x1_0000_0000, end)
  }
}

const raw = (bytes: Uint8Array): void => {
  reserve(bytes.length)
  buffer.set(bytes, end)
  end += bytes.length
}

/** Text as UTF-8, without its length. Short ASCII by hand: a call into the runtime costs more. */
const writeText = (text: string): void => {
  const start = end
  if (text.length < 48) {
    head(3, text.length)
    reserve(text.length)
    let at = 0
    for (; at < text.length; at++) {
      const code = text.charCodeAt(at)
      if (code >= 0x80) break
      buffer[end + at] = code
    }
    if (at === text.length) {
      end += at
      return
    }
    end = start
  }
  const length = Buffer.byteLength(text)
  head(3, length)
  reserve(length)
  end += buffer.write(text, end, 'utf8')
}

const library = (value: unknown): void => raw(cborgEncode(value, rfc8949EncodeOptions))

/** Keys of an object in the order of their encodings, and the encodings. */
interface Shape {
  readonly keys: readonly string[]
  readonly encoded: readonly Uint8Array[]
}
/** Messages and rows come in few shapes, over and over. Bounded: objects whose keys are data would fill it. */
const shapes = new Map<string, Shape>()
/** The shape that was last of so many keys: mostly it is the next one's too, and needs no name then. */
const lastShapes: ({ readonly names: readonly string[]; readonly shape: Shape } | undefined)[] = Array.from({ length: 41 })

const lastShapeOf = (names: readonly string[]): Shape | undefined => {
  const last = lastShapes[names.length]
  if (last === undefined) return undefined
  for (let at = 0; at < names.length; at++) if (names[at] !== last.names[at]) return undefined
  return last.shape
}
const maxShapes = 1_024

const encodedText = (text: string): Uint8Array => {
  const start = end
  writeText(text)
  const bytes = new Uint8Array(buffer.subarray(start, end))
  end = start
  return bytes
}

const shapeOf = (names: readonly string[]): Shape => {
  const last = lastShapeOf(names)
  if (last !== undefined) return last
  const shape = namedShapeOf(names)
  if (names.length < lastShapes.length) lastShapes[names.length] = { names, shape }
  return shape
}

const namedShapeOf = (names: readonly string[]): Shape => {
  const name = names.length > 40 ? undefined : names.join('\0')
  const known = name === undefined ? undefined : shapes.get(name)
  // Names with a NUL in them are never kept: a kept shape of as many names is this one.
  if (known !== undefined && known.keys.length === names.length) return known
  const pairs = names.map((key) => ({ key, bytes: encodedText(key) })).toSorted((one, other) => Buffer.compare(one.bytes, other.bytes))
  const shape = { keys: pairs.map(({ key }) => key), encoded: pairs.map(({ bytes }) => bytes) }
  if (name !== undefined && name.length < 1_024 && !names.some((key) => key.includes('\0'))) {
    if (shapes.size >= maxShapes) shapes.clear()
    shapes.set(name, shape)
  }
  return shape
}

const writeMap = (map: ReadonlyMap<unknown, unknown>): void => {
  const pairs = [...map].map(([key, value]) => {
    const start = end
    write(key)
    const bytes = Buffer.from(buffer.subarray(start, end))
    end = start
    return { bytes, value }
  })
  head(5, pairs.length)
  for (const { bytes, value } of pairs.toSorted((one, other) => Buffer.compare(one.bytes, other.bytes))) {
    raw(bytes)
    write(value)
  }
}

const writeObject = (value: object): void => {
  const { keys, encoded } = shapeOf(Object.keys(value))
  head(5, keys.length)
  for (let at = 0; at < keys.length; at++) {
    raw(encoded[at] as Uint8Array)
    write((value as Record<string, unknown>)[keys[at] as string])
  }
}

const write = (value: unknown): void => {
  switch (typeof value) {
    case 'string':
      return writeText(value)
    case 'number':
      if (!Number.isSafeInteger(value)) return library(value)
      return value >= 0 ? head(0, value) : head(1, -1 - value)
    case 'boolean':
      return head(7, value ? 21 : 20)
    case 'undefined':
      return head(7, 23)
    case 'object':
      break
    default:
      return library(value)
  }
  if (value === null) return head(7, 22)
  if (value instanceof Uint8Array) {
    head(2, value.length)
    if (pieces === undefined || value.length < apart) return raw(value)
    pieces.push(new Uint8Array(buffer.subarray(0, end)), value)
    buffer.fill(0, 0, end)
    end = 0
    return
  }
  if (Array.isArray(value)) {
    head(4, value.length)
    for (const item of value) write(item)
    return
  }
  if (value instanceof Map) return writeMap(value)
  const prototype: unknown = Object.getPrototypeOf(value)
  if (prototype === Object.prototype || prototype === null) return writeObject(value)
  library(value)
}

const ofItsOwn = (length: number): Uint8Array => new Uint8Array(length)

/**
 * Deterministic CBOR (RFC 8949 §4.2.1): shortest forms, definite lengths, map keys in bytewise order. `allocate` gives the bytes that it is written to; memory of
 * its own is dear for what is gone again at once.
 */
export const encode = (value: unknown, allocate = ofItsOwn): Uint8Array => {
  end = 0
  try {
    write(value)
    const bytes = allocate(end)
    bytes.set(buffer.subarray(0, end))
    return bytes
  } finally {
    // Keys and secrets pass here: nothing of them stays behind.
    buffer.fill(0, 0, end)
    end = 0
    if (buffer.length > usual) buffer = Buffer.allocUnsafe(64 << 10)
  }
}

/** The same as pieces that follow each other: long byte strings as they are, which are not copied and must not change while the pieces are in use; none is the key of a map. */
export const encodePieces = (value: unknown): readonly Uint8Array[] => {
  const made: Uint8Array[] = []
  pieces = made
  try {
    made.push(encode(value))
    return made
  } finally {
    pieces = undefined
  }
}

/** Nothing of ours is deeper; a hostile nest of arrays must not reach the stack's end. */
const maxDepth = 16

const malformed = (reason: string, detail: string, cause?: unknown): Problem => new Problem('malformed', detail, { reason, cause })
const invalid = (what: string): Problem => malformed('cbor.invalid', `not CBOR: ${what}`)
const other = (): Problem => malformed('cbor.not-deterministic', 'CBOR is not in its deterministic form')

/** Reads one item after the other; `at` is where the next one begins. */
interface Reader {
  readonly bytes: Buffer
  readonly useMaps: boolean
  at: number
}

/** The argument of a head whose first byte was read: in its shortest form only. */
const argument = (reader: Reader, minor: number): number => {
  if (minor < 24) return minor
  const { bytes, at } = reader
  if (minor > 27) throw invalid(minor === 31 ? 'an indefinite length' : 'a reserved length')
  const size = 1 << (minor - 24)
  if (at + size > bytes.length) throw invalid('it ends early')
  reader.at += size
  const value =
    minor === 24
      ? (bytes[at] as number)
      : minor === 25
        ? bytes.readUInt16BE(at)
        : minor === 26
          ? bytes.readUInt32BE(at)
          : bytes.readUInt32BE(at) * 0x1_0000_0000 + bytes.readUInt32BE(at + 4)
  if (value < (minor === 24 ? 24 : minor === 25 ? 0x100 : minor === 26 ? 0x1_0000 : 0x1_0000_0000)) throw other()
  if (!Number.isSafeInteger(value)) throw invalid('an integer beyond 2^53')
  return value
}

const textOf = (bytes: Buffer, from: number, to: number): string => {
  if (to - from < 24) {
    // Short ASCII by hand: a call into the runtime costs more.
    let text = ''
    let at = from
    for (; at < to; at++) {
      const code = bytes[at] as number
      if (code >= 0x80) break
      text += String.fromCharCode(code)
    }
    if (at === to) return text
  }
  const text = bytes.toString('utf8', from, to)
  // What is no UTF-8 was replaced on the way in.
  if (text.includes('\uFFFD') && !Buffer.from(text).equals(bytes.subarray(from, to))) throw invalid('text that is no UTF-8')
  return text
}

/** A string's bytes: within the input, and none of them twice. */
const span = (reader: Reader, length: number): number => {
  const from = reader.at
  if (length > reader.bytes.length - from) throw invalid('it ends early')
  reader.at += length
  return from
}

/** Items that a container claims to have take a byte each, at least. */
const claimed = (reader: Reader, items: number, depth: number): void => {
  if (items > reader.bytes.length - reader.at) throw invalid('it ends early')
  if (items > 0 && depth > maxDepth) throw malformed('cbor.depth', 'CBOR nested too deeply')
}

/** Throws unless a key (from `at` to `to`) sorts behind the one before it, which ends where it begins or earlier, and is another one. */
const ascending = (bytes: Buffer, before: number, at: number, to: number): void => {
  for (let step = 0; at + step < to; step++) {
    const [one, next] = [bytes[before + step] as number, bytes[at + step] as number]
    if (one < next) return
    if (one > next) throw other()
  }
  throw invalid('a key twice')
}

/** Names of fields that were read, by a hash of their bytes: the same few, over and over. */
const names: (string | undefined)[] = Array.from({ length: 4_096 })

/** A key of an object: as the text that it is, from the table where it is there. */
const nameOf = (bytes: Buffer, from: number, to: number): string => {
  const length = to - from
  if (length === 0 || length > 32) return textOf(bytes, from, to)
  let hash = length
  for (let at = from; at < to; at++) hash = (Math.imul(hash, 31) + (bytes[at] as number)) | 0
  const place = hash & 4_095
  const known = names[place]
  if (known !== undefined && known.length === length) {
    let at = 0
    while (at < length && known.charCodeAt(at) === bytes[from + at]) at++
    if (at === length) return known
  }
  const text = textOf(bytes, from, to)
  // ASCII only: as many units as bytes.
  if (text.length === length) names[place] = text
  return text
}

const readKey = (reader: Reader, depth: number): unknown => {
  const first = reader.bytes[reader.at] ?? 0
  if (first >> 5 !== 3) return read(reader, depth)
  reader.at++
  const length = argument(reader, first & 31)
  const from = span(reader, length)
  return nameOf(reader.bytes, from, from + length)
}

const readMap = (reader: Reader, pairs: number, depth: number): unknown => {
  claimed(reader, pairs * 2, depth)
  const { bytes, useMaps } = reader
  const map = new Map<unknown, unknown>()
  const object: Record<string, unknown> = {}
  let before = -1
  for (let pair = 0; pair < pairs; pair++) {
    const start = reader.at
    const key = readKey(reader, depth)
    if (before >= 0) ascending(bytes, before, start, reader.at)
    before = start
    if (typeof key !== 'string' && !(useMaps && typeof key === 'number')) throw invalid('a key that is no text')
    if (useMaps) map.set(key, read(reader, depth))
    // Assigned, it would set the prototype.
    else if (key === '__proto__') Object.defineProperty(object, key, { value: read(reader, depth), enumerable: true, configurable: true, writable: true })
    else object[key as string] = read(reader, depth)
  }
  return useMaps ? map : object
}

const strict = {
  strict: true,
  allowIndefinite: false,
  allowUndefined: false,
  allowInfinity: false,
  allowNaN: false,
  allowBigInt: false,
  rejectDuplicateMapKeys: true,
} as const

/** True, false, null; fractions are the library's to read, and must be what it would write. */
const readSimple = (reader: Reader, minor: number): unknown => {
  if (minor === 20 || minor === 21) return minor === 21
  if (minor === 22) return null
  if (minor < 25 || minor > 27) throw invalid('a simple value')
  const start = reader.at - 1
  const item = reader.bytes.subarray(start, start + 1 + (1 << (minor - 24)))
  reader.at = start + item.length
  let value: unknown
  try {
    value = cborgDecode(item, strict)
  } catch (cause) {
    throw malformed('cbor.invalid', `not CBOR: ${cause instanceof Error ? cause.message.slice(0, 200) : 'unreadable'}`, cause)
  }
  if (Buffer.compare(cborgEncode(value, rfc8949EncodeOptions), item) !== 0) throw other()
  return value
}

/** `depth`: containers around this item. */
const read = (reader: Reader, depth: number): unknown => {
  const { bytes } = reader
  if (reader.at >= bytes.length) throw invalid('it ends early')
  const first = bytes[reader.at++] as number
  const [major, minor] = [first >> 5, first & 31]
  if (major === 7) return readSimple(reader, minor)
  const value = argument(reader, minor)
  switch (major) {
    case 0:
      return value
    case 1:
      if (!Number.isSafeInteger(-1 - value)) throw invalid('an integer beyond 2^53')
      return -1 - value
    case 2: {
      const from = span(reader, value)
      // Bytes of their own: a view would keep the whole message, and change with it.
      return new Uint8Array(bytes.subarray(from, from + value))
    }
    case 3: {
      const from = span(reader, value)
      return textOf(bytes, from, from + value)
    }
    case 4: {
      claimed(reader, value, depth + 1)
      const items: unknown[] = []
      for (let item = 0; item < value; item++) items.push(read(reader, depth + 1))
      return items
    }
    case 5:
      return readMap(reader, value, depth + 1)
    default:
      throw invalid('a tag')
  }
}

/**
 * The one value these bytes hold. Throws Problem('malformed') unless they are exactly what `encode` makes of it: shortest forms, definite lengths, keys in
 * order and once, text that is UTF-8, nothing behind it.
 * `useMaps`: maps become `Map` with text or integers as keys, for COSE headers whose labels are integers; otherwise objects with text keys.
 */
export const decode = (bytes: Uint8Array, options: { readonly useMaps?: boolean } = {}): unknown => {
  const reader: Reader = { bytes: Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length), useMaps: options.useMaps ?? false, at: 0 }
  const value = read(reader, 0)
  if (reader.at !== bytes.length) throw invalid('something follows it')
  return value
}
