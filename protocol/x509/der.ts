import { Problem } from '../problem.ts'

/**
 * Strict DER (ITU-T X.690 §10), the subset that certificates and requests use: single-byte tags, definite minimal lengths, bounded depth and size.
 * Everything refused is Problem('malformed').
 */
export const tags = {
  boolean: 0x01,
  integer: 0x02,
  bitString: 0x03,
  octetString: 0x04,
  null: 0x05,
  oid: 0x06,
  enumerated: 0x0a,
  utf8: 0x0c,
  printable: 0x13,
  ia5: 0x16,
  utcTime: 0x17,
  generalizedTime: 0x18,
  sequence: 0x30,
  set: 0x31,
} as const

const maxBytes = 4 << 20
const maxDepth = 24

/** What is wrong with an encoding; `value` is a primitive in another form than DER's one. */
export type DerFault = 'size' | 'depth' | 'early' | 'tag' | 'indefinite' | 'length' | 'trailing' | 'value'

/** A refusal of the reader, with its kind for those who tell them apart. */
export class DerProblem extends Problem {
  readonly fault: DerFault

  constructor(fault: DerFault, what: string) {
    super('malformed', `DER: ${what}`, { reason: 'x509.der' })
    this.fault = fault
  }
}

const fail = (what: string, fault: DerFault = 'value'): never => {
  throw new DerProblem(fault, what)
}

/** Where the content of the element begins that `readHeader` has read, and where the element ends. */
let headerEnd = 0
let elementEnd = 0

/** Reads tag and length of the element that begins at `start`, before `limit`, where it must have ended. Its tag; sets `headerEnd` and `elementEnd`. */
const readHeader = (bytes: Uint8Array, start: number, limit: number): number => {
  const tag = bytes[start] as number
  if ((tag & 0x1f) === 0x1f) fail('a tag of several bytes', 'tag')
  if (start + 1 >= limit) return fail('ends early', 'early')
  let length = bytes[start + 1] as number
  let body = start + 2
  if (length >= 0x80) {
    const count = length & 0x7f
    if (count === 0) fail('an indefinite length', 'indefinite')
    if (count > 3) fail('a length too large', 'length')
    if (body + count > limit) fail('ends early', 'early')
    length = 0
    for (const end = body + count; body < end; body++) length = length * 256 + (bytes[body] as number)
    if (length < 0x80 || (count > 1 && length < 1 << (8 * (count - 1)))) fail('a length that is not minimal', 'length')
  }
  if (body + length > limit) fail('ends early', 'early')
  headerEnd = body
  elementEnd = body + length
  return tag
}

/** One element: `bytes` with its header, `content` without. It lies in `source` from `start` to `end`, its content from `body`. */
export class Element {
  readonly tag: number
  readonly depth: number
  readonly source: Uint8Array
  readonly start: number
  readonly body: number
  readonly end: number

  constructor(tag: number, depth: number, source: Uint8Array, start: number) {
    this.tag = tag
    this.depth = depth
    this.source = source
    this.start = start
    this.body = headerEnd
    this.end = elementEnd
  }

  get bytes(): Uint8Array {
    return this.source.subarray(this.start, this.end)
  }

  get content(): Uint8Array {
    return this.source.subarray(this.body, this.end)
  }
}

/** Reads the elements of one level in order. */
export class DerReader {
  readonly #bytes: Uint8Array
  readonly #depth: number
  readonly #end: number
  #at: number

  /** Reads `bytes` from `start` to `end`. */
  constructor(bytes: Uint8Array, depth = 0, start = 0, end = bytes.length) {
    if (end - start > maxBytes) fail(`${end - start} bytes`, 'size')
    if (depth > maxDepth) fail('nested too deeply', 'depth')
    this.#bytes = bytes
    this.#depth = depth
    this.#at = start
    this.#end = end
  }

  get done(): boolean {
    return this.#at === this.#end
  }

  /** Tag of the next element, undefined at the end. */
  peek(): number | undefined {
    return this.done ? undefined : this.#bytes[this.#at]
  }

