import type { Holding, KeyEpoch } from './key.ts'
import { common, type Span, type Window } from './span.ts'

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

/** One epoch that several devices could read: from when the first, until when the last of them. What one alone has proven is the least of it. */
export type SharedExposure = Omit<Exposure, 'proof'> & { readonly devices: number }

/** Null, not over, is later than any time. */
export const later = (one: number | null, other: number | null): number | null => (one === null || other === null ? null : Math.max(one, other))

/** The same epoch with one more device that could read it. */
export const sharedBy = (known: SharedExposure | undefined, one: Exposure): SharedExposure => {
  const { proof: _, ...exposure } = one
  return {
    ...exposure,
    devices: (known?.devices ?? 0) + 1,
    heldFrom: Math.min(one.heldFrom, known?.heldFrom ?? Infinity),
    heldUntil: known === undefined ? one.heldUntil : later(known.heldUntil, one.heldUntil),
  }
}

/** What was said about a topic, or about all that a filter takes, between two times. */
export interface ReadTopic extends Window {
  readonly topic: string
}

/**
 * Topics (as `key topics` names them) that a key protected under epochs that could be read, and when it did: by topic, then time. `spans`: of the key's topics.
 * Who has an epoch reads what was said under it, also from a recording: it does not matter when it got it.
 */
export const topicsRead = (spans: readonly Span[], epochs: readonly Pick<Exposure, 'usedFrom' | 'usedUntil'>[]): readonly ReadTopic[] => {
  const used = epochs.flatMap(({ usedFrom, usedUntil }) => (usedFrom === null ? [] : [{ from: usedFrom, until: usedUntil }]))
  const read = spans
    .flatMap((span) => used.flatMap((window) => ({ topic: span.topic, ...common(span, window) })))
    .flatMap(({ topic, from, until }) => (topic === null || from === undefined || until === undefined ? [] : [{ topic, from, until }]))
    .toSorted((one, other) => (one.topic === other.topic ? one.from - other.from : one.topic < other.topic ? -1 : 1))
  const whole: ReadTopic[] = []
  for (const one of read) {
    const before = whole.at(-1)
    // One epoch follows the other without a gap: that is one time.
    if (before?.topic === one.topic && (before.until === null || one.from <= before.until))
      whole[whole.length - 1] = { ...before, until: later(before.until, one.until) }
    else whole.push(one)
  }
  return whole
}
