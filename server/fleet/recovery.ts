/** Proving oneself anew with an identity on record: a return, or a repeated enrolment. */
export interface Recovery {
  /** When each recovery of the last window began (its first certificate was issued), oldest first. */
  readonly begun: readonly number[]
  /** Certificates issued since the newest began; 0 once one of them was used: that recovery is over. */
  readonly attempts: number
  readonly lastAt: number
  /** The budget was spent: a person decides. */
  readonly heldAt: number | null
}

/** So many recoveries in so many milliseconds. */
export interface RecoveryBudget {
  readonly count: number
  readonly window: number
}

const day = 86_400_000
export const defaultBudget: RecoveryBudget = { count: 8, window: 30 * day }

/** Certificates that one recovery gives without a pause: answers get lost, boards lose power. */
const free = 4
const firstPause = 30_000
const longestPause = 3_600_000

export type RecoveryStep =
  | { readonly do: 'go'; readonly next: Recovery }
  /** Not before then, milliseconds since 1970. */
  | { readonly do: 'wait'; readonly until: number }
  | { readonly do: 'hold' }

/** A person has to decide about this device. */
export const isHeld = (known: Recovery | undefined): boolean => (known?.heldAt ?? null) !== null

const inWindow = (begun: readonly number[], budget: RecoveryBudget, now: number): readonly number[] => begun.filter((at) => at + budget.window > now)

/**
 * May this device prove itself anew? What counts is recoveries that were completed: one begins with its first certificate and is over when a certificate of it
 * was used on a connection. Until then more of them cost nothing (a device whose power fails before it has stored the answer is not to blame), but from the
 * fifth on each waits twice as long as the one before, an hour at most. Whoever comes back again and again, each time successfully, has a fault that no
 * certificate mends: beyond the budget it is held.
 */
export const recoveryStep = (known: Recovery | undefined, budget: RecoveryBudget, now: number): RecoveryStep => {
  if (isHeld(known)) return { do: 'hold' }
  const begun = inWindow(known?.begun ?? [], budget, now)
  if (known !== undefined && known.attempts > 0) {
    const over = known.attempts - free
    const until = over < 0 ? 0 : known.lastAt + Math.min(longestPause, firstPause * 2 ** Math.min(over, 20))
    // A clock that was set back meanwhile must not keep it waiting for longer than the pause itself.
    if (until > now && known.lastAt <= now) return { do: 'wait', until }
    return { do: 'go', next: { ...known, begun, attempts: known.attempts + 1, lastAt: now } }
  }
  if (begun.length >= budget.count) return { do: 'hold' }
  return { do: 'go', next: { begun: [...begun, now], attempts: 1, lastAt: now, heldAt: null } }
}

/** The record of a first enrolment: until its certificate was used, repeating it costs nothing, as within a recovery. */
export const firstIssue = (now: number): Recovery => ({ begun: [], attempts: 1, lastAt: now, heldAt: null })

/** A certificate of the newest recovery was used. */
export const recovered = (known: Recovery): Recovery => ({ ...known, attempts: 0 })

/** How many more recoveries may begin. */
export const recoveriesLeft = (known: Recovery | undefined, budget: RecoveryBudget, now: number): number =>
  isHeld(known) ? 0 : Math.max(0, budget.count - inWindow(known?.begun ?? [], budget, now).length)
