import type { KeyId } from '@fleetkey/protocol/ids.ts'
import { isUsedUp, rotatesAt } from '../keys/cryptoperiod.ts'
import type { ManagedKey } from '../keys/key.ts'
import { runningCampaign } from './campaign.ts'
import type { Context } from './context.ts'
import { keptOverlaps, maxOverlaps, onlyRetires, startRotation, system } from './rotate.ts'
import { inTurn } from './turn.ts'
import { usedOf } from './usage.ts'

/** Starts a rotation that nobody ordered, unless one is under way: whatever that one comes to, the question is asked again every minute. The campaign. */
const rotateOnce = async (ctx: Context, key: ManagedKey, because: string): Promise<string | undefined> =>
  await inTurn(ctx.store, `rotate/${key.id}`, async () => {
    const [now, running] = await Promise.all([ctx.store.get('key', key.id), runningCampaign(ctx, key.id)])
    if (now?.current !== key.current) return undefined
    // One that only waits for the old epoch's readers is overtaken, as by an operator's order.
    if (running !== undefined && !(await onlyRetires(ctx, running))) return undefined
    if ((await keptOverlaps(ctx, key.id)).length >= maxOverlaps) {
      ctx.log(
        `key ${key.id} is due for rotation (${because}), and ${maxOverlaps} old epochs are kept for devices that have not come back: a person has to decide`,
      )
      return undefined
    }
    return (await startRotation(ctx, system, key.id, { because })).campaign
  })

/** Rotates a key whose epoch in use was used for as long, or for as much, as it may. Asked every minute; harmless to repeat. The campaign. */
export const rotateWhatIsDue = async (ctx: Context, id: KeyId): Promise<string | undefined> => {
  const key = await ctx.store.get('key', id)
  if (key === undefined) return undefined
  const at = rotatesAt(key, await ctx.store.get('epoch', `${id}/${key.current}`))
  if (at !== null && ctx.now() >= at) return await rotateOnce(ctx, key, `originator-usage period of epoch ${key.current} over`)
  if (typeof key.usageLimit !== 'number') return undefined
  const used = await usedOf(ctx, `${id}/${key.current}`)
  return isUsedUp(key, used) ? await rotateOnce(ctx, key, `${used} messages under epoch ${key.current}, limit ${key.usageLimit}`) : undefined
}
