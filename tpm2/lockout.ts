import { properties, property } from './capabilities.ts'
import type { Tpm } from './tpm.ts'

/** State of the dictionary-attack protection (Part 1 §19.8). Times in seconds. */
export interface Lockout {
  readonly locked: boolean
  readonly failures: number
  readonly allowed: number
  /** One failure is forgotten each time this has passed; 0: never by itself. */
  readonly interval: number
  /** How long a wrong lockout password shuts the lockout hierarchy; 0: until the next start. */
  readonly recovery: number
}

const inLockout = 1 << 9

/** From the variable properties. Pure. */
export const lockoutOf = (variable: ReadonlyMap<number, number>): Lockout => ({
  locked: ((variable.get(property.permanent) ?? 0) & inLockout) !== 0,
  failures: variable.get(property.lockoutCounter) ?? 0,
  allowed: variable.get(property.maxAuthFail) ?? 0,
  interval: variable.get(property.lockoutInterval) ?? 0,
  recovery: variable.get(property.lockoutRecovery) ?? 0,
})

export const readLockout = async (tpm: Tpm): Promise<Lockout> => lockoutOf(await properties(tpm, 0x200))

/** `90 s`, `12 min`, `2 h 30 min`. */
export const duration = (seconds: number): string => {
  if (seconds < 120) return `${seconds} s`
  const all = Math.ceil(seconds / 60)
  const [hours, minutes] = [Math.floor(all / 60), all % 60]
  if (hours === 0) return `${minutes} min`
  return minutes === 0 ? `${hours} h` : `${hours} h ${minutes} min`
}

/** What a lockout means and how it ends, in plain words. */
export const lockoutText = ({ locked, failures, allowed, interval, recovery }: Lockout): string => {
  if (!locked)
    return `the lockout hierarchy is shut after a wrong lockout password: it opens again ${recovery === 0 ? 'at the next start of the TPM' : `after ${duration(recovery)}`}`
  const wait =
    interval === 0
      ? 'it does not end by itself'
      : `one more attempt is possible after ${duration(interval)}, all are forgotten after ${duration(interval * failures)} without a wrong one`
  return (
    `the TPM is in lockout: ${failures} wrong passwords, ${allowed} are allowed; ${wait}. Whoever has the lockout password ends it at once: ` +
    'fleetkey-agent tpm reset-lockout --lockout-auth-file FILE'
  )
}
