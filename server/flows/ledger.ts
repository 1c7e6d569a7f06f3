import { openOf, sortedTime, type Span } from '../keys/span.ts'
import type { Base, Write } from './context.ts'
import { hex } from './message.ts'
import { inChunks } from './rows.ts'

/** A span that begins. */
export const spanOf = (ctx: Base, of: { of: string; by: string; from: number; lot?: string | null; topic?: string | null }): Span => ({
  id: `${of.of}/${sortedTime(of.from)}/${hex(ctx.random(6))}`,
  version: 0,
  of: of.of,
  by: of.by,
  from: of.from,
  until: null,
  open: openOf(of.of, of.by),
  lot: of.lot ?? null,
  topic: of.topic ?? null,
})

/** The same, over. A clock that was set back makes none that ends before it began. */
export const ended = (span: Span, at: number): Span => ({ ...span, until: Math.max(at, span.from), open: null, lot: null })

/** The span of these two that is not over. */
export const openSpan = async (ctx: Base, of: string, by: string): Promise<Span | undefined> =>
  (await ctx.store.find('span', { where: { open: openOf(of, by) }, limit: 1 }))[0]

/** Both ends of a membership and of a grant, from the id of its row. */
export const membership = (id: string): { of: string; by: string } => {
  const at = id.indexOf('/')
  return { of: `group/${id.slice(0, at)}`, by: `device/${id.slice(at + 1)}` }
}
export const granting = (id: string): { of: string; by: string } => {
  const at = id.indexOf('/')
  return { of: `key/${id.slice(0, at)}`, by: `group/${id.slice(at + 1)}` }
}

/** The span that a new row begins. */
export const begun = async (ctx: Base, write: Write): Promise<Span | undefined> => {
  if (write.do !== 'insert') return undefined
  if (write.table === 'grant') return spanOf(ctx, { ...granting(write.row.id), from: write.row.grantedAt })
  if (write.table !== 'member') return undefined
  const { id, group, device, joinedAt } = write.row
  const batch = (await ctx.store.get('device', device))?.batch
  return spanOf(ctx, { ...membership(id), from: joinedAt, lot: batch === undefined ? null : `${group}/${batch}` })
}

/** What ends with a row: its span, or one that was never begun because the row is older than the ledger. */
const over = async (ctx: Base, write: Write): Promise<Write | undefined> => {
  if (write.do !== 'delete' || (write.table !== 'member' && write.table !== 'grant')) return undefined
  const pair = write.table === 'member' ? membership(write.id) : granting(write.id)
  const open = await openSpan(ctx, pair.of, pair.by)
  if (open !== undefined) return { table: 'span', do: 'update', row: ended(open, ctx.now()) }
  const from = write.table === 'member' ? (await ctx.store.get('member', write.id))?.joinedAt : (await ctx.store.get('grant', write.id))?.grantedAt
  return from === undefined ? undefined : { table: 'span', do: 'insert', row: ended(spanOf(ctx, { ...pair, from }), ctx.now()) }
}

/** Whether a membership or a grant begins or ends with this write. */
export const concernsLedger = ({ table, do: does }: Write): boolean => (table === 'member' || table === 'grant') && does !== 'update'

/** What the ledger has to say of these writes, to be committed with them: the one place where memberships and grants become spans. */
export const ledgerOf = async (ctx: Base, writes: readonly Write[]): Promise<readonly Write[]> => {
  const concerned = writes.filter(concernsLedger)
  const found = await inChunks(concerned, 200, async (write): Promise<Write[]> => {
    const [span, ending] = [await begun(ctx, write), await over(ctx, write)]
    return [...(span === undefined ? [] : [{ table: 'span', do: 'insert', row: span } as const]), ...(ending === undefined ? [] : [ending])]
  })
  return found.flat()
}
