/** One act that needs a second person: asked for by one operator, granted by another, good for one use. */
export interface Approval {
  readonly id: string
  /** What it is for, to the letter: granted for one thing it is good for no other. */
  readonly what: string
  /** In words, for the person who decides. */
  readonly detail: string
  readonly reason: string
  readonly askedBy: string
  readonly askedAt: number
  readonly expires: number
  readonly grantedBy: string | null
  readonly grantedAt: number | null
  readonly spentAt: number | null
}

export type ApprovalState = 'waiting' | 'granted' | 'spent' | 'expired'

export const approvalState = ({ expires, grantedAt, spentAt }: Approval, now: number): ApprovalState =>
  spentAt !== null ? 'spent' : expires <= now ? 'expired' : grantedAt !== null ? 'granted' : 'waiting'
