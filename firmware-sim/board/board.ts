import { createHash } from 'node:crypto'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { eventType, marshalEventLog, replay, type Event } from '@fleetkey/tpm2/event-log.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import { measurementsOf, separatorData, stages, systemFiles, type Release, type StageName } from '../release/release.ts'
import type { PowerCycle, SoftwareTpm } from '../tpm/software-tpm.ts'
import type { Flash } from './flash.ts'
import { startKernel, type Kernel } from './ima.ts'

/** A board: a TPM, a flash, and a boot ROM that measures what it runs. */
export interface Board {
  readonly serial: string
  readonly tpm: SoftwareTpm
  readonly flash: Flash
  /** Power off and on: the TPM starts anew, each stage of the booting slot is hashed, extended and logged before it would run. Throws on an empty flash. */
  boot(how?: PowerCycle): void
  /** TCG crypto-agile event log of the running boot. */
  eventLog(): Uint8Array
  /** Linux IMA's binary list of the running boot: it begins with the files of the release, and grows. */
  imaList(): Uint8Array
  /** The running system uses a file that it has not used since the boot: the kernel measures it. */
  measureFile(path: string, content: Uint8Array): void
  transport(): Transport
}

const sha256 = (bytes: Uint8Array): Uint8Array => createHash('sha256').update(bytes).digest()

/** Joins a TPM and a flash. Not booted yet. */
export const createBoard = (of: { readonly serial: string; readonly tpm: SoftwareTpm; readonly flash: Flash }): Board => {
  const { serial, tpm, flash } = of
  let log: Uint8Array | undefined
  let kernel: Kernel | undefined
  const running = (): Kernel => {
    if (kernel === undefined) throw new Error(`board ${serial} has not booted`)
    return kernel
  }
  return {
    serial,
    tpm,
    flash,
    boot(how) {
      tpm.powerCycle(how)
      const booting = flash.boot()
      if (booting === undefined) throw new Error(`board ${serial} has nothing to boot`)
      // The bytes that are there are measured, not what the manifest says of them.
      const digests = Object.fromEntries(stages.map(({ stage }) => [stage, sha256(booting.images[stage])])) as unknown as Readonly<
        Record<StageName, Uint8Array>
      >
      const events = measurementsOf(digests).map(({ pcr, kind, digest, description }): Event => {
        tpm.extend(pcr, digest)
        return {
          pcr,
          type: kind === 'separator' ? eventType.separator : eventType.postCode,
          digests: new Map([[alg.sha256, digest]]),
          data: kind === 'separator' ? separatorData : new TextEncoder().encode(description),
        }
      })
      log = marshalEventLog(events)
      kernel = startKernel(replay(events, alg.sha256), (pcr, digest) => tpm.extend(pcr, digest))
      for (const { path, stage } of systemFiles) kernel.measure(path, booting.images[stage])
    },
    eventLog() {
      if (log === undefined) throw new Error(`board ${serial} has not booted`)
      return log
    },
    imaList: () => running().list(),
    measureFile: (path, content) => running().measure(path, content),
    transport: () => tpm.transport(),
  }
}

/** Puts a release on a board's flash; it runs after the next boot. */
export const install = (board: Board, release: Release): void => board.flash.update(release)
