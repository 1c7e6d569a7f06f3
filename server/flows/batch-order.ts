import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { reasonIn, type RevocationReason } from '@fleetkey/protocol/x509/reasons.ts'
import type { Caller } from '../access/caller.ts'
import type { Batch, Device } from '../fleet/device.ts'
import type { Context, Setting } from './context.ts'
import { keysOf } from './membership.ts'
import { hex } from './message.ts'
import { owe, settle } from './owed-rotation.ts'
import { callerName, perform, type Transaction } from './perform.ts'
import { reappraise } from './reappraise.ts'
import { endDevice, maxReason } from './revoke.ts'
import { findAll, inChunks } from './rows.ts'
import { holdDevice, keysLostBy, releaseDevice } from './suspend.ts'
import { inTurn } from './turn.ts'

export type BatchOrder = 'revoke' | 'suspend' | 'reinstate'

/** What an order does to a batch. */
export interface BatchEffect {
  readonly already: boolean
  /** Devices that it concerns (or concerned). */
  readonly devices: number
  /** Keys that are rotated without them, and the campaigns that do. */
  readonly keys: readonly KeyId[]
  readonly campaigns: readonly string[]
}

/**
 * An order against a batch that is not carried out on every device yet: written with the order, removed when all is done. The batch's own standing bars every
 * device from the first commit on; what is left is the record of each. A crash leaves the marker, and the start-up sweep goes on: devices that are done are
 * passed over, and the keys of those that were done before the crash stand in it.
 */
interface Owed {
  /** Tells this order from every other. */
  readonly mark: string
  readonly order: BatchOrder
  readonly at: number
  readonly by: string
  readonly why: string
  readonly code: RevocationReason
  /** Keys that the devices done so far could hold, and those of the page that is being done. */
  readonly keys: readonly KeyId[]
}

export const owedBatch = 'owed-batch/'
const system: Caller = { kind: 'system', id: 'batch', from: 'server' }
/** Devices that are read at a time, and commits under way: each is of one device with its own audit entry. Bounds memory and every transaction. */
const pageSize = 500
const atOnce = 64

const read = (setting: Setting): Owed => JSON.parse(new TextDecoder().decode(setting.value)) as Owed
const written = (owed: Owed): Uint8Array => new TextEncoder().encode(JSON.stringify(owed))

const needBatch = async (ctx: Context, id: string): Promise<Batch> => {
  const batch = await ctx.store.get('batch', id)
  if (batch === undefined) throw new Problem('not-found', `no batch ${id}`)
  return batch
}

/** Whether an order says something about a device that is still to be done. */
const concerns = (order: BatchOrder, device: Device): boolean => {
  if (device.state === 'revoked') return false
  if (order === 'revoke') return true
  return order === 'suspend' ? device.state !== 'suspended' : device.state === 'suspended' && device.withBatch
}

/** Devices of a batch that an order concerns, page by page: a batch may be larger than memory likes. */
async function* concerned(ctx: Context, id: string, order: BatchOrder): AsyncGenerator<readonly Device[]> {
  for (let after: string | undefined; ;) {
    const page: readonly Device[] = await ctx.store.find('device', { where: { batch: id }, limit: pageSize, ...(after === undefined ? {} : { after }) })
    yield page.filter((device) => concerns(order, device))
    after = page.at(-1)?.id
    if (page.length < pageSize) return
  }
}

const keysOfAll = async (ctx: Context, order: BatchOrder, devices: readonly Device[]): Promise<readonly KeyId[]> => {
  if (order === 'reinstate') return []
  return (await inChunks(devices, atOnce, async ({ id }) => await (order === 'revoke' ? keysOf : keysLostBy)(ctx, id))).flat()
}

const union = (...sets: readonly (readonly KeyId[])[]): readonly KeyId[] => [...new Set(sets.flat())].toSorted()

