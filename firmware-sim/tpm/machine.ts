import { empty } from '@fleetkey/tpm2/bytes.ts'
import { handle as known } from '@fleetkey/tpm2/constants.ts'
import type { ClockInfo } from '@fleetkey/tpm2/attest.ts'
import { afterFailure, afterStart, healed, type FailureTimes } from './lockout.ts'
import { Nv } from './nv.ts'
import type { Sequence, TpmObject } from './objects.ts'
import { Pcrs } from './pcrs.ts'
import { rc, Refusal } from './refusal.ts'
import type { TpmSession } from './sessions.ts'
import type { Durable, Saved } from './state.ts'

type Random = (length: number) => Uint8Array

export const slots = { objects: 3, sessions: 3, activeSessions: 64, persistent: 7 } as const
/** The clock is written to non-volatile memory that often (milliseconds, a power of two). */
const clockInterval = 4096

/** Everything a command can reach: what survives a loss of power, and what does not. */
export class Machine {
  durable: Durable
  readonly random: Random
  readonly pcrs = new Pcrs()
  readonly objects = new Map<number, TpmObject | Sequence>()
  readonly sessions = new Map<number, TpmSession>()
  /** Sessions whose context was saved, with the sequence number of that context. */
  readonly savedSessions = new Map<number, bigint>()
  nv: Nv
  started = false
  locality = 0
  /** Seed and proof of the null hierarchy, key of saved contexts: new with every reset. */
  nullSeed: Uint8Array
  /** The first numbers stand for loaded sessions. */
  contextSequence = BigInt(slots.sessions)
  objectSequence = 0n
  restartCount = 0
  exclusiveSession: number | null = null
  /** Whether a protected entity was authorised since the start. */
  protectedUsed = false
  readonly #now: () => number
  readonly #save: ((state: Durable) => void) | undefined
  #powerOn: number
  #ticked: number
  #failures: FailureTimes = { any: 0, lockout: 0 }

  constructor(of: { durable: Durable; random: Random; now: () => number; save?: ((state: Durable) => void) | undefined }) {
    this.durable = of.durable
    this.random = of.random
    this.#now = of.now
    this.#save = of.save
    this.nv = new Nv(of.durable.nv)
    this.nullSeed = of.random(32)
    this.#powerOn = of.now()
    this.#ticked = this.#powerOn
  }

  /** Milliseconds since power on. */
  get time(): number {
    return Math.max(0, Math.round(this.#ticked - this.#powerOn))
  }

  /** Lets time pass: the clock runs, failures are forgiven. */
  tick(): void {
    const now = this.#now()
    const clock = this.durable.clock + Math.max(0, now - this.#ticked)
    this.#ticked = now
    if (!this.started) return
    const { lockout, times } = healed(this.durable.lockout, this.#failures, this.time)
    this.#failures = times
    const safe = this.durable.clockSafe || Math.floor(clock / clockInterval) > Math.floor(this.durable.clock / clockInterval)
    this.durable = { ...this.durable, clock, clockSafe: safe, lockout }
  }

  clock(): ClockInfo {
    const { clock, resetCount, clockSafe } = this.durable
    return { clock: BigInt(Math.round(clock)), resetCount, restartCount: this.restartCount, safe: clockSafe }
  }

  /** Keeps what has changed of the durable state. */
  changed(change: Partial<Durable> = {}): void {
    this.durable = { ...this.durable, ...change, nv: this.nv.all }
    this.disorder()
    this.#save?.(this.durable)
  }

  /** What was kept by an orderly shutdown is not true any more. */
  disorder(): void {
    if (!this.started || (this.durable.orderly !== 'clear' && this.durable.orderly !== 'state')) return
    this.durable = { ...this.durable, orderly: this.protectedUsed ? 'protected-used' : 'none', saved: null }
  }

  /** Counts a wrong value for a protected entity. */
  fail(lockout: boolean): void {
    this.#failures = lockout ? { ...this.#failures, lockout: this.time } : { ...this.#failures, any: this.time }
    this.changed({ lockout: afterFailure(this.durable.lockout, lockout) })
  }

  /** Power goes and comes back; the TPM waits for TPM2_Startup. */
  powerCycle(): void {
    this.tick()
    this.objects.clear()
    this.sessions.clear()
    this.started = false
    this.#powerOn = this.#now()
    this.#ticked = this.#powerOn
    this.#failures = { any: 0, lockout: 0 }
    this.#save?.(this.durable)
  }

  /** TPM2_Startup (Part 1 §12.2.3): reset, restart or resume, as the last shutdown and this command say. */
  startup(state: boolean): void {
    const { orderly, saved, lockout, resetCount, starts } = this.durable
    if (this.locality !== 0 && this.locality !== 3) throw new Refusal(rc.locality)
    if (state && (orderly !== 'state' || saved === null)) throw new Refusal(rc.value)
    const kept = orderly === 'state' ? saved : null
    const unclean = orderly === 'none' || orderly === 'protected-used'
    if (kept === null) this.#reset()
    else this.#restore(kept, state)
    this.pcrs.reset(this.locality, state ? (kept?.pcrs ?? null) : null)
    this.started = true
    this.protectedUsed = false
    this.exclusiveSession = null
    this.nv.started(state)
    const platform = state ? kept?.platformAuth : undefined
    this.changed({
      orderly: 'none',
      saved: null,
      starts: starts + 1,
      resetCount: kept === null ? (resetCount + 1) >>> 0 : resetCount,
      clockSafe: this.durable.clockSafe && !unclean,
      lockout: afterStart(lockout, orderly === 'protected-used'),
      auths: { ...this.durable.auths, [String(known.platform)]: platform ?? empty },
    })
  }

  #reset(): void {
    this.pcrs.updates = 0
    this.restartCount = 0
    this.nullSeed = this.random(32)
    this.savedSessions.clear()
    this.objectSequence = 0n
  }

  #restore(kept: Saved, resume: boolean): void {
    this.pcrs.updates = kept.pcrUpdates
    this.restartCount = kept.restartCount + 1
    this.nullSeed = kept.nullSeed
    if (!resume) this.objectSequence = 0n
  }

  /** TPM2_Shutdown. */
  shutdown(state: boolean): void {
    this.protectedUsed = false
    const saved: Saved = {
      pcrs: this.pcrs.staticValues,
      pcrUpdates: this.pcrs.updates,
      restartCount: this.restartCount,
      nullSeed: this.nullSeed,
      platformAuth: this.durable.auths[String(known.platform)] ?? empty,
    }
    this.durable = { ...this.durable, orderly: state ? 'state' : 'clear', saved: state ? saved : null }
    this.#save?.(this.durable)
  }
}
