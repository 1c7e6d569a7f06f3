import { decode as cborgDecode, encode as cborgEncode, rfc8949EncodeOptions } from 'cborg'
import { Problem } from './problem.ts'

/** Deterministic CBOR (RFC 8949 §4.2.1): shortest forms, definite lengths, map keys in bytewise order. */
export const encode = (value: unknown): Uint8Array => cborgEncode(value, rfc8949EncodeOptions)

const strict = {
  strict: true,
  allowIndefinite: false,
  allowUndefined: false,
  allowInfinity: false,
  allowNaN: false,
  allowBigInt: false,
  rejectDuplicateMapKeys: true,
} as const

/** Nothing of ours is deeper; a hostile nest of arrays must not reach the stack's end. */
const maxDepth = 16

/**
 * The one value these bytes hold. Throws Problem('malformed') unless they are exactly what `encode` makes of it: strict decoding refuses
 * long forms and doubled keys, encoding again catches what is left (key order, floats that are integers, `__proto__`).
 * `useMaps`: maps become `Map`, for COSE headers whose labels are integers; otherwise objects with text keys.
 */
export const decode = (bytes: Uint8Array, options: { readonly useMaps?: boolean } = {}): unknown => {
  if (!shallow(bytes)) throw new Problem('malformed', 'CBOR nested too deeply', { reason: 'cbor.depth' })
  let value: unknown
  let again: Uint8Array
  try {
    value = cborgDecode(bytes, { ...strict, useMaps: options.useMaps ?? false })
    // Throws for what can be read but not written: maps whose keys are arrays or maps.
    again = encode(value)
  } catch (cause) {
    throw new Problem('malformed', `not CBOR: ${cause instanceof Error ? cause.message.slice(0, 200) : 'unreadable'}`, { reason: 'cbor.invalid', cause })
  }
  if (Buffer.compare(again, bytes) !== 0) throw new Problem('malformed', 'CBOR is not in its deterministic form', { reason: 'cbor.not-deterministic' })
  return value
}

/** Walks the heads (RFC 8949 §3) without building anything; false for a nest deeper than `maxDepth`. Invalid heads are the decoder's to report. */
const shallow = (bytes: Uint8Array): boolean => {
  const open: number[] = []
  for (let at = 0; at < bytes.length;) {
    const head = bytes[at] ?? 0
    const major = head >> 5
    const minor = head & 31
    const extra = minor < 24 ? 0 : minor < 28 ? 1 << (minor - 24) : 0
    let argument = minor < 24 ? minor : 0
    for (let i = 1; i <= extra; i++) argument = argument * 256 + (bytes[at + i] ?? 0)
    at += 1 + extra + (major === 2 || major === 3 ? argument : 0)
    while (open.length > 0 && open.at(-1) === 0) open.pop()
    if (open.length > 0) open.push((open.pop() ?? 1) - 1)
    if (major === 4 || major === 5 || major === 6) open.push(major === 4 ? argument : major === 5 ? argument * 2 : 1)
    while (open.length > 0 && open.at(-1) === 0) open.pop()
    if (open.length > maxDepth) return false
  }
  return true
}
