import type { Holding, KeyEpoch } from './key.ts'

/** How sure it is that a device held an epoch: it was sent, it said so (signed), it used it (a MAC under the key). */
export type Proof = 'delivered' | 'installed' | 'active'

/** One epoch that a device could read: between which times, and what it was used for. Milliseconds since 1970; null: not over. */
export interface Exposure {
  readonly epoch: number
  readonly state: KeyEpoch['state']
  readonly proof: Proof
  /** From the first delivery until the device stated that it has erased its copy. A thief makes no such statement: a device that was stolen may have kept it. */
  readonly heldFrom: number
  readonly heldUntil: number | null
  /** The span in which others protected something under it: what can be read with it is from then. Null: it was never in use. */
  readonly usedFrom: number | null
  readonly usedUntil: number | null
}

/** What a holding says of an epoch. A copy that failed to open, or was lost with its device, was sent all the same. */
export const exposureOf = (holding: Holding, epoch: KeyEpoch): Exposure => ({
  epoch: epoch.epoch,
  state: epoch.state,
  proof: holding.activeAt !== null ? 'active' : holding.installedAt !== null ? 'installed' : 'delivered',
  heldFrom: holding.deliveredAt,
  heldUntil: holding.retiredAt,
  usedFrom: epoch.activatedAt,
  usedUntil: epoch.deactivatedAt ?? epoch.destroyedAt,
})
