import { concat, Reader, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { parameter, rc, Refusal } from './refusal.ts'

/** TPMA_NV (Part 2 §13.4). */
export const nvAttribute = {
  ppWrite: 1 << 0,
  ownerWrite: 1 << 1,
  authWrite: 1 << 2,
  policyWrite: 1 << 3,
  counter: 1 << 4,
  typeMask: 0xf0,
  ppRead: 1 << 16,
  ownerRead: 1 << 17,
  authRead: 1 << 18,
  policyRead: 1 << 19,
  noDA: 1 << 25,
  written: 1 << 29,
} as const

export interface NvIndex {
  readonly index: number
  readonly attributes: number
  readonly policy: Uint8Array
  readonly auth: Uint8Array
  readonly data: Uint8Array
}

const maxIndices = 64
const maxSize = 2048

/** TPMS_NV_PUBLIC bytes. */
export const marshalNvPublic = (of: NvIndex): Uint8Array =>
  concat(u32(of.index), u16(alg.sha256), u32(of.attributes >>> 0), sized(of.policy), u16(of.data.length))

export const nvName = (of: NvIndex): Uint8Array => concat(u16(alg.sha256), digest(alg.sha256, marshalNvPublic(of)))

/** Reads the TPMS_NV_PUBLIC of TPM2_NV_DefineSpace. */
export const readNvPublic = (bytes: Uint8Array, auth: Uint8Array): NvIndex => {
  const reader = new Reader(bytes)
  const index = reader.u32()
  if (index >>> 24 !== 0x01) throw parameter(2, rc.handle)
  if (reader.u16() !== alg.sha256) throw parameter(2, rc.hash)
  const attributes = reader.u32()
  const policy = reader.sized(32).slice()
  const size = reader.u16()
  reader.end()
  const type = attributes & nvAttribute.typeMask
  if (type !== 0 && type !== nvAttribute.counter) throw parameter(2, rc.attributes)
  if ((attributes & nvAttribute.written) !== 0) throw parameter(2, rc.attributes)
  if (size > maxSize || (type === nvAttribute.counter && size !== 8)) throw parameter(2, rc.size)
  return { index, attributes, policy, auth, data: new Uint8Array(size) }
}

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

  write(of: NvIndex, offset: number, data: Uint8Array): void {
    if (offset + data.length > of.data.length) throw new Refusal(rc.nvRange)
    const changed = Uint8Array.from(of.data)
    changed.set(data, offset)
    this.#indices.set(of.index, { ...of, data: changed, attributes: of.attributes | nvAttribute.written })
  }

  increment(of: NvIndex): void {
    if ((of.attributes & nvAttribute.typeMask) !== nvAttribute.counter) throw new Refusal(rc.attributes | 0x200)
    const value = Buffer.from(of.data).readBigUInt64BE() + 1n
    const bytes = Buffer.alloc(8)
    bytes.writeBigUInt64BE(value)
    this.write(of, 0, bytes)
  }

  read(of: NvIndex, offset: number, size: number): Uint8Array {
    if ((of.attributes & nvAttribute.written) === 0) throw new Refusal(rc.nvUninitialized)
    if (offset + size > of.data.length) throw new Refusal(rc.nvRange)
    return of.data.slice(offset, offset + size)
  }
}
