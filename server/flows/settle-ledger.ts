import { encode } from '@fleetkey/protocol/cbor.ts'
import type { Caller } from '../access/caller.ts'
import type { Base, Write } from './context.ts'
import { begun, granting, membership, openSpan } from './ledger.ts'
import { perform } from './perform.ts'
import { inChunks } from './rows.ts'

const settled = 'ledger/kept'
const system: Caller = { kind: 'system', id: 'ledger', from: 'server' }
const pageSize = 500

/** Start-up sweep, once in the life of a store: memberships and grants from before there was a ledger get their spans. */
export const settleLedger = async (ctx: Base): Promise<void> => {
  if ((await ctx.store.get('setting', settled)) !== undefined) return
  for (const table of ['grant', 'member'] as const)
    for (let after: string | undefined; ;) {
      const rows = await ctx.store.find(table, { limit: pageSize, ...(after === undefined ? {} : { after }) })
      after = rows.at(-1)?.id
      const lacking = await inChunks(rows, 100, async (row) => {
        const { of, by } = table === 'member' ? membership(row.id) : granting(row.id)
        return (await openSpan(ctx, of, by)) === undefined ? [await begun(ctx, { table, do: 'insert', row } as Write)] : []
      })
      const spans = lacking.flat().filter((span) => span !== undefined)
      if (spans.length > 0)
        await perform(ctx, { caller: system, action: 'ledger.settle', subject: table, detail: `${spans.length} spans` }, (tx) => {
          for (const span of spans) tx.insert('span', span)
        })
      // A crash here: what has its span is passed over after the restart.
      ctx.step('ledger.page')
      if (rows.length < pageSize) break
    }
  await perform(ctx, { caller: system, action: 'ledger.settle', subject: 'ledger', detail: 'kept from now on' }, (tx) =>
    tx.insert('setting', { id: settled, value: encode({ since: ctx.now() }) }),
  )
  ctx.step('ledger.settled')
}
