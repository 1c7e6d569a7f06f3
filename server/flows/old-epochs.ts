import type { KeyId } from '@fleetkey/protocol/ids.ts'
import type { Caller } from '../access/caller.ts'
import type { KeyEpoch, ManagedKey } from '../keys/key.ts'
import { moved } from '../keys/states.ts'
import { dropBroadcasts } from './broadcast.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import { findAll } from './rows.ts'

const system: Caller = { kind: 'system', id: 'rotation', from: 'server' }

/** Whether nobody may read it any more. What is compromised is kept for as long as what it protected may have to be read again from the store. */
const isOver = (key: ManagedKey, epoch: KeyEpoch, now: number): boolean => {
  const since = epoch.state === 'deactivated' ? epoch.deactivatedAt : epoch.state === 'compromised' && epoch.epoch !== key.current ? epoch.compromisedAt : null
  return typeof since === 'number' && epoch.overlap !== true && now >= since + key.recipientUsage
}

/**
 * Destroys superseded epochs whose recipient-usage period is over and which no device holds any more (a device that is away keeps its epoch alive until it
 * returns and has proven a newer one, or is revoked).
 */
export const destroyEpochs = async (ctx: Context, key: KeyId): Promise<void> => {
  const row = await ctx.store.get('key', key)
  if (row === undefined) return
  for (const epoch of await findAll(ctx.store, 'epoch', { where: { key } })) {
    if (!isOver(row, epoch, ctx.now())) continue
    const held = await Promise.all(
      (['delivered', 'installed', 'active'] as const).map((stage) => ctx.store.count('holding', { place: `${epoch.id}/${stage}` })),
    )
    if (held.some((count) => count > 0)) continue
    await perform(ctx, { caller: system, action: 'key.destroy', subject: epoch.id, detail: 'recipient usage over, no device holds it' }, async (tx) => {
      const now = await ctx.store.get('epoch', epoch.id)
      if (now === undefined || !isOver(row, now, ctx.now())) return
      tx.update('epoch', moved(now, 'destroyed', ctx.now()))
      await dropBroadcasts(ctx, tx, epoch.id)
    })
    // A crash here: the material is gone from the store.
    ctx.step('key.destroyed')
  }
}