/** What an order would do: how many devices, which keys. Changes nothing. */
export const previewBatchOrder = async (ctx: Context, id: string, order: BatchOrder): Promise<BatchEffect> => {
  await needBatch(ctx, id)
  let [devices, keys]: [number, readonly KeyId[]] = [0, []]
  for await (const page of concerned(ctx, id, order)) {
    devices += page.length
    keys = union(keys, await keysOfAll(ctx, order, page))
  }
  return { already: devices === 0, devices, keys, campaigns: [] }
}

const standingAfter = (tx: Transaction, batch: Batch, { order, at, by, why, code }: Owed): void => {
  const { standing: _, ...rest } = batch
  if (order === 'reinstate') tx.update('batch', rest)
  else tx.update('batch', { ...rest, standing: { state: order === 'revoke' ? 'revoked' : 'suspended', at, by, reason: why, code } })
}

const isDone = (batch: Batch, order: BatchOrder): boolean =>
  order === 'reinstate' ? batch.standing === undefined : batch.standing?.state === (order === 'revoke' ? 'revoked' : 'suspended')

/**
 * Revokes, suspends or reinstates every device of a batch. The first commit bars (or admits) the whole batch, however large; then every live session is cut,
 * then each device has a commit of its own, then the keys that they could hold are rotated once. Harmless to repeat. Throws Problem('conflict') for a revoked
 * batch that is to be anything else.
 */
export const orderBatch = async (
  ctx: Context,
  caller: Caller,
  id: string,
  of: { readonly order: BatchOrder; readonly why: string; readonly code?: RevocationReason | undefined },
): Promise<BatchEffect> => {
  const { order } = of
  const mark = `${ctx.now()}-${hex(ctx.random(4))}`
  const owed: Owed = { mark, order, at: ctx.now(), by: callerName(caller), why: of.why.slice(0, maxReason), code: of.code ?? reasonIn(of.why), keys: [] }
  const isBegun = await perform(ctx, { caller, action: `batch.${order}`, subject: id, detail: owed.why }, async (tx) => {
    const batch = await needBatch(ctx, id)
    if (batch.standing?.state === 'revoked' && order !== 'revoke') throw new Problem('conflict', `batch ${id} is revoked: that is for good`)
    const waiting = await ctx.store.get('setting', `${owedBatch}${id}`)
    if (isDone(batch, order) && waiting === undefined) {
      tx.note('done before')
      return false
    }
    standingAfter(tx, batch, owed)
    if (waiting === undefined) tx.insert('setting', { id: `${owedBatch}${id}`, value: written(owed) })
    // Keys of devices that an unfinished order has done are not forgotten.
    else tx.update('setting', { ...waiting, value: written({ ...owed, keys: read(waiting).keys }) })
    return true
  })
  // A crash here: no device of the batch is admitted (or, reinstated, each is once its record says so); the start-up sweep does the rest.
  ctx.step('batch.ordered')
  return isBegun ? await settleBatch(ctx, id) : nothing
}

const nothing: BatchEffect = { already: true, devices: 0, keys: [], campaigns: [] }

/** Whoever is connected is cut now, not when its turn comes. */
const cutSessions = async (ctx: Context, batch: string): Promise<void> => {
  await inChunks(ctx.sessions.devices(), atOnce, async (id) => {
    if ((await ctx.store.get('device', id))?.batch === batch) await ctx.bus.kick(id, `batch ${batch}`)
  })
}

/** Carries an order out. Orders against one batch have their turn one after the other, each with what is owed by then. */
export const settleBatch = async (ctx: Context, id: string): Promise<BatchEffect> => {
  // Not in turn: the batch is barred, whatever else is being done about it.
  if ((await ctx.store.get('batch', id))?.standing !== undefined) await cutSessions(ctx, id)
  return await inTurn(ctx.store, `batch/${id}`, async () => {
    const setting = await ctx.store.get('setting', `${owedBatch}${id}`)
    if (setting === undefined) return nothing
    const { order, mark } = read(setting)
    let devices = 0
    for await (const page of concerned(ctx, id, order)) {
      const owed = await noteKeys(ctx, id, mark, await keysOfAll(ctx, order, page))
      // A newer order has taken its place: that one has its turn next.
      if (owed === undefined) return { already: false, devices, keys: [], campaigns: [] }
      await inChunks(page, atOnce, async (device) => await carryOut(ctx, id, device.id, owed))
      if (order === 'reinstate') await reappraise(ctx, { devices: page.map((device) => device.id) }, `batch ${id} reinstated`)
      devices += page.length
    }
    return await finish(ctx, id, { mark, devices })
  })
}

