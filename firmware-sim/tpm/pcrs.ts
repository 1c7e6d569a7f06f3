import { concat, u32, sized } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { marshalPcrSelection, type PcrBank } from '@fleetkey/tpm2/structures.ts'
import { handleFault, rc } from './refusal.ts'

/** 24 PCRs of the SHA-256 bank. */
export class Pcrs {
  #values: Uint8Array[] = initial()
  /** Grows with every change. */
  updates = 0

  reset(): void {
    this.#values = initial()
    this.updates = 0
  }

  extend(pcr: number, value: Uint8Array): void {
    this.#values[pcr] = digest(alg.sha256, this.#values[pcr] ?? new Uint8Array(32), value)
    this.updates++
  }

  /** TPM2_PCR_Reset: 16 and 23 only, at locality 0. */
  clear(pcr: number): void {
    if (pcr !== 16 && pcr !== 23) throw handleFault(1, rc.value)
    this.#values[pcr] = new Uint8Array(32)
    this.updates++
  }

  value(pcr: number): Uint8Array {
    return this.#values[pcr] ?? new Uint8Array(32)
  }

  /** Values of a selection in order; banks that are not here have none. */
  selected(banks: readonly PcrBank[]): readonly Uint8Array[] {
    return banks.flatMap(({ hash, pcrs }) => (hash === alg.sha256 ? pcrs.map((pcr) => this.value(pcr)) : []))
  }

  digestOf(banks: readonly PcrBank[]): Uint8Array {
    return digest(alg.sha256, ...this.selected(banks))
  }

  /** Answer of TPM2_PCR_Read: at most eight values. */
  read(banks: readonly PcrBank[]): Uint8Array {
    let left = 8
    const read = banks.map(({ hash, pcrs }) => {
      const some = hash === alg.sha256 ? pcrs.slice(0, left) : []
      left -= some.length
      return { hash, pcrs: some }
    })
    const values = this.selected(read)
    return concat(u32(this.updates), marshalPcrSelection(read), u32(values.length), ...values.map(sized))
  }
}

const initial = (): Uint8Array[] => Array.from({ length: 24 }, (_, pcr) => new Uint8Array(32).fill(pcr >= 17 && pcr <= 22 ? 0xff : 0))
