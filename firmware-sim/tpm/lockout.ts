/** Dictionary-attack protection (Part 1 §19.11). Times in seconds, `at` in milliseconds since power on. */
export interface Lockout {
  readonly failedTries: number
  readonly maxTries: number
  readonly recoveryTime: number
  readonly lockoutRecovery: number
  /** Whether the lockout hierarchy's own value may be tried. */
  readonly enabled: boolean
}

/** As a TPM comes from the factory, and after TPM2_Clear. */
export const freshLockout: Lockout = { failedTries: 0, maxTries: 3, recoveryTime: 1000, lockoutRecovery: 1000, enabled: true }

/** When the last failures were, milliseconds since power on. */
export interface FailureTimes {
  readonly any: number
  readonly lockout: number
}

export const isLockedOut = (of: Lockout): boolean => of.failedTries >= of.maxTries

/** One wrong value for a protected entity; `lockout`: for the lockout hierarchy itself. */
export const afterFailure = (of: Lockout, lockout: boolean): Lockout =>
  lockout ? { ...of, enabled: false } : of.recoveryTime === 0 ? of : { ...of, failedTries: of.failedTries + 1 }

/** Failures are forgiven one per recovery time; the lockout value may be tried again after its own. */
export const healed = (of: Lockout, times: FailureTimes, at: number): { lockout: Lockout; times: FailureTimes } => {
  let { failedTries, enabled } = of
  let { any } = times
  if (failedTries !== 0) {
    const forgiven = of.recoveryTime === 0 ? failedTries : Math.floor((at - any) / 1000 / of.recoveryTime)
    failedTries = Math.max(0, failedTries - forgiven)
    any += forgiven * of.recoveryTime * 1000
  }
  if (!enabled && of.lockoutRecovery !== 0 && (at - times.lockout) / 1000 >= of.lockoutRecovery) enabled = true
  if (failedTries === of.failedTries && enabled === of.enabled) return { lockout: of, times }
  return { lockout: { ...of, failedTries, enabled }, times: { ...times, any } }
}

/** At a start: power may have been cut to hide a failure, so an unclean one counts as one when protected entities were in use. */
export const afterStart = (of: Lockout, unclean: boolean): Lockout => ({
  ...of,
  enabled: of.enabled || of.lockoutRecovery === 0,
  failedTries: unclean && of.recoveryTime !== 0 && of.failedTries < of.maxTries ? of.failedTries + 1 : of.failedTries,
})
