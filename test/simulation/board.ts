import { startAgent, type Agent } from '@fleetkey/device-agent/agent.ts'
import type { Settings } from '@fleetkey/device-agent/config.ts'
import { memoryFileSystem, type FilePower, type MemoryFileSystem } from '@fleetkey/device-agent/memory-filesystem.ts'
import type { SecureElement } from '@fleetkey/device-agent/secure-element.ts'
import type { Dice } from './dice.ts'
import type { Network } from './network.ts'
import type { VirtualTime } from './time.ts'

/** A board as its factory made it. */
export interface Blank {
  readonly serial: string
  readonly element: SecureElement
}

/** A board of the simulated world: the real agent on a medium in memory. */
export interface SimulatedBoard {
  readonly device: string
  /** The agent that runs; undefined while the power is off. */
  readonly agent: Agent | undefined
  readonly medium: MemoryFileSystem
  /** `clock`: how far its clock is wrong, milliseconds. `power`: when it fails; steady unless told. `steps`: durable steps of the agent until it fails. */
  switchOn(how?: { readonly clock?: number; readonly power?: FilePower; readonly steps?: number }): void
  /** The power goes at once. `keep`: what was not synced happens to have reached the medium. */
  cut(how?: { readonly keep?: boolean }): void
  /** The power goes, and an older copy of the medium takes its place. */
  restore(contents: ReadonlyMap<string, Uint8Array>): void
  /** From now on its power does not fail. */
  calm(): void
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
  const cut: SimulatedBoard['cut'] = (how = {}) => {
    agent?.kill()
    agent = undefined
    medium.powerCycle(how)
  }
  return {
    device,
    get agent() {
      return agent
    },
    medium,
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
        if (agent === started) agent = undefined
      }
      let left = how.steps ?? Number.POSITIVE_INFINITY
      const started = startAgent({
        settings: {
          ...of.trust,
          data: '/agent',
          tpm: null,
          serial: blank.serial,
          eventLog: null,
          socket: null,
          outputs: [{ key: 'telemetry', path: '/run/telemetry.key', format: 'json', owner: { mode: 0o600 }, hook: null }],
        },
        secureElement: blank.element,
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
