import { getHeapStatistics } from 'node:v8'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { TpmFormatError } from '@fleetkey/tpm2/bytes.ts'

/** Numbers below 2^32 from a seed (mulberry32): the same seed, the same run. */
export const seeded = (seed: number): ((below: number) => number) => {
  let state = seed >>> 0
  return (below) => {
    state = (state + 0x6d2b_79f5) >>> 0
    let word = Math.imul(state ^ (state >>> 15), state | 1)
    word = (word + Math.imul(word ^ (word >>> 7), word | 61)) ^ word
    return Math.floor((((word ^ (word >>> 14)) >>> 0) / 0x1_0000_0000) * below)
  }
}

type Below = (below: number) => number
const telling = [0x00, 0x01, 0x1f, 0x20, 0x30, 0x7f, 0x80, 0x81, 0xfe, 0xff]
const lengths = [0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x1_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff]

/** What is done to bytes: flipped, told lies about lengths, cut, doubled, mixed with others. */
const changes: readonly ((bytes: Buffer, below: Below, other: Uint8Array) => Buffer)[] = [
  (bytes, below) => {
    const at = below(bytes.length + 1)
    if (at < bytes.length) bytes.writeUInt8((bytes[at] ?? 0) ^ (1 << below(8)), at)
    return bytes
  },
  (bytes, below) => {
    const at = below(bytes.length + 1)
    if (at < bytes.length) bytes.writeUInt8(telling[below(telling.length)] ?? 0, at)
    return bytes
  },
  (bytes, below) => {
    const [at, value] = [below(bytes.length + 1), lengths[below(lengths.length)] ?? 0]
    if (at + 4 > bytes.length) return bytes
    if (below(2) === 0) bytes.writeUInt32BE(value, at)
    else bytes.writeUInt32LE(value, at)
    return bytes
  },
  (bytes, below) => {
    const [at, value] = [below(bytes.length + 1), (lengths[below(lengths.length)] ?? 0) & 0xffff]
    if (at + 2 > bytes.length) return bytes
    if (below(2) === 0) bytes.writeUInt16BE(value, at)
    else bytes.writeUInt16LE(value, at)
    return bytes
  },
  (bytes, below) => bytes.subarray(0, below(bytes.length + 1)),
  (bytes, below) => {
    const [at, count] = [below(bytes.length + 1), 1 + below(16)]
    return Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + count)])
  },
  (bytes, below) => {
    const at = below(bytes.length + 1)
    return Buffer.concat([bytes.subarray(0, at), Buffer.alloc(1 + below(16), telling[below(telling.length)]), bytes.subarray(at)])
  },
  (bytes, below) => {
    const [at, from] = [below(bytes.length + 1), below(bytes.length + 1)]
    return Buffer.concat([bytes.subarray(0, at), bytes.subarray(from, from + 1 + below(64)), bytes.subarray(at)])
  },
  (bytes, below, other) => Buffer.concat([bytes.subarray(0, below(bytes.length + 1)), other.subarray(below(other.length + 1))]),
]

/** One hostile variant of one of these inputs; one to four changes, mostly one. */
export const mutant = (inputs: readonly Uint8Array[], below: Below): Uint8Array => {
  const pick = (): Uint8Array => inputs[below(inputs.length)] ?? new Uint8Array(0)
  let bytes: Buffer = Buffer.from(pick())
  for (let left = [1, 1, 1, 2, 3, 4][below(6)] ?? 1; left > 0; left--) bytes = changes[below(changes.length)]?.(bytes, below, pick()) ?? bytes
  return new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.length)
}

/** Bytes that a parser may allocate for one input, whatever the input announces: its own size many times over, and what a call costs anyway. */
const allowance = (input: Uint8Array): number => (32 << 20) + 256 * input.length
/** Milliseconds for one input, the best of three: generous, for the machine does other things too. */
const patience = 250

/** Bytes on the heap and outside it; falls when garbage is collected. */
export const allocated = (): number => {
  const { used_heap_size: heap, external_memory: external } = getHeapStatistics()
  return heap + external
}

/** `accepted`, or the typed refusal's reason. Throws what is neither. */
export const outcome = (parse: (bytes: Uint8Array) => unknown, input: Uint8Array): string => {
  try {
    parse(input)
    return 'accepted'
  } catch (error) {
    if (error instanceof TpmFormatError) return error.reason ?? 'TpmFormatError'
    if (error instanceof Problem) return error.reason ?? error.code
    const base64 = Buffer.from(input).toString('base64')
    throw new Error(`no typed refusal of ${base64}`, { cause: error })
  }
}

const slow = (parse: (bytes: Uint8Array) => unknown, input: Uint8Array): boolean => {
  for (let tries = 0; tries < 3; tries++) {
    const started = performance.now()
    outcome(parse, input)
    if (performance.now() - started <= patience) return false
  }
  return true
}

export interface Survey {
  readonly accepted: number
  /** How many inputs each reason refused. */
  readonly refused: ReadonlyMap<string, number>
  /** Milliseconds of the slowest input. */
  readonly slowest: number
}

/**
 * Hands `count` mutants of `inputs` to a parser. Throws for whatever is neither accepted nor a typed refusal, takes longer than a quarter of a second, or
 * allocates out of proportion to its size.
 */
export const survey = (parse: (bytes: Uint8Array) => unknown, inputs: readonly Uint8Array[], of: { readonly count: number; readonly seed: number }): Survey => {
  const below = seeded(of.seed)
  const refused = new Map<string, number>()
  let [accepted, slowest] = [0, 0]
  for (let done = 0; done < of.count; done++) {
    const input = mutant(inputs, below)
    const [before, started] = [allocated(), performance.now()]
    const result = outcome(parse, input)
    const [took, grown] = [performance.now() - started, allocated() - before]
    slowest = Math.max(slowest, took)
    if (took > patience && slow(parse, input)) throw new Error(`${took} ms for ${Buffer.from(input).toString('base64')}`)
    if (grown > allowance(input)) throw new Error(`${grown} bytes for ${Buffer.from(input).toString('base64')}`)
    if (result === 'accepted') accepted++
    else refused.set(result, (refused.get(result) ?? 0) + 1)
  }
  return { accepted, refused, slowest }
}
