import type { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Holding, KeyEpoch, ManagedKey } from './key.ts'

/** What the server wants a device to hold of one key: `active` is the epoch in use, `readable` older ones, `install` the next one. */
export interface Desired {
  readonly key: ManagedKey
  readonly epochs: readonly { readonly epoch: KeyEpoch; readonly as: 'active' | 'readable' | 'install' }[]
}

/** One thing to send to a device. */
export type Difference =
  | { readonly do: 'deliver'; readonly key: ManagedKey; readonly epoch: KeyEpoch; readonly as: 'active' | 'readable' | 'install' }
  | { readonly do: 'activate'; readonly key: ManagedKey; readonly holding: Holding }
  | { readonly do: 'retire'; readonly key: KeyId; readonly below: Epoch | null }

/** A stage as a device reports it. */
export interface Reported {
  readonly key: string
  readonly epoch: number
  readonly stage: 'installed' | 'active'
}

/** Epochs of a key that a device should hold at `now`. `next`: whether its wave of a running rotation is open; `from`: the lowest epoch that it may read. */
export const desiredEpochs = (key: ManagedKey, epochs: readonly KeyEpoch[], next: boolean, now: number, from = 0): Desired => ({
  key,
  epochs: epochs
    .flatMap((epoch): Desired['epochs'] => {
      if (epoch.material === null || epoch.epoch < from) return []
      if (epoch.epoch === key.current && isInUse(epoch)) return [{ epoch, as: 'active' }]
      if (epoch.state === 'pre-activation' && next) return [{ epoch, as: 'install' }]
      return epoch.state === 'deactivated' && readable(key, epoch, now) ? [{ epoch, as: 'readable' }] : []
    })
    .toSorted((one, other) => one.epoch.epoch - other.epoch.epoch),
})

/** An epoch said to be in other hands is used until its replacement is there: a device is never left without one. Nobody else gets it any more. */
const isInUse = ({ state }: KeyEpoch): boolean => state === 'active' || state === 'compromised'

/**
 * Whether a superseded epoch may still be read: it is in its recipient-usage period (SP 800-57 Part 1, §5.3.4), or devices that have not proven a newer one may still
 * write under it.
 */
export const readable = (key: ManagedKey, epoch: KeyEpoch, now: number): boolean =>
  epoch.overlap === true || (epoch.deactivatedAt !== null && now < epoch.deactivatedAt + key.recipientUsage)

/**
 * What has to be sent so that a device comes to hold what it should. `proven`: its holdings as the server recorded them; `reported`: what the device says,
 * null when it was not asked. Pure; asking twice is harmless, everything sent is idempotent at the device.
 * A statement the server has not seen (a lost acknowledgement) makes it ask again; a report below what was proven makes it deliver again.
 */
export const differences = (desired: readonly Desired[], proven: readonly Holding[], reported: readonly Reported[] | null): readonly Difference[] => [
  ...desired.flatMap((of) => ofKey(of, proven, reported)),
  ...withdrawn(desired, proven, reported),
]

const ofKey = ({ key, epochs }: Desired, proven: readonly Holding[], reported: readonly Reported[] | null): readonly Difference[] => {
  const found: Difference[] = []
  for (const { epoch, as } of epochs) {
    const holding = proven.find((one) => one.key === key.id && one.epoch === epoch.epoch)
    const says = reported?.find((one) => one.key === key.id && one.epoch === epoch.epoch)
    const has = reported === null ? holding?.stage === 'installed' || holding?.stage === 'active' : says !== undefined
    const recorded = holding?.stage === 'installed' || holding?.stage === 'active'
    // A compromised epoch reaches nobody who does not have it: what lacks it waits for the next one.
    if (epoch.state === 'compromised' && !has) continue
    if (holding === undefined || !has || !recorded) found.push({ do: 'deliver', key, epoch, as })
    else if (as === 'active' && (holding.stage !== 'active' || says?.stage === 'installed')) found.push({ do: 'activate', key, holding })
  }
  const lowest = epochs[0]?.epoch.epoch
  const held = heldOf(key.id, proven, reported)
  // Erasing waits until the epoch in use is proven: a device is never left without a usable one.
  const settled = proven.some((one) => one.key === key.id && one.epoch === key.current && one.stage === 'active')
  if (lowest !== undefined && settled && held.some((epoch) => epoch < lowest)) found.push({ do: 'retire', key: key.id, below: lowest })
  return found
}

/** Keys whose grant is gone: every epoch is erased. */
const withdrawn = (desired: readonly Desired[], proven: readonly Holding[], reported: readonly Reported[] | null): readonly Difference[] => {
  const wanted = new Set<string>(desired.map(({ key }) => key.id))
  const held = new Set<string>([...proven.filter((one) => isHeld(one)).map(({ key }) => key), ...(reported ?? []).map(({ key }) => key)])
  return [...held].filter((key) => !wanted.has(key)).map((key): Difference => ({ do: 'retire', key: key as KeyId, below: null }))
}

/** A holding that may still be in the device: delivered counts, since its acknowledgement may be what got lost. */
export const isHeld = ({ stage }: Holding): boolean => stage === 'delivered' || stage === 'installed' || stage === 'active'

const heldOf = (key: string, proven: readonly Holding[], reported: readonly Reported[] | null): readonly number[] => [
  ...proven.filter((one) => one.key === key && isHeld(one)).map(({ epoch }) => epoch),
  ...(reported ?? []).filter((one) => one.key === key).map(({ epoch }) => epoch),
]
