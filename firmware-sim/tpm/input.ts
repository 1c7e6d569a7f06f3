import { TpmFormatError, Reader } from '@fleetkey/tpm2/bytes.ts'
import { asParameter, rc, Refusal } from './refusal.ts'

/** Reads the bytes of a command. Refuses with the code that the TPM's unmarshalling gives (Part 4), not yet numbered. */
export class Input {
  readonly #reader: Reader

  constructor(bytes: Uint8Array) {
    this.#reader = new Reader(bytes)
  }

  get left(): number {
    return this.#reader.left
  }

  bytes(length: number): Uint8Array {
    if (length > this.left) throw new Refusal(rc.insufficient)
    return this.#reader.bytes(length)
  }

  u8(): number {
    return this.bytes(1)[0] ?? 0
  }

  u16(): number {
    if (this.left < 2) throw new Refusal(rc.insufficient)
    return this.#reader.u16()
  }

  u32(): number {
    if (this.left < 4) throw new Refusal(rc.insufficient)
    return this.#reader.u32()
  }

  u64(): bigint {
    if (this.left < 8) throw new Refusal(rc.insufficient)
    return this.#reader.u64()
  }

  /** TPM2B of at most `max` bytes, a view. */
  sized(max: number): Uint8Array {
    const length = this.u16()
    if (length > max) throw new Refusal(rc.size)
    return this.bytes(length)
  }

  /** A structure in a TPM2B: its size must be exactly the structure's. */
  inner<T>(read: (input: Input) => T): T {
    const size = this.u16()
    if (size === 0) throw new Refusal(rc.size)
    const before = this.left
    const value = read(this)
    if (before - this.left !== size) throw new Refusal(rc.size)
    return value
  }

  rest(): Uint8Array {
    return this.#reader.rest()
  }
}

/** The parameters of a command: each refusal is numbered after the parameter that it is about. */
export class Parameters {
  readonly #input: Input
  #number = 0

  constructor(bytes: Uint8Array) {
    this.#input = new Input(bytes)
  }

  get left(): number {
    return this.#input.left
  }

  take<T>(read: (input: Input) => T): T {
    this.#number++
    return asParameter(this.#number, () => read(this.#input))
  }
}

/** Structures of `@fleetkey/tpm2` throw TpmFormatError; here that is a refusal. */
export const orRefuse = <T>(code: number, work: () => T): T => {
  try {
    return work()
  } catch (error) {
    if (error instanceof TpmFormatError) throw new Refusal(code)
    throw error
  }
}
