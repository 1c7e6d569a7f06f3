import { toProblem } from '@fleetkey/protocol/problem.ts'
import { owedBatch, settleBatch, settleOwedBatches } from './batch-order.ts'
import type { Context } from './context.ts'
import { settleKek } from './kek.ts'
import { owedRotation, settle, settleOwedRotations } from './owed-rotation.ts'
import { owedAppraisal, settleAppraisal, settleOwedAppraisals } from './reappraise.ts'
import { rewrapAll } from './rewrap.ts'
import { findAll } from './rows.ts'
import { settleRollover } from './rollover.ts'
import { settleLedger } from './settle-ledger.ts'

/** Finishes what the last process began and owes: each part is harmless to repeat, and a crash in it leaves the rest to the next start. */
export const settleAll = async (ctx: Context): Promise<void> => {
  await settleLedger(ctx)
  await settleRollover(ctx)
  await settleKek(ctx, rewrapAll)
  await settleOwedAppraisals(ctx)
  await settleOwedBatches(ctx)
  await settleOwedRotations(ctx)
}

/** By the prefix of their markers: what acts owe besides their own commit. */
const debts: Readonly<Record<string, (ctx: Context, name: string) => Promise<unknown>>> = {
  [owedAppraisal]: settleAppraisal,
  [owedBatch]: settleBatch,
  [owedRotation]: settle,
}

/**
 * Pays what acts still owe though their process lives: their commit was durable, and what follows from it failed, on a full disk say. `before`: what was owed when
 * this was last asked; only that is paid, so that whoever has just acted comes first. What is owed now.
 */
export const settleOverdue = async (ctx: Context, before: ReadonlySet<string>): Promise<ReadonlySet<string>> => {
  const owed = new Set<string>()
  for (const [prefix, pay] of Object.entries(debts))
    for (const { id } of await findAll(ctx.store, 'setting', { prefix })) {
      owed.add(id)
      if (before.has(id))
        await pay(ctx, id.slice(prefix.length)).catch((thrown: unknown) => ctx.log(`${id} stays owed: ${toProblem(thrown).message.slice(0, 1000)}`))
    }
  return owed
}
