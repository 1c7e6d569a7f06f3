import type { Caller } from '../access/caller.ts'
import { secondOf, type Certificate } from '../ca/certificate.ts'
import { isDispensable, type Retention } from '../ca/retention.ts'
import { issuingKey } from './authority.ts'
import type { Context, IndexEntry } from './context.ts'
import { kindsOf } from './inventory.ts'
import { perform } from './perform.ts'

const system: Caller = { kind: 'system', id: 'retention', from: 'server' }

/** Certificates of one commit, and commits of one round, which is every minute: 2.9 million a day, and campaigns do not wait long for it. */
const pageSize = 100
const pages = 20

/** Where certificates that may be dispensable lie in the calendar, by CA. What was in force when its CA was revoked lies behind: it is never looked at. */
const spans = async (ctx: Context, retention: number): Promise<readonly { readonly kind: string; readonly from: string; readonly to: string }[]> =>
  (await kindsOf(ctx, { standing: ['superseded'], profile: 'device-tls' })).map((kind) => ({
    kind,
    from: kind,
    to: `${kind}${secondOf(Math.min(ctx.now() - retention, revokedAt(ctx, kind) ?? Infinity))}`,
  }))

/** When the CA of a kind (`superseded/device-tls/issuing-ca/`) was revoked. */
const revokedAt = ({ authority }: Pick<Context, 'authority'>, kind: string): number | undefined =>
  authority.rollover.generations.find(({ number }) => kind.endsWith(`/${issuingKey(number)}/`))?.revoked?.at

const dispensable = async (ctx: Context, kind: string, retention: number, ids: readonly string[]): Promise<readonly Certificate[]> => {
  const rows = await Promise.all(ids.map(async (id) => await ctx.store.get('certificate', id)))
  const of = { retention, now: ctx.now(), caRevokedAt: revokedAt(ctx, kind) }
  return rows.filter((row) => row !== undefined).filter((row) => isDispensable(row, of))
}

/**
 * Removes TLS certificates of devices that were replaced and ended longer ago than they are to be kept, with the intents that they were signed for: so many pages
 * at most, each a commit with its entry in the log, which also has their issuing. How many.
 *
 * Their serials are not remembered. They have 126 random bits: one that comes again in the life of a CA is as unlikely as a guess of its key. Nor are their keys:
 * each was made for one certificate. Identity keys, and whatever was revoked, are refused for good (flows/issue.ts), for their rows stay.
 */
export const removeSuperseded = async (ctx: Context, retention: Retention): Promise<number> => {
  if (retention === null) return 0
  let [removed, left] = [0, pages]
  for (const { kind, from, to } of await spans(ctx, retention))
    for (let after: IndexEntry | undefined; left > 0; left--) {
      const page = await ctx.store.scan('certificate', 'calendar', { from, to, limit: pageSize, ...(after === undefined ? {} : { after }) })
      const ids = page.map(({ id }) => id)
      if ((await dispensable(ctx, kind, retention, ids)).length > 0) {
        removed += await removePage(ctx, { kind, retention, ids })
        // A crash here: this page is gone, with its entry; the next round goes on with the oldest that is left.
        ctx.step('certificates.removed')
      }
      after = page.at(-1)
      if (page.length < pageSize) break
    }
  return removed
}

const removePage = async (ctx: Context, of: { readonly kind: string; readonly retention: number; readonly ids: readonly string[] }): Promise<number> => {
  const [, profile = '', issuer = ''] = of.kind.split('/')
  return await perform(ctx, { caller: system, action: 'certificate.remove', subject: issuer }, async (tx) => {
    const rows = await dispensable(ctx, of.kind, of.retention, of.ids)
    for (const row of rows) {
      tx.remove('certificate', row)
      const intent = await ctx.store.get('intent', row.id)
      if (intent !== undefined) tx.remove('intent', intent)
    }
    const ends = rows.map(({ notAfter }) => notAfter)
    tx.note(`${rows.length} superseded ${profile}, ended ${secondOf(Math.min(...ends))} to ${secondOf(Math.max(...ends))}`)
    return rows.length
  })
}

/** When the first ended of those that are to be removed, milliseconds since 1970; undefined when there is none. */
export const oldestSuperseded = async (ctx: Context, retention: number): Promise<number | undefined> => {
  const ends = await Promise.all(
    (await spans(ctx, retention)).map(async ({ kind, from, to }) => {
      const [first] = await ctx.store.scan('certificate', 'calendar', { from, to, limit: 1 })
      return first === undefined ? [] : [Date.parse(`${first.value.slice(kind.length)}Z`)]
    }),
  )
  const all = ends.flat()
  return all.length === 0 ? undefined : Math.min(...all)
}
