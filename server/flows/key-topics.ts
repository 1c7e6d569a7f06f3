import type { KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { Span } from '../keys/span.ts'
import type { Base, Context } from './context.ts'
import { ended, spanOf } from './ledger.ts'
import { perform } from './perform.ts'
import { findAll } from './rows.ts'

const isFilter = (topic: string): boolean => /[+#]/.test(topic)

/** `+` and `#` stand for whole levels, `#` for the last one (MQTT 3.1.1 §4.7.1). */
const isTopic = (topic: string): boolean =>
  topic.split('/').every((level, at, levels) => level === '+' || (level === '#' && at === levels.length - 1) || !/[+#\p{Cc}]/u.test(level))

/** What the key protects now, by topic. */
export const topicSpans = async (ctx: Base, key: KeyId): Promise<readonly Span[]> =>
  (await findAll(ctx.store, 'span', { where: { by: `key/${key}` } })).filter(({ topic, until }) => topic !== null && until === null)

/** Says which topics (or MQTT filters) applications protect with a key, from now on: what it protected until now stays in the ledger. Throws Problem: `not-found`, `malformed`. */
export const setTopics = async (ctx: Context, caller: Caller, key: KeyId, topics: readonly string[]): Promise<void> => {
  await perform(ctx, { caller, action: 'key.topics', subject: key, detail: topics.join(' ') }, async (tx) => {
    if ((await ctx.store.get('key', key)) === undefined) throw new Problem('not-found', `no key ${key}`)
    const wrong = topics.find((topic) => !isTopic(topic))
    if (wrong !== undefined) throw new Problem('malformed', `no topic: ${JSON.stringify(wrong)}`, { reason: 'key.topic' })
    const open = await topicSpans(ctx, key)
    for (const span of open) if (!topics.includes(span.topic ?? '')) tx.update('span', ended(span, ctx.now()))
    for (const topic of new Set(topics)) {
      if (open.some((span) => span.topic === topic)) continue
      const span = spanOf(ctx, { of: isFilter(topic) ? 'filters' : `topic/${topic}`, by: `key/${key}`, from: ctx.now(), topic })
      // A key may protect several filters: each is a span of its own.
      tx.insert('span', isFilter(topic) ? { ...span, open: `${span.open} ${topic}` } : span)
    }
  })
  // A crash here: what the key protects is recorded as a whole.
  ctx.step('key.topics')
}
