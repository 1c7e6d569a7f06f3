import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { fail } from '../attestation/reasons.ts'
import { hasIdentity, type Batch, type Device } from '../fleet/device.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'

/** The earlier of two ends, where null is none. */
export const earlier = (one: number | null, other: number | null): number | null => (one === null || other === null ? (one ?? other) : Math.min(one, other))

export const windowText = (until: number | null): string => (until === null ? 'no claim window' : `to be claimed until ${new Date(until).toISOString()}`)

/**
 * A device that never enrolled may do so within the claim window of its batch: boards that vanished between factory and plant are worth nothing after it. One
 * that has an identity is not touched. Throws Problem('attestation-failed') with reason `manifest.window-closed`.
 */
export const withinWindow = async (ctx: Context, device: Device): Promise<void> => {
  if (hasIdentity(device)) return
  const until = (await ctx.store.get('batch', device.batch))?.claimUntil ?? null
  if (until !== null && ctx.now() >= until) fail('manifest.window-closed', `batch ${device.batch} was ${windowText(until)}`)
}

/** Moves the end of a batch's claim window, either way; null: it has none. Throws Problem('not-found'). */
export const setClaimWindow = async (ctx: Context, caller: Caller, id: string, until: number | null): Promise<Batch> => {
  const changed = await perform(ctx, { caller, action: 'batch.window', subject: id }, async (tx) => {
    const row = await ctx.store.get('batch', id)
    if (row === undefined) throw new Problem('not-found', `no batch ${id}`)
    tx.update('batch', { ...row, claimUntil: until })
    tx.note(`was ${windowText(row.claimUntil ?? null)}, now ${windowText(until)}`)
    return { ...row, claimUntil: until }
  })
  // A crash here: the window is as it was asked for; asking again changes nothing.
  ctx.step('batch.window')
  return changed
}
