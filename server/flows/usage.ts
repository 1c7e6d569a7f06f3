import { createHash } from 'node:crypto'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { DeviceId, Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import { inTurn } from './turn.ts'

/** What an epoch was used for is added up in so many rows, so that a fleet that reports at once does not meet in one. */
const shards = 16

/** More than any device protects in a millisecond: one that claims more cannot have the key rotated again and again. */
const mostPerMillisecond = 1_000

const shardId = (epoch: string, shard: number): string => `usage/${epoch}/${shard}`
const shardOf = (device: DeviceId): number => (createHash('sha256').update(device).digest()[0] ?? 0) % shards

/** Messages protected under an epoch (`<key>/<epoch>`), as its holders have said. */
export const usedOf = async (ctx: Context, epoch: string): Promise<number> => {
  const rows = await Promise.all(Array.from({ length: shards }, async (_, shard) => await ctx.store.get('setting', shardId(epoch, shard))))
  return rows.reduce((total, row) => total + (row === undefined ? 0 : Number(decode(row.value))), 0)
}

/** Adds a device's count to those of the others. False when it says nothing new: a count never falls, what was never delivered is not counted, nor is what cannot be. */
export const countUsage = async (
  ctx: Context,
  device: DeviceId,
  of: { readonly key: KeyId; readonly epoch: Epoch; readonly messages: number },
): Promise<boolean> => {
  const epoch = `${of.key}/${of.epoch}`
  const shard = shardId(epoch, shardOf(device))
  const detail = `${epoch} used ${of.messages} times`
  return await inTurn(ctx.store, shard, async () => {
    const before = await ctx.store.get('holding', `${device}/${epoch}`)
    if (before === undefined) return false
    const messages = Math.min(of.messages, (ctx.now() - before.deliveredAt + 1_000) * mostPerMillisecond)
    if (messages <= (before.used ?? 0)) return false
    await perform(ctx, { caller: { kind: 'device', id: device, from: 'report' }, action: 'device.report', subject: device, detail }, async (tx) => {
      const [holding, row] = await Promise.all([ctx.store.get('holding', before.id), ctx.store.get('setting', shard)])
      if (holding === undefined) return
      const more = Math.max(0, messages - (holding.used ?? 0))
      tx.update('holding', { ...holding, used: Math.max(messages, holding.used ?? 0) })
      if (row === undefined) tx.insert('setting', { id: shard, value: encode(more) })
      else tx.update('setting', { ...row, value: encode(Number(decode(row.value)) + more) })
    })
    // A crash here: it is counted; whether that is too much is asked again every minute.
    ctx.step('usage.counted')
    return true
  })
}
