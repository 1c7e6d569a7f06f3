import type { Retention } from '../../ca/retention.ts'
import type { Context } from '../context.ts'

/** What a check has found. `failure`: something does not work, or will not soon; `warning`: somebody has to look at it. */
export interface Result {
  readonly grade: 'ok' | 'warning' | 'failure'
  readonly found: string
}

export interface Check {
  readonly name: string
  /** What to do, unless it is ok. */
  readonly remedy: string
  /** Reads, never writes, a bounded amount. What it throws is a failure. */
  readonly examine: (ctx: Context, around: Around) => Promise<Result> | Result
}

/** What the checks cannot see by themselves: the parts of this process beside the flows. */
export interface Around {
  /** The certificate that devices and operators see, and the names it is to have. */
  readonly tls: () => { readonly names: readonly string[]; readonly notAfter: number }
  readonly names: readonly string[]
  /** Lists that are handed out; null when none are offered. */
  readonly lists: () => readonly { readonly name: string; readonly thisUpdate: number; readonly nextUpdate: number }[] | null
  /** Where certificates say that lists are; null when they say nothing. */
  readonly statusUrl: string | null
  /** How long superseded TLS certificates are kept after their end. */
  readonly retention: Retention
  /** Null when it is not offered. */
  readonly est: () => { readonly listening: boolean } | null
  /** Null when none is configured. */
  readonly webhook: () => {
    readonly host: string
    readonly failures: number
    readonly isDead: boolean
    readonly error: string | null
    readonly waiting: number
  } | null
  /** Whether space is kept for revocations, and bytes that are free besides. */
  readonly disk: () => { readonly reserve: boolean; readonly free: number }
}

export const [minute, hour, day] = [60_000, 3_600_000, 86_400_000] as const

export const ok = (found: string): Result => ({ grade: 'ok', found })
export const warning = (found: string): Result => ({ grade: 'warning', found })
export const failure = (found: string): Result => ({ grade: 'failure', found })

/** The first that is wrong, else ok. */
export const unless = (wrong: readonly string[], found: string, grade: typeof warning = failure): Result =>
  wrong.length === 0 ? ok(found) : grade(wrong.slice(0, 10).join('; '))

/** `2027-01-31` */
export const date = (at: number): string => new Date(at).toISOString().slice(0, 10)

export const same = (one: Uint8Array | null | undefined, other: Uint8Array | null | undefined): boolean =>
  one !== null && one !== undefined && other !== null && other !== undefined && Buffer.compare(one, other) === 0
