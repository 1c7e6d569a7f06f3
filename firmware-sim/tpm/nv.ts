import { concat, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import type { Input } from './input.ts'
import { hashAlg } from './readers.ts'
import { rc, Refusal } from './refusal.ts'

/** TPMA_NV (Part 2 §13.4). */
export const nvAttribute = {
  ppWrite: 1 << 0,
  ownerWrite: 1 << 1,
  authWrite: 1 << 2,
  policyWrite: 1 << 3,
  counter: 1 << 4,
  bits: 2 << 4,
  extend: 4 << 4,
  typeMask: 0xf0,
  policyDelete: 1 << 10,
  writeLocked: 1 << 11,
  writeAll: 1 << 12,
  writeDefine: 1 << 13,
  writeStClear: 1 << 14,
  globalLock: 1 << 15,
  ppRead: 1 << 16,
  ownerRead: 1 << 17,
  authRead: 1 << 18,
  policyRead: 1 << 19,
  noDA: 1 << 25,
  orderly: 1 << 26,
  clearStClear: 1 << 27,
  readLocked: 1 << 28,
  written: 1 << 29,
  platformCreate: 1 << 30,
  readStClear: 1 << 31,
} as const

export interface NvIndex {
  readonly index: number
  /** Hash of its Name; SHA-256 unless said. */
  readonly nameAlg?: number
  readonly attributes: number
  readonly policy: Uint8Array
  readonly auth: Uint8Array
  readonly data: Uint8Array
}

const maxIndices = 64
const maxSize = 2048
const reserved = 0x01f0_0300

export const nameAlgOf = (of: NvIndex): number => of.nameAlg ?? alg.sha256
export const isSet = (of: NvIndex, attribute: number): boolean => (of.attributes & attribute) !== 0
export const typeOf = (of: NvIndex): number => of.attributes & nvAttribute.typeMask

/** TPMS_NV_PUBLIC bytes. */
export const marshalNvPublic = (of: NvIndex): Uint8Array =>
  concat(u32(of.index), u16(nameAlgOf(of)), u32(of.attributes >>> 0), sized(of.policy), u16(of.data.length))

export const nvName = (of: NvIndex): Uint8Array => concat(u16(nameAlgOf(of)), digest(nameAlgOf(of), marshalNvPublic(of)))

export interface NvPublic {
  readonly index: number
  readonly nameAlg: number
  readonly attributes: number
  readonly policy: Uint8Array
  readonly size: number
}

/** TPMS_NV_PUBLIC in its TPM2B. */
export const readNvPublic = (input: Input): NvPublic =>
  input.inner((inner) => {
    const index = inner.u32()
    if (index >>> 24 !== 0x01) throw new Refusal(rc.value)
    const nameAlg = hashAlg(inner)
    const attributes = inner.u32()
    if ((attributes & reserved) !== 0) throw new Refusal(rc.reservedBits)
    const policy = inner.sized(64).slice()
    const size = inner.u16()
    if (size > maxSize) throw new Refusal(rc.size)
    return { index, nameAlg, attributes, policy, size }
  })

/** Non-volatile indices: they outlive power. */
export class Nv {
  readonly #indices = new Map<number, NvIndex>()

  constructor(indices: readonly NvIndex[]) {
    for (const one of indices) this.#indices.set(one.index, one)
  }

  get all(): readonly NvIndex[] {
    return [...this.#indices.values()].toSorted((one, other) => one.index - other.index)
  }

  get(index: number): NvIndex | undefined {
    return this.#indices.get(index)
  }

  define(index: NvIndex): void {
    if (this.#indices.has(index.index)) throw new Refusal(rc.nvDefined)
    if (this.#indices.size >= maxIndices) throw new Refusal(rc.nvSpace)
    this.#indices.set(index.index, index)
  }

  remove(index: number): void {
    this.#indices.delete(index)
  }

  /** Those of the owner go with TPM2_Clear. */
  clearOwner(): void {
    for (const one of this.#indices.values()) if (!isSet(one, nvAttribute.platformCreate)) this.#indices.delete(one.index)
  }

  /** A start unlocks what is locked until the next one, unless it resumes. */
  started(resume: boolean): void {
    if (resume) return
    for (const one of this.#indices.values()) {
      let attributes = one.attributes & ~nvAttribute.readLocked
      if (!isSet(one, nvAttribute.writeDefine) || !isSet(one, nvAttribute.written)) attributes &= ~nvAttribute.writeLocked
      if (isSet(one, nvAttribute.clearStClear)) attributes &= ~nvAttribute.written
      if (attributes !== one.attributes) this.#indices.set(one.index, { ...one, attributes })
    }
  }

  change(of: NvIndex, change: Partial<NvIndex>): void {
    this.#indices.set(of.index, { ...of, ...change })
  }

  write(of: NvIndex, offset: number, data: Uint8Array): void {
    // What was there before the first write does not count; unwritten bytes read as ones.
    const changed = isSet(of, nvAttribute.written) ? Uint8Array.from(of.data) : new Uint8Array(of.data.length).fill(0xff)
    changed.set(data, offset)
    this.change(of, { data: changed, attributes: of.attributes | nvAttribute.written })
  }
}
