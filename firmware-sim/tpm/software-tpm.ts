import { empty } from '@fleetkey/tpm2/bytes.ts'
import { tag } from '@fleetkey/tpm2/constants.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import { respond, run } from './execute.ts'
import { Machine } from './machine.ts'
import { nvAttribute } from './nv.ts'
import { rc, Refusal } from './refusal.ts'
import { freshState, packState, unpackState } from './state.ts'

export interface SoftwareTpmOptions {
  /** What `save` was last handed; without it the TPM is new. */
  readonly state?: Uint8Array
  readonly random: (length: number) => Uint8Array
  readonly now: () => number
  /** Called whenever what survives a loss of power has changed. */
  readonly save?: (state: Uint8Array) => void
}

/** How power goes and comes back. */
export interface PowerCycle {
  /** What the operating system told the TPM before (default: TPM2_Shutdown(CLEAR)); `none`: the plug was pulled. */
  readonly shutdown?: 'clear' | 'state' | 'none'
  /** Locality of the firmware that starts it (default 0); `none`: whoever sends commands has to start it. */
  readonly startup?: 0 | 3 | 'none'
}

/**
 * A TPM 2.0 in this process: a simulator, not a security boundary, and it says so (manufacturer FKSM). It speaks the TPM's wire protocol for the commands that
 * Fleetkey's agent and tpm2-tools use, with real authorisation, sessions, parameter encryption and dictionary-attack protection, and answers as the reference
 * implementation does. P-256, P-384 and RSA keys, HMAC and sealed objects; the SHA-256 bank.
 */
export interface SoftwareTpm {
  /** One command, its response. Whatever comes in, a well-formed response comes out. */
  execute(command: Uint8Array): Uint8Array
  /** Loss of power: PCRs, loaded objects and sessions are gone. */
  powerCycle(how?: PowerCycle): void
  /** Locality of the commands that follow (0 to 4). */
  setLocality(locality: number): void
  /** What the boot ROM measures, without a command. */
  extend(pcr: number, digest: Uint8Array): void
  /** The factory's way into NV: readable by owner and platform. */
  writeNv(index: number, bytes: Uint8Array): void
  state(): Uint8Array
  transport(): Transport
}

const answered = (machine: Machine, bytes: Uint8Array): Uint8Array => {
  try {
    return run(machine, bytes)
  } catch (error) {
    return respond(tag.noSessions, error instanceof Refusal ? error.rc : rc.failure, empty)
  }
}

export const createSoftwareTpm = (options: SoftwareTpmOptions): SoftwareTpm => {
  const { random, now, save } = options
  const machine = new Machine({
    durable: options.state === undefined ? freshState(random) : unpackState(options.state, random),
    random,
    now,
    save: save === undefined ? undefined : (state) => save(packState(state)),
  })

  const powerCycle = ({ shutdown = 'clear', startup = 0 }: PowerCycle = {}): void => {
    if (shutdown !== 'none' && machine.started) machine.shutdown(shutdown === 'state')
    machine.powerCycle()
    machine.locality = startup === 'none' ? 0 : startup
    if (startup === 'none') return
    machine.startup(false)
    machine.locality = 0
  }
  powerCycle()

  return {
    execute: (command) => answered(machine, command),
    powerCycle,
    setLocality(locality) {
      machine.locality = locality
    },
    extend: (pcr, digest) => machine.pcrs.extend(pcr, digest),
    writeNv(index, bytes) {
      const attributes = nvAttribute.ppRead | nvAttribute.ownerRead | nvAttribute.authRead | nvAttribute.ppWrite | nvAttribute.noDA | nvAttribute.written
      machine.nv.remove(index)
      machine.nv.define({ index, attributes: attributes | nvAttribute.platformCreate, policy: empty, auth: empty, data: bytes.slice() })
      machine.changed()
    },
    state: () => packState(machine.durable),
    transport: () => ({ send: async (command) => answered(machine, command), close: async () => undefined }),
  }
}
