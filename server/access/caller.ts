import type { DeviceId } from '@fleetkey/protocol/ids.ts'

/** Who asks. An `unidentified` peer is known by the prefix of its address only. */
export type Caller =
  | { readonly kind: 'operator'; readonly id: string; readonly roles: readonly Role[]; readonly from: string }
  | { readonly kind: 'device'; readonly id: DeviceId; readonly from: string }
  | { readonly kind: 'unidentified'; readonly id: string; readonly from: string }
  | { readonly kind: 'system'; readonly id: string; readonly from: 'server' }

export type Role = 'owner' | 'operator' | 'factory' | 'auditor'

/** An operator's token: only its SHA-256 is kept. */
export interface OperatorToken {
  readonly id: string
  readonly version: number
  readonly operator: string
  readonly roles: readonly Role[]
  readonly hash: string
  readonly createdAt: number
  readonly expiresAt: number | null
}
