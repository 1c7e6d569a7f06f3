/** Codes that reach the other side of a refused request, with their HTTP status. */
export const problemStatus = {
  malformed: 400,
  unsupported: 400,
  unauthenticated: 401,
  forbidden: 403,
  'attestation-failed': 403,
  'not-found': 404,
  conflict: 409,
  expired: 410,
  'rate-limited': 429,
  unavailable: 503,
  internal: 500,
} as const

export type ProblemCode = keyof typeof problemStatus

/**
 * A refused request. `code` reaches the other side; `message` (the detail) reaches only the audit entry.
 * `reason` is a stable, private reason code such as `ak.attributes.not-restricted`, for the audit entry and `device show`.
 */
export class Problem extends Error {
  override readonly name = 'Problem'
  readonly code: ProblemCode
  readonly reason: string | undefined
  readonly retryAfterSeconds: number | undefined

  constructor(code: ProblemCode, detail: string, more: { reason?: string; retryAfterSeconds?: number; cause?: unknown } = {}) {
    super(detail, { cause: more.cause })
    this.code = code
    this.reason = more.reason
    this.retryAfterSeconds = more.retryAfterSeconds
  }
}

/** Whatever was thrown, as a Problem: anything that is not one becomes `internal`. */
export const toProblem = (thrown: unknown): Problem =>
  thrown instanceof Problem ? thrown : new Problem('internal', thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown), { cause: thrown })
