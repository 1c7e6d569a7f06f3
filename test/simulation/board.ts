import { startAgent, type Agent } from '@fleetkey/device-agent/agent.ts'
import type { Settings } from '@fleetkey/device-agent/config.ts'
import { memoryFileSystem, type FilePower, type MemoryFileSystem } from '@fleetkey/device-agent/memory-filesystem.ts'
import type { SecureElement } from '@fleetkey/device-agent/secure-element.ts'
import { createBoard } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import type { Release } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import type { Dice } from './dice.ts'
import type { Network } from './network.ts'
import type { VirtualTime } from './time.ts'

/** What a board proves itself by: a secure element, or a TPM (`tpm`: its durable state) that measures the release on its flash. */
export type Hardware = { readonly element: SecureElement } | { readonly tpm: Uint8Array; readonly release: Release }

/** A board without what is on its medium. */
export interface Blank {
  readonly serial: string
  readonly hardware: Hardware
}

/** A board of the simulated world: the real agent on a medium in memory. */
export interface SimulatedBoard {
  readonly device: string
  /** The agent that runs; undefined while the power is off. */
  readonly agent: Agent | undefined
  readonly medium: MemoryFileSystem
  readonly hasTpm: boolean
  /** The release on its flash, which runs from when it is switched on; null for boards that measure none. */
  readonly release: Release | null
  /** The board as it stands, for another one to be made of it. */
  blank(): Blank
  /** The power goes, and another release is on its flash. */
  install(release: Release): void
  /** `clock`: how far its clock is wrong, milliseconds. `power`: when it fails; steady unless told. `steps`: durable steps of the agent until it fails. */
  switchOn(how?: { readonly clock?: number; readonly power?: FilePower; readonly steps?: number }): void
  /** The power goes at once. `keep`: what was not synced happens to have reached the medium, and the TPM was told before. */
  cut(how?: { readonly keep?: boolean }): void
  /** The power goes, and an older copy of the medium takes its place. */
  restore(contents: ReadonlyMap<string, Uint8Array>): void
  /** From now on its power does not fail. */
  calm(): void
}

/** The same bytes as a TPM and a flash of their own; undefined for boards with a secure element. */
const measuring = (serial: string, hardware: Hardware, around: { readonly time: VirtualTime; readonly dice: Dice }) => {
  if (!('tpm' in hardware)) return undefined
  const tpm = createSoftwareTpm({ state: hardware.tpm, random: around.dice.bytes, now: around.time.now })
  const board = createBoard({ serial, tpm, flash: new Flash() })
  board.flash.update(hardware.release)
  return { board, release: hardware.release }
}

export const openBoard = (of: {
  readonly blank: Blank
  readonly trust: Pick<Settings, 'server' | 'tenant' | 'trust'>
  readonly contents?: ReadonlyMap<string, Uint8Array>
  readonly network: Network
  readonly time: VirtualTime
  readonly dice: Dice
  readonly log: (line: string) => void
  /** Epochs that this board takes into use. */
  readonly inUse: (key: string, epoch: number) => void
}): SimulatedBoard => {
  const { blank, time, dice } = of
  const device = blank.serial.toLowerCase()
  const medium = memoryFileSystem(of.contents === undefined ? {} : { contents: of.contents })
  let agent: Agent | undefined
  let isCalm = false
  const made = measuring(blank.serial, blank.hardware, of)
  let release = made?.release ?? null
  let orderly = true
  const cut: SimulatedBoard['cut'] = (how = {}) => {
    if (agent !== undefined) orderly = how.keep === true
    if (orderly) made?.board.tpm.powerCycle({ shutdown: 'clear', startup: 'none' })
    agent?.kill()
    agent = undefined
    medium.powerCycle(how)
  }
  /** Power on: the TPM starts anew and measures what boots. */
  const boot = (): Partial<Parameters<typeof startAgent>[0]> => {
    if (made === undefined) return 'element' in blank.hardware ? { secureElement: blank.hardware.element } : {}
    const { board } = made
    board.boot({ shutdown: orderly ? 'clear' : 'none' })
    return { openTpm: async () => board.transport(), readEventLog: async () => board.eventLog() }
  }
  return {
    device,
    get agent() {
      return agent
    },
    medium,
    hasTpm: made !== undefined,
    get release() {
      return release
    },
    blank() {
      if (made === undefined || release === null) return blank
      return { serial: blank.serial, hardware: { tpm: made.board.tpm.state(), release } }
    },
    install(next) {
      cut({ keep: true })
      made?.board.flash.update(next)
      release = next
    },
    cut,
    restore(contents) {
      cut()
      medium.powerCycle({ contents })
    },
    calm() {
      isCalm = true
    },
    switchOn(how = {}) {
      cut()
      const { power } = how
      if (power !== undefined)
        medium.powerCycle({
          power: {
            beforeWrite() {
              const outcome = isCalm ? 'ok' : power.beforeWrite()
              // Agent and medium have one power supply.
              if (outcome === 'torn') failed()
              return outcome
            },
          },
        })
      const failed = (): void => {
        started.kill()
        if (agent !== started) return
        agent = undefined
        orderly = false
      }
      let left = how.steps ?? Number.POSITIVE_INFINITY
      const hardware = boot()
      const started = startAgent({
        settings: {
          ...of.trust,
          data: '/agent',
          tpm: made === undefined ? null : 'in-process',
          serial: blank.serial,
          eventLog: null,
          socket: null,
          outputs: [{ key: 'telemetry', path: '/run/telemetry.key', format: 'json', owner: { mode: 0o600 }, hook: null }],
        },
        ...hardware,
        files: medium,
        now: () => time.now() + (how.clock ?? 0),
        monotonic: () => performance.now(),
        random: dice.bytes,
        connect: of.network.connect,
        log: (line) => of.log(`${device}: ${line}`),
        step: () => {
          if (--left < 0 && !isCalm) failed()
        },
      })
      agent = started
      started.onChange(({ current }) => {
        for (const [key, epoch] of Object.entries(current)) of.inUse(key, epoch)
      })
    },
  }
}
