import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { Release } from '../fleet/device.ts'
import { announceApprovals, devicesOf, generationId } from './approvals.ts'
import { ask } from './ask.ts'
import { dropSeats } from './broadcast.ts'
import type { Context } from './context.ts'
import { keysOf } from './membership.ts'
import { owe, settle } from './owed-rotation.ts'
import type { Transaction } from './perform.ts'
import { findAll, inChunks } from './rows.ts'

/** Adds to a commit: nothing is approved for this model any more until it is approved anew, for keys that are made anew. */
const nextGeneration = async (ctx: Context, tx: Transaction, model: string): Promise<void> => {
  const row = await ctx.store.get('setting', generationId(model))
  const generation = (row === undefined ? 1 : Number(decode(row.value))) + 1
  if (row === undefined) tx.insert('setting', { id: generationId(model), value: encode(generation) })
  else tx.update('setting', { ...row, value: encode(generation) })
  tx.note(`firmware generation ${generation} of model ${model}`)
}

/**
 * Adds to the commit that withdraws a release: a new generation, and the rotation of every key that a device of the model could hold, since an approval that was
 * given can be replayed for ever. `settleWithdrawal` pays what is owed.
 */
export const oweWithdrawal = async (ctx: Context, tx: Transaction, release: Pick<Release, 'id' | 'model'>): Promise<void> => {
  await nextGeneration(ctx, tx, release.model)
  // A suspended device has what it had: it may be suspended because somebody else has it.
  const suspended = (await findAll(ctx.store, 'device', { where: { state: 'suspended' } })).filter(({ model }) => model === release.model)
  const devices = [...(await devicesOf(ctx, release.model)), ...suspended]
  const reached = await inChunks(devices, 500, async ({ id }) => await keysOf(ctx, id))
  // What it was approved for, it could also hear of its groups.
  for (const { id } of devices) await dropSeats(ctx, tx, id)
  owe(tx, `withdraw/${release.id}`, { keys: [...new Set(reached.flat())].toSorted(), because: `release ${release.id} withdrawn`, kick: null })
}

/** After the commit: connected devices hear what is approved now and are asked for new recipient keys; then the keys are rotated. Harmless to repeat. */
export const settleWithdrawal = async (ctx: Context, release: Pick<Release, 'id' | 'model'>): Promise<readonly string[]> => {
  await announceApprovals(ctx, release.model, async (device) => void (await ask(ctx, device)))
  return await settle(ctx, `withdraw/${release.id}`)
}
