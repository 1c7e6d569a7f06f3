import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { Release } from '../fleet/device.ts'
import { acceptanceChanged, oweAcceptance } from './acceptance.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import { preview, type Impact } from './reappraise.ts'
import { oweWithdrawal, settleWithdrawal } from './withdrawal.ts'

const needRelease = async (ctx: Context, id: string): Promise<Release> => {
  const release = await ctx.store.get('release', id)
  if (release === undefined) throw new Problem('not-found', `no release ${id}`)
  if (release.withdrawn !== null) throw new Problem('conflict', `release ${id} was withdrawn before: ${release.withdrawn.reason}`)
  return release
}

/** What withdrawing a release would do to its model's devices. Changes nothing. */
export const previewWithdrawal = async (ctx: Context, id: string): Promise<Impact> => {
  const release = await needRelease(ctx, id)
  return await preview(ctx, { model: release.model }, { release: { ...release, withdrawn: { at: ctx.now(), reason: 'if it were withdrawn' } } })
}

/**
 * Withdraws a release for good: devices that run it are quarantined unless their policy only warns, no key works under it any more, and those that did are rotated.
 * `reason`: at most 200 characters, for operators.
 */
export const withdrawRelease = async (ctx: Context, caller: Caller, id: string, reason: string): Promise<Impact> => {
  const release = await perform(ctx, { caller, action: 'release.withdraw', subject: id, detail: reason.slice(0, 200) }, async (tx) => {
    const row = await needRelease(ctx, id)
    tx.update('release', { ...row, withdrawn: { at: ctx.now(), reason: reason.slice(0, 200) } })
    oweAcceptance(tx, row, 'withdrawn')
    await oweWithdrawal(ctx, tx, row)
    return row
  })
  // A crash here: it is withdrawn; the start-up sweep judges the devices and rotates the keys, and each device gives a new recipient key when it reports.
  ctx.step('release.withdrawn')
  const impact = await acceptanceChanged(ctx, release, 'withdrawn')
  await settleWithdrawal(ctx, release)
  return impact
}