  /** The next element; with `tag` it must be of that tag. */
  next(tag?: number): Element {
    const start = this.#at
    const found = this.peek()
    if (found === undefined) return fail('ends early', 'early')
    if (tag !== undefined && found !== tag && (found & 0x1f) !== 0x1f) fail(`tag ${found.toString(16)} where ${tag.toString(16)} belongs`, 'tag')
    readHeader(this.#bytes, start, this.#end)
    this.#at = elementEnd
    return new Element(found, this.#depth, this.#bytes, start)
  }

  /** The next element if it has this tag. */
  optional(tag: number): Element | undefined {
    return this.peek() === tag ? this.next(tag) : undefined
  }

  /** Reader of the next element's content. */
  enter(tag: number): DerReader {
    return inside(this.next(tag))
  }

  /** Throws unless everything was read. */
  end(): void {
    if (!this.done) fail('trailing bytes', 'trailing')
  }
}

export const inside = ({ source, depth, body, end }: Element): DerReader => new DerReader(source, depth + 1, body, end)

/** The one element that these bytes are. */
export const whole = (bytes: Uint8Array, tag: number): Element => {
  const reader = new DerReader(bytes)
  const element = reader.next(tag)
  reader.end()
  return element
}

/**
 * Walks everything that these bytes nest, also what nobody will ask for: lengths, depth of at most `depth`, no constructed strings, primitives in DER's one
 * form (X.690 §8, §10, §11). What lies inside an OCTET STRING is not looked at.
 */
export const checkDer = (bytes: Uint8Array, depth: number): void => {
  if (bytes.length > maxBytes) fail(`${bytes.length} bytes`, 'size')
  const walk = (from: number, to: number, left: number): void => {
    if (left < 0) fail('nested too deeply', 'depth')
    for (let at = from; at < to;) {
      const tag = readHeader(bytes, at, to)
      const body = headerEnd
      const end = elementEnd
      if ((tag & 0x20) === 0) checkPrimitive(tag, bytes, body, end)
      else if (tag < 0x40 && tag !== tags.sequence && tag !== tags.set) fail('a string in pieces')
      else walk(body, end, left - 1)
      at = end
    }
  }
  walk(0, bytes.length, Math.min(depth, maxDepth))
}

/** The content of a primitive, from `body` to `end`. */
const checkPrimitive = (tag: number, bytes: Uint8Array, body: number, end: number): void => {
  const length = end - body
  const first = length > 0 ? (bytes[body] as number) : 0
  const second = length > 1 ? (bytes[body + 1] as number) : 0
  if (tag === tags.boolean) booleanOf(bytes, body, end)
  else if (tag === tags.oid) oidOf(bytes, body, end)
  else if (tag === tags.null && length > 0) fail('a NULL with content')
  else if (tag === tags.integer && (length === 0 || (length > 1 && ((first === 0 && second < 0x80) || (first === 0xff && second >= 0x80)))))
    fail('an INTEGER that is not minimal')
  else if (tag === tags.bitString && (length === 0 || first > 7 || (length === 1 && first > 0))) fail('a BIT STRING without its first byte')
}

/** OBJECT IDENTIFIERs that were read, by a hash of their bytes: the same few, over and over. */
const knownOids: ({ readonly content: Uint8Array; readonly dotted: string } | undefined)[] = Array.from({ length: 256 })

/** Dotted form of the OBJECT IDENTIFIER with this content: from the table where it is there. */
const oidOf = (bytes: Uint8Array, body: number, end: number): string => {
  const length = end - body
  if (length === 0 || length > 64) return fail('not an OBJECT IDENTIFIER')
  let hash = length
  for (let at = body; at < end; at++) hash = (Math.imul(hash, 31) + (bytes[at] as number)) | 0
  const place = (hash ^ (hash >>> 8)) & 255
  const known = knownOids[place]
  if (known !== undefined && known.content.length === length) {
    let at = 0
    while (at < length && known.content[at] === bytes[body + at]) at++
    if (at === length) return known.dotted
  }
  const content = new Uint8Array(bytes.subarray(body, end))
  const dotted = dottedOf(content)
  knownOids[place] = { content, dotted }
  return dotted
}

const dottedOf = (content: Uint8Array): string => {
  let dotted = ''
  let value = 0
  let fresh = true
  for (let at = 0; at < content.length; at++) {
    const byte = content[at] ?? 0
    if (fresh && byte === 0x80) fail('an arc that is not minimal')
    if (value > 2 ** 45) fail('an arc too large')
    value = value * 128 + (byte & 0x7f)
    fresh = byte < 0x80
    if (!fresh) continue
    if (dotted === '') {
      const first = Math.min(2, Math.floor(value / 40))
      dotted = `${first}.${value - 40 * first}`
    } else dotted += `.${value}`
    value = 0
  }
  return fresh ? dotted : fail('an OBJECT IDENTIFIER that ends early')
}

/** Dotted form of an OBJECT IDENTIFIER. */
export const readOid = ({ tag, source, body, end }: Element): string => (tag === tags.oid ? oidOf(source, body, end) : fail('not an OBJECT IDENTIFIER'))

const booleanOf = (bytes: Uint8Array, body: number, end: number): boolean => {
  const value = bytes[body]
  return end - body === 1 && (value === 0 || value === 0xff) ? value === 0xff : fail('not a BOOLEAN')
}

export const readBoolean = ({ tag, source, body, end }: Element): boolean => (tag === tags.boolean ? booleanOf(source, body, end) : fail('not a BOOLEAN'))

/** Content of a minimal, non-negative INTEGER, as big-endian bytes with its sign byte. `tag`: where an IMPLICIT one takes its place. */
export const readUnsigned = (element: Element, tag: number = tags.integer): Uint8Array => {
  const { content } = element
  const first = content[0] ?? 0x80
  const second = content[1] ?? 0x80
  if (element.tag !== tag || first >= 0x80 || (content.length > 1 && first === 0 && second < 0x80)) return fail('not a minimal, non-negative INTEGER')
  return content
}

export const readSmall = (element: Element, tag?: number): number => {
  const bytes = readUnsigned(element, tag)
  if (bytes.length > 4) return fail('an INTEGER too large')
  let value = 0
  for (let at = 0; at < bytes.length; at++) value = value * 256 + (bytes[at] as number)
  return value
}

/** BIT STRING without unused bits. */
export const readBits = ({ tag, source, body, end }: Element): Uint8Array =>
  tag === tags.bitString && body < end && source[body] === 0 ? source.subarray(body + 1, end) : fail('not a BIT STRING of whole bytes')

/** Named bits (X.680 §22.7): the set of positions that are one. */
export const readNamedBits = (element: Element): ReadonlySet<number> => {
  const unused = element.content[0] ?? 8
  const bytes = element.content.subarray(1)
  const last = bytes.at(-1)
  if (
    element.tag !== tags.bitString ||
    unused > 7 ||
    bytes.length > 4 ||
    (last === undefined ? unused !== 0 : ((last >> unused) & 1) === 0 || (last & ((1 << unused) - 1)) !== 0)
  )
    return fail('not a minimal list of named bits')
  const positions = new Set<number>()
  for (let at = 0; at < bytes.length * 8; at++) if (((bytes[at >> 3] ?? 0) & (0x80 >> (at & 7))) !== 0) positions.add(at)
  return positions
}

const latin1 = new TextDecoder('latin1')

/** UTCTime or GeneralizedTime in the one form RFC 5280 §4.1.2.5 allows, as milliseconds since 1970. */
export const readTime = (element: Element): number => {
  const text = latin1.decode(element.content)
  const utc = element.tag === tags.utcTime
  if (!utc && element.tag !== tags.generalizedTime) return fail('not a time')
  if (!(utc ? /^\d{12}Z$/ : /^\d{14}Z$/).test(text)) return fail('a time of another form than RFC 5280 allows')
  const digits = utc ? `${Number(text.slice(0, 2)) >= 50 ? '19' : '20'}${text}` : text
  const part = (from: number, length: number): number => Number(digits.slice(from, from + length))
  const [year, month, day, hour, minute, second] = [part(0, 4), part(4, 2), part(6, 2), part(8, 2), part(10, 2), part(12, 2)] as const
  const at = Date.UTC(year, month - 1, day, hour, minute, second)
  const back = new Date(at)
  if (back.getUTCMonth() !== month - 1 || back.getUTCDate() !== day || hour > 23 || minute > 59 || second > 59) return fail('a time that does not exist')
  if (!utc && year < 2050) return fail('a GeneralizedTime before 2050')
  return at
}

/** Bytes of tag and length before a content of this length. */
export const headLength = (length: number): number => (length < 0x80 ? 2 : length < 0x100 ? 3 : length < 0x1_0000 ? 4 : length < 0x100_0000 ? 5 : 6)

/** Writes tag and length of an element at the start of `bytes`; where its content begins. */
export const writeHead = (bytes: Uint8Array, tag: number, length: number): number => {
  const size = headLength(length)
  bytes[0] = tag
  bytes[1] = size === 2 ? length : 0x80 | (size - 2)
  for (let at = 2; at < size; at++) bytes[at] = (length >>> (8 * (size - 1 - at))) & 0xff
  return size
}

/** One element of this tag around the joined contents. */
export const der = (tag: number, ...contents: readonly Uint8Array[]): Uint8Array => {
  let length = 0
  for (const content of contents) length += content.length
  const bytes = Buffer.alloc(headLength(length) + length)
  let at = writeHead(bytes, tag, length)
  for (const content of contents) {
    bytes.set(content, at)
    at += content.length
  }
  return bytes
}

export const sequence = (...contents: readonly Uint8Array[]): Uint8Array => der(tags.sequence, ...contents)
export const set = (...contents: readonly Uint8Array[]): Uint8Array => der(tags.set, ...contents)
/** Context-specific, constructed. */
export const explicit = (number: number, ...contents: readonly Uint8Array[]): Uint8Array => der(0xa0 | number, ...contents)
export const octetString = (content: Uint8Array): Uint8Array => der(tags.octetString, content)
export const enumerated = (value: number): Uint8Array => Uint8Array.of(tags.enumerated, 1, value)
/** INTEGER of a whole number from 0 to 2^53 - 1. */
export const number = (value: number): Uint8Array => integer(Buffer.from(value.toString(16).padStart(14, '0'), 'hex'))
export const bitString = (content: Uint8Array): Uint8Array => der(tags.bitString, Uint8Array.of(0), content)
export const boolean = (value: boolean): Uint8Array => Uint8Array.of(tags.boolean, 1, value ? 0xff : 0)
export const utf8 = (text: string): Uint8Array => der(tags.utf8, Buffer.from(text, 'utf8'))

/** Named bits in their minimal form. */
export const namedBits = (positions: readonly number[]): Uint8Array => {
  const highest = Math.max(...positions)
  const bytes = new Uint8Array(Math.floor(highest / 8) + 1)
  for (const position of positions) bytes[position >> 3] = (bytes[position >> 3] ?? 0) | (0x80 >> (position & 7))
  return der(tags.bitString, Uint8Array.of(7 - (highest & 7)), bytes)
}

/** INTEGER of non-negative big-endian bytes. */
export const integer = (bytes: Uint8Array): Uint8Array => {
  let start = 0
  while (start < bytes.length - 1 && bytes[start] === 0) start++
  const trimmed = bytes.subarray(start)
  return der(tags.integer, ...((trimmed[0] ?? 0) >= 0x80 ? [Uint8Array.of(0), trimmed] : [trimmed]))
}

export const oid = (dotted: string): Uint8Array => {
  const [first = 0, second = 0, ...rest] = dotted.split('.').map(Number)
  const base128 = (value: number): number[] => (value < 128 ? [value] : [...base128(Math.floor(value / 128)).map((byte) => byte | 0x80), value % 128])
  return der(tags.oid, Uint8Array.from([first * 40 + second, ...rest].flatMap(base128)))
}

/** `20270101123000Z`; cut from the ISO form, since a list has many. */
const timeText = (at: number): string => {
  const iso = new Date(at).toISOString()
  return `${iso.slice(0, 4)}${iso.slice(5, 7)}${iso.slice(8, 10)}${iso.slice(11, 13)}${iso.slice(14, 16)}${iso.slice(17, 19)}Z`
}

/** Whole seconds with a century, whatever the year: what OCSP asks for (RFC 6960 §4.2.2.1). */
export const generalizedTime = (at: number): Uint8Array => der(tags.generalizedTime, new TextEncoder().encode(timeText(at)))

/** Text of a UTCTime, for years from 1950 to 2049. */
export const utcTime = (at: number): string => timeText(at).slice(2)

/** UTCTime until 2049, GeneralizedTime from then on (RFC 5280 §4.1.2.5); whole seconds. */
export const time = (at: number): Uint8Array => {
  const text = timeText(at)
  return Number(text.slice(0, 4)) < 2050 ? der(tags.utcTime, new TextEncoder().encode(text.slice(2))) : generalizedTime(at)
}