/** Keys that are to be rotated are durable before a device loses the memberships that tell them. The order as it is owed now; undefined when it is another. */
const noteKeys = async (ctx: Context, id: string, mark: string, keys: readonly KeyId[]): Promise<Owed | undefined> => {
  const setting = await ctx.store.get('setting', `${owedBatch}${id}`)
  const owed = setting === undefined ? undefined : read(setting)
  if (owed?.mark !== mark) return undefined
  const all = union(owed.keys, keys)
  if (all.length === owed.keys.length) return owed
  const noted = { ...owed, keys: all }
  await perform(ctx, { caller: system, action: 'batch.settle', subject: id, detail: `keys: ${all.join(', ')}` }, async (tx) => {
    const now = await ctx.store.get('setting', `${owedBatch}${id}`)
    if (now !== undefined && read(now).mark === mark) tx.update('setting', { ...now, value: written(noted) })
  })
  ctx.step('batch.keys')
  return noted
}

const finish = async (ctx: Context, id: string, of: { readonly mark: string; readonly devices: number }): Promise<BatchEffect> => {
  const name = `batch/${id}/${of.mark}`
  const keys = await perform(ctx, { caller: system, action: 'batch.settle', subject: id, detail: `${of.devices} devices` }, async (tx) => {
    const now = await ctx.store.get('setting', `${owedBatch}${id}`)
    const owed = now === undefined ? undefined : read(now)
    if (now === undefined || owed?.mark !== of.mark) return []
    tx.remove('setting', now)
    if (owed.keys.length > 0) owe(tx, name, { keys: owed.keys, because: `batch ${id}: ${owed.order}`, kick: null })
    tx.note(`${owed.order}; keys: ${owed.keys.join(', ') || 'none'}`)
    return owed.keys
  })
  // A crash here: every device is done; the marker of the rotation stands in its place.
  ctx.step('batch.settled')
  return { already: false, devices: of.devices, keys, campaigns: await settle(ctx, name) }
}

const carryOut = async (ctx: Context, batch: string, id: DeviceId, owed: Owed): Promise<void> => {
  const { order, by, why, code } = owed
  const done = await perform(
    ctx,
    { caller: system, action: `device.${order}`, subject: id, detail: `batch ${batch}, ordered by ${by}: ${why}` },
    async (tx) => {
      const device = await ctx.store.get('device', id)
      if (device === undefined || !concerns(order, device)) return { certificates: [] }
      if (order === 'revoke') return await endDevice(ctx, tx, device, { by, why, code })
      if (device.state === 'suspended') return order === 'reinstate' ? { certificates: await releaseDevice(ctx, tx, device) } : { certificates: [] }
      return device.state === 'revoked' ? { certificates: [] } : await holdDevice(ctx, tx, device, { by, why, withBatch: true })
    },
  )
  // A crash here: this device is done, the sweep goes on with the others.
  ctx.step('batch.device')
  ctx.certificatesChanged(done.certificates)
  if (order !== 'reinstate') await ctx.bus.kick(id, `batch ${batch}`)
  if ('campaigns' in done) for (const campaign of done.campaigns) ctx.wake(campaign)
}

/** Start-up sweep: goes on with every order that a crash interrupted. */
export const settleOwedBatches = async (ctx: Context): Promise<void> => {
  for (const { id } of await findAll(ctx.store, 'setting', { prefix: owedBatch })) await settleBatch(ctx, id.slice(owedBatch.length))
}
