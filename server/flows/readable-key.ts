import type { KeyId } from '@fleetkey/protocol/ids.ts'
import { topicsRead, type Exposure, type ReadTopic } from '../keys/exposure.ts'
import type { ManagedKey } from '../keys/key.ts'
import type { Context } from './context.ts'
import { findAll } from './rows.ts'

/** A key of a blast radius: which of its epochs could be read, and what was said under them. */
export interface ReadableKey<E> {
  readonly key: KeyId
  readonly protection: ManagedKey['protection']
  /** The newest ones, ascending. */
  readonly epochs: readonly E[]
  /** The latest ones, by topic, then time. */
  readonly topics: readonly ReadTopic[]
  /** How many older epochs and topics are not listed. */
  readonly more: { readonly epochs: number; readonly topics: number }
}

/** Of each key, in one answer. */
const shown = 100

const latest = (topics: readonly ReadTopic[]): readonly ReadTopic[] => {
  if (topics.length <= shown) return topics
  const since = topics.map(({ from }) => from).toSorted((one, other) => other - one)[shown - 1] ?? 0
  return topics.filter(({ from }) => from >= since).slice(0, shown)
}

/** What the ledger says of a key under these epochs of it; undefined when there is no such key. */
export const readableKey = async <E extends Pick<Exposure, 'epoch' | 'usedFrom' | 'usedUntil'>>(
  ctx: Context,
  key: KeyId,
  epochs: readonly E[],
): Promise<ReadableKey<E> | undefined> => {
  const [row, spans] = await Promise.all([ctx.store.get('key', key), findAll(ctx.store, 'span', { where: { by: `key/${key}` } })])
  if (row === undefined) return undefined
  const ascending = epochs.toSorted((one, other) => one.epoch - other.epoch)
  const topics = topicsRead(spans, epochs)
  const listed = { epochs: ascending.slice(-shown), topics: latest(topics) }
  return { key, protection: row.protection, ...listed, more: { epochs: epochs.length - listed.epochs.length, topics: topics.length - listed.topics.length } }
}
