import { toProblem } from '@fleetkey/protocol/problem.ts'
import { owedBatch, settleBatch, settleOwedBatches } from './batch-order.ts'
import type { Release } from '../fleet/device.ts'
import { announceApprovals } from './approvals.ts'
import type { Context } from './context.ts'
import { settleKek } from './kek.ts'
import { owedRotation, settle, settleOwedRotations } from './owed-rotation.ts'
import { owedAppraisal, settleAppraisal, settleOwedAppraisals } from './reappraise.ts'
import { rewrapAll } from './rewrap.ts'
import { findAll } from './rows.ts'
import { settleRollover } from './rollover.ts'
import { settleLedger } from './settle-ledger.ts'
import { settleWithdrawal } from './withdrawal.ts'

/** Finishes what the last process began and owes: each part is harmless to repeat, and a crash in it leaves the rest to the next start. */
export const settleAll = async (ctx: Context): Promise<void> => {
  await settleLedger(ctx)
  await settleRollover(ctx)
  await settleKek(ctx, rewrapAll)
  await settleOwedAppraisals(ctx)
  await settleOwedBatches(ctx)
  await settleOwedRotations(ctx)
}

/** The release that a debt comes from, which its id ends; undefined when it comes from something else. */
const releaseIn = async (ctx: Context, name: string, pattern: RegExp): Promise<Release | undefined> => {
  const id = pattern.exec(name)?.[1]
  return id === undefined ? undefined : await ctx.store.get('release', id)
}

/** By the prefix of their markers: what acts owe besides their own commit. Who is connected stays so: nobody hears by connecting anew what is approved since. */
const debts: Readonly<Record<string, (ctx: Context, name: string) => Promise<unknown>>> = {
  async [owedAppraisal](ctx, name) {
    const imported = await releaseIn(ctx, name, /^release\/(.+)\/imported$/)
    if (imported !== undefined) await announceApprovals(ctx, imported.model)
    await settleAppraisal(ctx, name)
  },
  [owedBatch]: settleBatch,
  async [owedRotation](ctx, name) {
    const withdrawn = await releaseIn(ctx, name, /^withdraw\/(.+)$/)
    await (withdrawn === undefined ? settle(ctx, name) : settleWithdrawal(ctx, withdrawn))
  },
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
