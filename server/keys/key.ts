import type { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { KeyAlgorithm, Protection } from '@fleetkey/protocol/messages.ts'

/** NIST SP 800-57 Part 1 Rev. 5, §7. */
export type KeyState = 'pre-activation' | 'active' | 'suspended' | 'deactivated' | 'compromised' | 'destroyed'

/** A managed key. Its protection is fixed for good, so that a `sealed` epoch can never stand in for a `tpm` one. */
export interface ManagedKey {
  readonly id: KeyId
  readonly version: number
  readonly algorithm: KeyAlgorithm
  readonly protection: Protection
  readonly createdAt: number
  /** The epoch in use (0: none yet) and the newest one made. `latest` only grows. */
  readonly current: number
  readonly latest: number
  /** Milliseconds that a superseded epoch stays readable after the switch. */
  readonly recipientUsage: number
  /** Milliseconds that an epoch is used to protect before it is rotated (originator-usage period, SP 800-57 Part 1, 5.3.4); null or absent: until somebody rotates it. */
  readonly originatorUsage?: number | null
  /** Most messages that all its holders together may protect under one epoch; null or absent: no limit. */
  readonly usageLimit?: number | null
  /** Its newest campaign: the only one that may be unfinished. */
  readonly campaign?: string
}

/** Key material of one epoch, encrypted at rest. `id` is `<key>/<epoch>`. */
export interface KeyEpoch {
  readonly id: string
  readonly version: number
  readonly key: KeyId
  readonly epoch: Epoch
  readonly state: KeyState
  /** AES-256-GCM cell under the DEK (keys/at-rest.ts); null once destroyed. */
  readonly material: Uint8Array | null
  /** Hex SHA-256 based check value: tells that two openings agree, reveals nothing. */
  readonly checkValue: string
  readonly createdAt: number
  readonly activatedAt: number | null
  readonly deactivatedAt: number | null
  readonly destroyedAt: number | null
  /** When it was said to be in other hands. */
  readonly compromisedAt?: number
  /** The rotation away from it is not over: it stays readable beyond its recipient-usage period, for devices that have not proven a newer one. */
  readonly overlap?: true
}

/** `id` is `<key>/<group>`: members of the group may hold the key. */
export interface Grant {
  readonly id: string
  readonly version: number
  readonly key: KeyId
  readonly group: GroupId
  readonly grantedAt: number
  /** The lowest epoch that it is for; absent: any. */
  readonly from?: number
}

/** What a device has proven it holds. `id` is `<device>/<key>/<epoch>`. Stages only go forward. */
export interface Holding {
  readonly id: string
  readonly version: number
  readonly device: DeviceId
  readonly key: KeyId
  readonly epoch: Epoch
  readonly stage: HoldingStage
  /** `<key>/<epoch>/<stage>`: what counting goes by. */
  readonly place: string
  /** The nonce that the proof of use must cover. */
  readonly nonce: Uint8Array
  readonly deliveredAt: number
  readonly installedAt: number | null
  readonly activeAt: number | null
  readonly retiredAt: number | null
  readonly reason: string | null
  /** When it had this epoch before, oldest first: it was erased, and delivered again since. Absent: never. */
  readonly earlier?: readonly { readonly from: number; readonly until: number | null }[]
  /** Messages that the device says it has protected under it, as it said last. */
  readonly used?: number
}

export type HoldingStage = 'delivered' | 'installed' | 'active' | 'retired' | 'failed'

export const holdingPlace = (key: string, epoch: number, stage: HoldingStage): string => `${key}/${epoch}/${stage}`

/** The holding in another stage, with the time it got there. */
export const inHoldingStage = (holding: Holding, stage: HoldingStage, now: number, reason: string | null = null): Holding => ({
  ...holding,
  stage,
  place: holdingPlace(holding.key, holding.epoch, stage),
  installedAt: stage === 'installed' ? now : holding.installedAt,
  activeAt: stage === 'active' ? now : holding.activeAt,
  retiredAt: stage === 'retired' ? now : holding.retiredAt,
  reason,
})

/** The holding of an epoch that the device erased and is sent again, with another nonce: what it said before counts for nothing. */
export const redelivered = (holding: Holding, nonce: Uint8Array, now: number): Holding => ({
  ...holding,
  stage: 'delivered',
  place: holdingPlace(holding.key, holding.epoch, 'delivered'),
  nonce,
  deliveredAt: now,
  installedAt: null,
  activeAt: null,
  retiredAt: null,
  reason: null,
  earlier: [...(holding.earlier ?? []), { from: holding.deliveredAt, until: holding.retiredAt }],
})

/** A data encryption key wrapped by the KEK that lives in the KMS. */
export interface DataKey {
  readonly id: string
  readonly version: number
  readonly kek: string
  readonly wrapped: Uint8Array
  readonly createdAt: number
}
