import { TpmFormatError } from './bytes.ts'

/** Reads little-endian records: event logs and measurement lists, unlike the TPM's structures, are a PC's. Every read is checked against what is left. */
export class LittleEndianReader {
  readonly #bytes: Uint8Array
  readonly #truncated: string
  #at = 0

  /** `truncated`: the reason of the TpmFormatError when the bytes end too early. */
  constructor(bytes: Uint8Array, truncated: string) {
    this.#bytes = bytes
    this.#truncated = truncated
  }

  get done(): boolean {
    return this.#at === this.#bytes.length
  }

  /** Passes over `length` bytes that are there; where they start. */
  #pass(length: number): number {
    const left = this.#bytes.length - this.#at
    if (length > left) throw new TpmFormatError(`${length} bytes announced, ${left} left`, this.#truncated)
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
    return (this.#bytes[start] ?? 0) + (this.#bytes[start + 1] ?? 0) * 0x100
  }

  u32(): number {
    return this.u16() + this.u16() * 0x1_0000
  }
}

export const le16 = (value: number): Uint8Array => Uint8Array.of(value, value >>> 8)
export const le32 = (value: number): Uint8Array => Uint8Array.of(value, value >>> 8, value >>> 16, value >>> 24)
