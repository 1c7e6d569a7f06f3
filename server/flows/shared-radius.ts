import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { deviceTopic } from '@fleetkey/protocol/topics.ts'
import type { Certificate } from '../ca/certificate.ts'
import type { Device, Standing, Station } from '../fleet/device.ts'
import { exposureOf, later, sharedBy, type SharedExposure } from '../keys/exposure.ts'
import type { KeyEpoch } from '../keys/key.ts'
import type { Window } from '../keys/span.ts'
import { identityOf } from './blast-radius.ts'
import { stationCertificates } from './certificates.ts'
import type { Context } from './context.ts'
import { readableKey, type ReadableKey } from './readable-key.ts'
import type { Page } from './readers.ts'
import { eachPage, findAll, inChunks } from './rows.ts'
import { signedBy } from './station.ts'
import { othersFirst } from './turn.ts'

/** What many identities together could read, and from when to when: counts of all, some of the devices by name, and one page of the keys. */
export interface SharedRadius {
  readonly devices: number
  readonly states: Readonly<Record<Device['state'], number>>
  /** From when the first, until when the last of them could connect; null: none ever had an identity. */
  readonly identity: Window | null
  /** Some of them, and how many are connected. */
  readonly first: readonly DeviceId[]
  readonly connected: number
  /** Messages that wait to be sent to them. */
  readonly waiting: number
  /** Topics of the broker: both of each device, here those of `first`. */
  readonly topics: readonly string[]
  /** Of all pages. */
  readonly keyCount: number
  readonly keys: readonly ReadableKey<SharedExposure>[]
  /** Key after which the next page begins. */
  readonly next: string | null
}

export interface Gathering {
  /** Takes one device in, whose session `isConnected` says. In any order, many at a time. */
  add(device: Device, isConnected: boolean): Promise<void>
  /** What all of them could read. */
  radius(page: Page): Promise<SharedRadius>
}

const shown = 20
/** Devices that are read before others have their turn. */
const aTurn = 100

/** Adds up what devices could read, one by one: memory grows with keys and epochs, not with devices. */
export const gather = (ctx: Context): Gathering => {
  const states = { registered: 0, enrolled: 0, quarantined: 0, suspended: 0, revoked: 0 }
  const epochs = new Map<KeyId, Map<number, SharedExposure>>()
  const rows = new Map<string, Promise<KeyEpoch | undefined>>()
  let first: readonly DeviceId[] = []
  let identity: Window | null = null
  let [devices, connected, waiting] = [0, 0, 0]

  const rowOf = async (name: string): Promise<KeyEpoch | undefined> => {
    const row = rows.get(name) ?? ctx.store.get('epoch', name)
    rows.set(name, row)
    return await row
  }

  return {
    async add(device, isConnected) {
      states[device.state]++
      if (++devices % aTurn === 0) await othersFirst()
      const had = identityOf(device)
      // It has never been sent anything.
      if (had === null) return
      identity = identity === null ? had : { from: Math.min(identity.from, had.from), until: later(identity.until, had.until) }
      if (first.length < shown || device.id < (first.at(-1) ?? '')) first = [...first, device.id].toSorted().slice(0, shown)
      if (isConnected) connected++
      const [holdings, outbox] = await Promise.all([
        findAll(ctx.store, 'holding', { where: { device: device.id } }),
        findAll(ctx.store, 'outbox', { where: { device: device.id } }),
      ])
      waiting += outbox.length
      for (const holding of holdings) {
        const row = await rowOf(`${holding.key}/${holding.epoch}`)
        if (row === undefined) continue
        const ofKey = epochs.get(holding.key) ?? new Map<number, SharedExposure>()
        epochs.set(holding.key, ofKey.set(holding.epoch, sharedBy(ofKey.get(holding.epoch), exposureOf(holding, row))))
      }
    },
    async radius({ after = '', limit }) {
      const rest = [...epochs.keys()].filter((key) => key > after).toSorted()
      const page = rest.slice(0, limit)
      const keys = await Promise.all(page.map(async (key) => await readableKey(ctx, key, [...(epochs.get(key)?.values() ?? [])])))
      return {
        devices,
        states,
        identity,
        first,
        connected,
        waiting,
        topics: first.flatMap((id) => [deviceTopic(id, 'up'), deviceTopic(id, 'down')]),
        keyCount: epochs.size,
        keys: keys.filter((key) => key !== undefined),
        next: rest.length > page.length ? (page.at(-1) ?? null) : null,
      }
    },
  }
}

const atOnce = 32

const addBatch = async (ctx: Context, batch: string, to: Gathering): Promise<void> =>
  await eachPage(ctx.store, 'device', { where: { batch } }, async (page) => {
    await inChunks(page, atOnce, async (device) => await to.add(device, ctx.bus.online(device.id)))
  })

export type BatchRadius = SharedRadius & { readonly batch: string; readonly station: string; readonly standing: Standing | null }

/** The blast radius of a batch as the ledger has it now. Reads every device of it: an operator's rare question. Throws Problem('not-found'). */
export const batchRadius = async (ctx: Context, id: string, page: Page): Promise<BatchRadius> => {
  const batch = await ctx.store.get('batch', id)
  if (batch === undefined) throw new Problem('not-found', `no batch ${id}`)
  const all = gather(ctx)
  await addBatch(ctx, id, all)
  return { batch: id, station: batch.station, standing: batch.standing ?? null, ...(await all.radius(page)) }
}

export type StationRadius = SharedRadius & {
  readonly station: string
  readonly revoked: NonNullable<Station['revoked']> | null
  readonly suspended: NonNullable<Station['suspended']> | null
  /** How much it signed; `signedBy` has their names. */
  readonly batches: number
  readonly releases: number
  /** Its own, the newest first. */
  readonly certificates: readonly Certificate[]
}

/** The blast radius of everything that a station signed: of the devices in all of its batches. Throws Problem('not-found'). */
export const stationRadius = async (ctx: Context, id: string, page: Page): Promise<StationRadius> => {
  const [{ batches, releases }, station] = await Promise.all([signedBy(ctx, id), ctx.store.get('station', id)])
  const all = gather(ctx)
  for (const batch of batches) await addBatch(ctx, batch.id, all)
  const { revoked = null, suspended = null } = station ?? {}
  const certificates = station === undefined ? [] : await stationCertificates(ctx, station)
  return { station: id, revoked, suspended, batches: batches.length, releases: releases.length, certificates, ...(await all.radius(page)) }
}
