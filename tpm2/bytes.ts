/**
 * Bytes that are not what the TPM 2.0 library specification says. The one error of every parser in this folder. `reason`: a stable name of what is
 * wrong (`log.truncated`, `ima.violation`, …) where the parser tells one.
 */
export class TpmFormatError extends Error {
  override readonly name = 'TpmFormatError'
  readonly reason: string | undefined

  constructor(message: string, reason?: string) {
    super(message)
    this.reason = reason
  }
}

const utf8 = new TextEncoder()

/** Reads big-endian TPM structures (Part 2 §4.5); every read is checked against what is left. */
export class Reader {
  readonly #bytes: Uint8Array
  #at = 0

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes
  }

  get left(): number {
    return this.#bytes.length - this.#at
  }

  /** Passes over `length` bytes that are there; where they start. */
  #pass(length: number): number {
    if (length > this.left) throw new TpmFormatError(`${length} bytes announced, ${this.left} left`)
    const start = this.#at
    this.#at += length
    return start
  }

  /** `length` bytes, a view. */
  bytes(length: number): Uint8Array {
    const start = this.#pass(length)
    return this.#bytes.subarray(start, start + length)
  }

  u8(): number {
    return this.#bytes[this.#pass(1)] ?? 0
  }

  u16(): number {
    const start = this.#pass(2)
    return (this.#bytes[start] ?? 0) * 0x100 + (this.#bytes[start + 1] ?? 0)
  }

  u32(): number {
    return this.u16() * 0x1_0000 + this.u16()
  }

  u64(): bigint {
    return (BigInt(this.u32()) << 32n) | BigInt(this.u32())
  }

  /** TPM2B: a size of 16 bits and as many bytes, at most `max`. */
  sized(max = 4096): Uint8Array {
    const length = this.u16()
    if (length > max) throw new TpmFormatError(`a buffer of ${length} bytes where ${max} is the most`)
    return this.bytes(length)
  }

  /** Everything that is left. */
  rest(): Uint8Array {
    return this.bytes(this.left)
  }

  /** Throws unless everything was read: trailing bytes are where parsers come to differ. */
  end(): void {
    if (this.left > 0) throw new TpmFormatError(`${this.left} trailing bytes`)
  }
}

/** Parses all of `bytes` with `read`. */
export const parseAll = <T>(bytes: Uint8Array, read: (reader: Reader) => T): T => {
  const reader = new Reader(bytes)
  const value = read(reader)
  reader.end()
  return value
}

export const u8 = (value: number): Uint8Array => Uint8Array.of(value)
export const u16 = (value: number): Uint8Array => Uint8Array.of(value >>> 8, value)
export const u32 = (value: number): Uint8Array => Uint8Array.of(value >>> 24, value >>> 16, value >>> 8, value)
export const u64 = (value: bigint): Uint8Array => concat(u32(Number(value >> 32n)), u32(Number(value & 0xffff_ffffn)))
export const concat = (...parts: readonly Uint8Array[]): Uint8Array => {
  let length = 0
  for (const part of parts) length += part.length
  const all = new Uint8Array(length)
  let at = 0
  for (const part of parts) {
    all.set(part, at)
    at += part.length
  }
  return all
}
/** TPM2B of these bytes. */
export const sized = (bytes: Uint8Array): Uint8Array => concat(u16(bytes.length), bytes)
export const ascii = (text: string): Uint8Array => utf8.encode(text)
export const empty = new Uint8Array(0)
export const sameBytes = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0
