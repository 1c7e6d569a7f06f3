import { createHash } from 'node:crypto'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { resetValue } from '@fleetkey/tpm2/event-log.ts'
import { imaEntry, imaPcr, marshalIma, type ImaEntry } from '@fleetkey/tpm2/ima.ts'
import { bootAggregate } from '@fleetkey/tpm2/ima-replay.ts'

/** What a Linux kernel with IMA keeps: the list of what it measured since the boot, and PCR 10. */
export interface Kernel {
  /** A file is used for the first time since it changed: it is measured before anything runs. */
  measure(path: string, content: Uint8Array): void
  /** The binary list, as binary_runtime_measurements gives it. */
  list(): Uint8Array
}

const sha256 = (bytes: Uint8Array): Uint8Array => new Uint8Array(createHash('sha256').update(bytes).digest())

/** Starts a kernel's IMA after a boot that left these values (SHA-256 bank). `extend`: of the TPM. */
export const startKernel = (boot: ReadonlyMap<number, Uint8Array>, extend: (pcr: number, digest: Uint8Array) => void): Kernel => {
  const entries: ImaEntry[] = []
  const add = (path: string, digest: Uint8Array): void => {
    const entry = imaEntry(path, digest)
    entries.push(entry)
    extend(imaPcr, sha256(entry.templateData))
  }
  add('boot_aggregate', bootAggregate(new Map([[alg.sha256, boot]]), alg.sha256) ?? resetValue(0, alg.sha256))
  return { measure: (path, content) => add(path, sha256(content)), list: () => marshalIma(entries) }
}
