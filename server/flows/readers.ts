import type { DeviceId, Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { exposureOf, type Proof } from '../keys/exposure.ts'
import type { Holding, KeyEpoch } from '../keys/key.ts'
import { common, filterTakes, readingOf, type Span, type Window } from '../keys/span.ts'
import type { Context } from './context.ts'
import { findAll } from './rows.ts'

/** A device that could read what was protected in a window, by one epoch. */
export interface Reader {
  readonly device: DeviceId
  readonly key: KeyId
  readonly epoch: Epoch
  readonly proof: Proof
  /** It held the epoch within the window, or got it later and could read a recording of then. */
  readonly when: 'then' | 'later'
  readonly heldFrom: number
  readonly heldUntil: number | null
}

export interface Page {
  readonly after?: string
  readonly limit: number
}

const places = ['delivered', 'installed', 'active', 'retired', 'failed'] as const
/** Rows that are passed over before a page ends early: bounds every answer. */
const maxPassed = 5_000

/** Which epochs of a key protected something in a window, and when. */
const used = (epoch: KeyEpoch, windows: readonly Window[]): readonly Window[] => {
  if (epoch.activatedAt === null) return []
  const inUse: Window = { from: epoch.activatedAt, until: epoch.deactivatedAt ?? epoch.destroyedAt }
  return windows.map((window) => common(window, inUse)).filter((window) => window !== undefined)
}

/** One page of a key's readers, in order of device, then epoch; the cursor is the id of the last holding that was looked at. */
const readersOfKey = async (ctx: Context, key: string, windows: readonly Window[], page: Page): Promise<{ items: Reader[]; next: string | null }> => {
  const epochs = (await findAll(ctx.store, 'epoch', { where: { key } })).map((epoch) => ({ epoch, windows: used(epoch, windows) }))
  const concerned = new Map<number, (typeof epochs)[number]>(epochs.filter((one) => one.windows.length > 0).map((one) => [one.epoch.epoch, one]))
  const items: Reader[] = []
  let { after } = page
  for (let passed = 0; ;) {
    const limit = Math.max(page.limit - items.length, 50)
    const streams = await Promise.all(
      [...concerned.keys()].flatMap((epoch) =>
        places.map((stage) => ctx.store.find('holding', { where: { place: `${key}/${epoch}/${stage}` }, limit, ...(after === undefined ? {} : { after }) })),
      ),
    )
    // Each stream is whole up to its last row when it was cut: what lies behind the nearest of these waits for the next round.
    const cut = streams.filter((rows) => rows.length === limit).map((rows) => rows.at(-1)?.id ?? '')
    const horizon = cut.toSorted()[0]
    const rows: readonly Holding[] = streams
      .flat()
      .filter(({ id }) => horizon === undefined || id <= horizon)
      .toSorted((one, other) => (one.id < other.id ? -1 : 1))
    for (const holding of rows) {
      after = holding.id
      passed++
      const of = concerned.get(holding.epoch)
      const reading = of === undefined ? undefined : readingOf(holding, of.windows)
      if (of === undefined || reading === undefined) continue
      items.push({
        device: holding.device,
        key: holding.key,
        epoch: holding.epoch,
        proof: exposureOf(holding, of.epoch).proof,
        when: reading.when,
        heldFrom: reading.held.from,
        heldUntil: reading.held.until,
      })
      if (items.length === page.limit) return { items, next: after ?? null }
    }
    if (horizon === undefined) return { items, next: null }
    if (passed >= maxPassed) return { items, next: after ?? null }
  }
}

const wholeWindow = ({ from, until }: Window): Window => {
  if (until !== null && until <= from) throw new Problem('malformed', 'the window ends before it begins', { reason: 'ledger.window' })
  return { from, until }
}

/** Who could read what the key protected in this window: every device that an epoch in use then was ever sent to, before the window ended or after. Throws Problem('not-found'). */
export const keyReaders = async (ctx: Context, key: KeyId, window: Window, page: Page): Promise<{ items: Reader[]; next: string | null }> => {
  if ((await ctx.store.get('key', key)) === undefined) throw new Problem('not-found', `no key ${key}`)
  return await readersOfKey(ctx, key, [wholeWindow(window)], page)
}

/** Spans of every key that protected a topic, by its name or by a filter. */
const spansOfTopic = async (ctx: Context, topic: string): Promise<readonly Span[]> => {
  const [exact, filters] = await Promise.all([
    findAll(ctx.store, 'span', { where: { of: `topic/${topic}` } }),
    findAll(ctx.store, 'span', { where: { of: 'filters' } }),
  ])
  return [...exact, ...filters.filter((span) => filterTakes(span.topic ?? '', topic))]
}

/** The same for a topic: by the keys that protected it in that window, each for as long as it did. The cursor names key and holding. */
export const topicReaders = async (ctx: Context, topic: string, window: Window, page: Page): Promise<{ items: Reader[]; next: string | null }> => {
  const spans = await spansOfTopic(ctx, topic)
  const windows = new Map<string, Window[]>()
  for (const span of spans) {
    const shared = common(span, wholeWindow(window))
    const key = span.by.slice('key/'.length)
    if (shared !== undefined) windows.set(key, [...(windows.get(key) ?? []), shared])
  }
  const [startKey = '', startAt] = page.after === undefined ? [] : [page.after.slice(0, page.after.indexOf(':')), page.after.slice(page.after.indexOf(':') + 1)]
  const keys = [...windows.keys()].filter((key) => key >= startKey).toSorted()
  const items: Reader[] = []
  for (const key of keys) {
    const after = key === startKey && startAt !== '' ? startAt : undefined
    const found = await readersOfKey(ctx, key, windows.get(key) ?? [], { limit: page.limit - items.length, ...(after === undefined ? {} : { after }) })
    items.push(...found.items)
    if (found.next !== null) return { items, next: `${key}:${found.next}` }
    const following = keys[keys.indexOf(key) + 1]
    if (items.length === page.limit && following !== undefined) return { items, next: `${following}:` }
  }
  return { items, next: null }
}
