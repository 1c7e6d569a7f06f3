import { decode as cborgDecode, encode as cborgEncode, rfc8949EncodeOptions } from 'cborg'
import { Problem } from './problem.ts'

/** Deterministic CBOR (RFC 8949 §4.2.1): shortest forms, definite lengths, map keys in bytewise order. */
export const encode = (value: unknown): Uint8Array => cborgEncode(value, rfc8949EncodeOptions)
