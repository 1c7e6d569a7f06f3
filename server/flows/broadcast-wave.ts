import { inStage, isForward, type Campaign, type Stage, type Target } from '../campaigns/campaign.ts'
import type { Caller } from '../access/caller.ts'
import type { Broadcast } from '../keys/broadcast.ts'
import { broadcastFor, broadcastMessage, heldByBroadcast, isListening, publish } from './broadcast.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import { findAll, inChunks } from './rows.ts'

const system: Caller = { kind: 'system', id: 'rotation', from: 'server' }
/** Targets that one commit moves. */
const atOnce = 500

interface Carried {
  readonly target: Target
  readonly row: Broadcast
}

/**
 * Gives connected targets of a rotation their new epoch, or the order to use it, by the messages of their shards; the targets that this does not reach, which are
 * served one by one. On the groups' topics once every wave is open; before that, and where only so many may be at it, the same message goes to each target alone.
 * `published`: rows that stand on their topics already in this round; they are added to.
 */
export const sendBroadcast = async (
  ctx: Context,
  campaign: Campaign,
  targets: readonly Target[],
  of: { readonly stage: Stage; readonly published: Set<string> },
): Promise<readonly Target[]> => {
  const { stage, published } = of
  if ((stage !== 'pending' && stage !== 'installed') || (await findAll(ctx.store, 'broadcast', { prefix: `${campaign.key}/${campaign.to}/` })).length === 0)
    return targets
  const sorted = await inChunks(targets, atOnce, async (target): Promise<Carried | Target> => {
    const row = await broadcastFor(ctx, target.device, campaign.key, campaign.to)
    return row !== undefined && (await isListening(ctx, target.device, row)) ? { target, row } : target
  })
  const carried = sorted.filter((one): one is Carried => 'row' in one)
  if (carried.length === 0) return targets
  if (stage === 'pending') await recordSent(ctx, campaign, carried)
  const message = stage === 'pending' ? 'install' : 'activate'
  const rows = [...new Map(carried.map(({ row }) => [row.id, row])).values()].filter(({ id }) => !published.has(id))
  // An epoch is taken into use everywhere at once, whatever the waves were.
  if (stage === 'installed' || (campaign.wave === campaign.waves - 1 && campaign.policy.concurrency === null)) {
    await publish(ctx, rows, message)
    for (const { id } of rows) published.add(id)
  } else
    await inChunks(carried, 64, async ({ target, row }) => {
      const now = await ctx.store.get('broadcast', row.id)
      if (now !== undefined) await ctx.bus.send(target.device, await broadcastMessage(ctx, now, message))
    })
  return sorted.filter((one): one is Target => !('row' in one))
}

const recordSent = async (ctx: Context, campaign: Campaign, carried: readonly Carried[]): Promise<void> => {
  for (let start = 0; start < carried.length; start += atOnce) {
    const some = carried.slice(start, start + atOnce)
    const intent = { caller: system, action: 'key.broadcast', subject: `${campaign.key}/${campaign.to}`, detail: `to ${some.length} devices` } as const
    await perform(ctx, intent, async (tx) => {
      for (const { target, row } of some) {
        const held = heldByBroadcast(ctx, target.device, row)
        const [now, known] = await Promise.all([ctx.store.get('target', target.id), ctx.store.get('holding', held.id)])
        if (now !== undefined && isForward(now.stage, 'delivered')) tx.update('target', inStage(now, 'delivered', ctx.now()))
        if (known === undefined) tx.insert('holding', held)
        else if (Buffer.compare(known.nonce, held.nonce) !== 0) tx.update('holding', { ...known, nonce: held.nonce })
      }
    })
    // A crash here: recorded and not sent; the devices report when they reconnect, and lack it.
    ctx.step('broadcast.recorded')
  }
}
