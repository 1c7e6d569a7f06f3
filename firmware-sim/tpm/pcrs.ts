import { concat, u32, sized } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { marshalPcrSelection, type PcrBank } from '@fleetkey/tpm2/structures.ts'
import { rc, Refusal } from './refusal.ts'

/** Per PCR the localities that may reset and extend it, as bits (PC Client platform profile §4.7.2). */
const localities = (pcr: number): { readonly reset: number; readonly extend: number } => {
  if (pcr < 16) return { reset: 0, extend: 0x1f }
  const dynamic = [
    { reset: 0x0f, extend: 0x1f },
    { reset: 0x10, extend: 0x1c },
    { reset: 0x10, extend: 0x1c },
    { reset: 0x10, extend: 0x0c },
    { reset: 0x14, extend: 0x0e },
    { reset: 0x14, extend: 0x04 },
    { reset: 0x14, extend: 0x04 },
    { reset: 0x0f, extend: 0x1f },
  ]
  return dynamic[pcr - 16] ?? { reset: 0, extend: 0 }
}

/** PCRs whose changes do not count: those that anybody may reset. */
const uncounted: ReadonlySet<number> = new Set([16, 21, 22, 23])

/** 24 PCRs of the SHA-256 bank. */
export class Pcrs {
  #values: Uint8Array[] = initial(0)
  /** Grows with every change that counts. */
  updates = 0

  /** Power was lost: everything starts anew; `saved`: values of PCR 0 to 15 that an orderly shutdown has kept. */
  reset(locality: number, saved: readonly Uint8Array[] | null): void {
    const kept = saved ?? []
    this.#values = initial(locality).map((value, pcr) => kept[pcr]?.slice() ?? value)
    this.updates += 24 - kept.length - uncounted.size
  }

  get staticValues(): readonly Uint8Array[] {
    return this.#values.slice(0, 16)
  }

  extend(pcr: number, value: Uint8Array): void {
    this.#values[pcr] = digest(alg.sha256, this.#values[pcr] ?? new Uint8Array(32), value)
    this.#count(pcr)
  }

  /** Refuses with LOCALITY. */
  checkExtend(pcr: number, locality: number): void {
    if ((localities(pcr).extend & (1 << locality)) === 0) throw new Refusal(rc.locality)
  }

  /** TPM2_PCR_Reset. At locality 4 only the hardware resets, by its own signals. */
  clear(pcr: number, locality: number): void {
    if (locality === 4 || (localities(pcr).reset & (1 << locality)) === 0) throw new Refusal(rc.locality)
    this.#values[pcr] = new Uint8Array(32)
    this.#count(pcr)
  }

  /** TPM2_Clear counts as a change of all. */
  changed(): void {
    this.updates++
  }

  #count(pcr: number): void {
    if (!uncounted.has(pcr)) this.updates++
  }

  value(pcr: number): Uint8Array {
    return this.#values[pcr] ?? new Uint8Array(32)
  }

  /** Values of a selection in order; banks that are not here have none. */
  selected(banks: readonly PcrBank[]): readonly Uint8Array[] {
    return present(banks).flatMap(({ pcrs }) => pcrs.map((pcr) => this.value(pcr)))
  }

  digestOf(hash: number, banks: readonly PcrBank[]): Uint8Array {
    return digest(hash, ...this.selected(banks))
  }

  /** Answer of TPM2_PCR_Read: at most eight values. */
  read(banks: readonly PcrBank[]): Uint8Array {
    let left = 8
    const read = present(banks).map(({ hash, pcrs }) => {
      const some = pcrs.slice(0, left)
      left -= some.length
      return { hash, pcrs: some }
    })
    const values = this.selected(read)
    return concat(u32(this.updates), marshalPcrSelection(read), u32(values.length), ...values.map(sized))
  }
}

/** A selection without the PCRs that are not here: what the TPM itself makes of it before anything else. */
export const present = (banks: readonly PcrBank[]): readonly PcrBank[] => banks.map(({ hash, pcrs }) => ({ hash, pcrs: hash === alg.sha256 ? pcrs : [] }))

const initial = (locality: number): Uint8Array[] =>
  Array.from({ length: 24 }, (_, pcr) => {
    const value = new Uint8Array(32).fill(pcr >= 17 && pcr <= 22 ? 0xff : 0)
    // A start at locality 3 is told in PCR 0 (PC Client platform profile §3.3.3).
    if (pcr === 0) value[31] = locality
    return value
  })
