import type { DeviceId } from '@fleetkey/protocol/ids.ts'

/** A single-use enrolment token as it is kept: nothing in it leads back to the token. */
export interface EnrolmentToken {
  /** Its public half: 16 bytes in hex. */
  readonly id: string
  readonly version: number
  readonly batch: string
  /** The one device it is for; null: any board of the batch that has no identity. */
  readonly device: DeviceId | null
  /** `tokenVerifier` of its secret half (transcript.ts), encrypted under the KEK. */
  readonly verifier: Uint8Array
  readonly createdAt: number
  readonly createdBy: string
  readonly expiresAt: number
  readonly revokedAt: number | null
  /** Who used it. `key`: hex SHA-256 of the LDevID key's SPKI, which alone may go on with an enrolment that was cut off. */
  readonly spent: { readonly at: number; readonly device: DeviceId; readonly key: string } | null
}

/** Who wants to use a token. */
export interface TokenUse {
  readonly device: DeviceId
  readonly batch: string
  readonly key: string
}

export type TokenFault = 'token.other-batch' | 'token.other-device' | 'token.spent' | 'token.revoked' | 'token.expired'

/** Why this token does not let this device in; undefined when it does. Spent in time by the same device and key, it still counts: the answer was lost. Pure. */
export const tokenFault = ({ batch, device, expiresAt, revokedAt, spent }: EnrolmentToken, use: TokenUse, now: number): TokenFault | undefined => {
  if (batch !== use.batch) return 'token.other-batch'
  if (device !== null && device !== use.device) return 'token.other-device'
  if (spent !== null) return spent.device === use.device && spent.key === use.key ? undefined : 'token.spent'
  if (revokedAt !== null) return 'token.revoked'
  return expiresAt <= now ? 'token.expired' : undefined
}
