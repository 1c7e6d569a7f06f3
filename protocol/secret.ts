import { timingSafeEqual } from 'node:crypto'
import { inspect } from 'node:util'

/** Key bytes that cannot be printed, logged or put into JSON by accident. `bytes()` is the one way to them. */
export class Secret {
  readonly #bytes: Uint8Array

  constructor(bytes: Uint8Array) {
    this.#bytes = new Uint8Array(bytes)
  }

  get length(): number {
    return this.#bytes.length
  }

  /** The live bytes, not a copy: do not keep them. */
  bytes(): Uint8Array {
    return this.#bytes
  }

  equals(other: Secret): boolean {
    return this.length === other.length && timingSafeEqual(this.#bytes, other.#bytes)
  }

  /** Overwrites the bytes with zeros; afterwards the secret is useless. */
  destroy(): void {
    this.#bytes.fill(0)
  }

  toJSON(): string {
    return '[secret]'
  }

  toString(): string {
    return '[secret]'
  }

  [inspect.custom](): string {
    return '[secret]'
  }
}
