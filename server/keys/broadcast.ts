import type { Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { maxSubsets } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { cover } from '@fleetkey/protocol/subset-difference/cover.ts'
import { slots, type Subset } from '@fleetkey/protocol/subset-difference/tree.ts'
import type { ManagedKey } from './key.ts'

/** Up to 4,096 members of a group that one message reaches. `id` is `<group>/<shard>`. */
export interface Shard {
  readonly id: string
  readonly version: number
  readonly group: GroupId
  readonly shard: number
  /** Of the labels. A new one has a new master, and places for those who are members then. */
  readonly generation: number
  /** Generation master, 32 bytes, as AES-256-GCM cell under the DEK: every label is derived from it. The master before it is kept nowhere. */
  readonly master: Uint8Array
  /** Slots of this generation that were given, in order; never one twice. */
  readonly given: number
  /** When this generation began. */
  readonly openedAt: number
}

/** One epoch of a key, wrapped for the members in one shard. `id` is `<key>/<epoch>/<group>/<shard>`. Whom it is for never changes. */
export interface Broadcast {
  readonly id: string
  readonly version: number
  readonly key: KeyId
  readonly epoch: Epoch
  readonly group: GroupId
  readonly shard: number
  readonly generation: number
  /** What each member's proof of use must cover. */
  readonly nonce: Uint8Array
  readonly wraps: Uint8Array
  /** The signed messages, once they were needed: to install it, to take it into use. */
  readonly install: Uint8Array | null
  readonly activate: Uint8Array | null
  readonly createdAt: number
}

export const broadcastId = (of: { readonly key: string; readonly epoch: number; readonly group: string; readonly shard: number }): string =>
  `${of.key}/${of.epoch}/${of.group}/${of.shard}`

/** How keys reach the members of a group, and how long its labels last. */
export interface GroupDelivery {
  readonly delivery: 'auto' | 'unicast' | 'broadcast'
  /** `auto` broadcasts to groups of so many members or more. */
  readonly broadcastFrom: number
  /** A shard gets labels of a new generation once this share of its slots is lost to members that left. */
  readonly generationShare: number
  /** And after so many seconds. */
  readonly generationLife: number
}

export const defaultDelivery: GroupDelivery = { delivery: 'auto', broadcastFrom: 1_000, generationShare: 0.1, generationLife: 31_536_000 }

/** Whether epochs of a key go to a group by broadcast. A key that lives in TPMs is imported into each of them: there is no broadcast of it. */
export const isBroadcast = (of: GroupDelivery, members: number, { protection }: Pick<ManagedKey, 'protection'>): boolean =>
  protection === 'sealed' && (of.delivery === 'broadcast' || (of.delivery === 'auto' && members >= of.broadcastFrom))

/** Subsets that hold these slots and no other. Ascending or not; undefined when they are too many for one message. */
export const coverOf = (members: readonly number[], given: number): readonly Subset[] | undefined => {
  const isMember = new Uint8Array(given)
  for (const slot of members) isMember[slot] = 1
  const excluded: number[] = []
  for (let slot = 0; slot < given; slot++) if (isMember[slot] === 0) excluded.push(slot)
  const subsets = cover(excluded, given)
  return subsets.length > maxSubsets ? undefined : subsets
}

/** Whether a shard needs labels of a new generation. `members`: slots of those who are to read the next epoch. */
export const isRenewalDue = (shard: Pick<Shard, 'given' | 'openedAt'>, members: readonly number[], of: GroupDelivery, now: number): boolean =>
  shard.given - members.length > of.generationShare * slots || now >= shard.openedAt + of.generationLife * 1_000 || coverOf(members, shard.given) === undefined
