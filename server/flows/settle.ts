import { settleOwedBatches } from './batch-order.ts'
import type { Context } from './context.ts'
import { settleKek } from './kek.ts'
import { settleOwedRotations } from './owed-rotation.ts'
import { settleOwedAppraisals } from './reappraise.ts'
import { rewrapAll } from './rewrap.ts'
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
