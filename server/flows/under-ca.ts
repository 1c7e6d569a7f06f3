import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { deviceTopic } from '@fleetkey/protocol/topics.ts'
import type { Caller } from '../access/caller.ts'
import { issuerKeyOf } from '../ca/certificate.ts'
import type { Generation, Revocation } from '../ca/rollover.ts'
import type { IdentifiedDevice } from '../fleet/device.ts'
import { exposureOf, type Exposure } from '../keys/exposure.ts'
import type { ManagedKey } from '../keys/key.ts'
import { caCertificates, issuingKey } from './authority.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import { findAll, inChunks } from './rows.ts'
import { keysLostBy } from './suspend.ts'
import { eachDevice } from './trust.ts'

const system: Caller = { kind: 'system', id: 'rollover', from: 'server' }
/** Sessions that are looked at, and commits that are under way, at a time. */
const atOnce = 64
const shown = 20

/**
 * Devices that have a certificate of the CA with this key which had not run out at `since`, in use or replaced meanwhile: whoever has come back with new ones
 * is still among them, so that work which a crash interrupts finds the same devices again.
 */
const eachUnder = async (
  ctx: Context,
  of: { readonly key: string; readonly since: number },
  visit: (device: IdentifiedDevice) => Promise<void>,
): Promise<void> =>
  await eachDevice(ctx, async (device) => {
    const rows = await findAll(ctx.store, 'certificate', { where: { device: device.id } })
    if (rows.some((row) => issuerKeyOf(row) === of.key && row.notAfter > of.since)) await visit(device)
  })

/** Whether the TLS or the LDevID certificate of a device that is connected comes from this CA. */
const restsOn = async (ctx: Context, id: DeviceId, key: string): Promise<boolean> => {
  if (ctx.sessions.of(id)?.from.certificate?.issuer === key) return true
  const device = await ctx.store.get('device', id)
  const ldevid = device !== undefined && 'ldevidSerial' in device ? await ctx.store.get('certificate', device.ldevidSerial) : undefined
  return ldevid !== undefined && issuerKeyOf(ldevid) === key
}

/** Cuts every connection that rests on a CA which counts no more. One that is being admitted meanwhile is found by the clock (flows/sessions.ts). */
export const cutSessionsUnder = async (ctx: Context, key: string, why: string): Promise<void> =>
  void (await inChunks(ctx.sessions.devices(), atOnce, async (id) => {
    if (await restsOn(ctx, id, key)) await ctx.bus.kick(id, why)
  }))

/**
 * Drops what waits to be sent to devices under a CA: whoever proves itself anew is sent the difference to what it reports then. Keys of groups whose policy
 * rotates without whoever is put out of service, ascending.
 */
export const emptyUnder = async (ctx: Context, of: { readonly key: string; readonly since: number }): Promise<readonly KeyId[]> => {
  const keys = new Set<KeyId>()
  await eachUnder(ctx, of, async ({ id }) => {
    for (const key of await keysLostBy(ctx, id)) keys.add(key)
    if ((await findAll(ctx.store, 'outbox', { where: { device: id } })).length === 0) return
    await perform(ctx, { caller: system, action: 'ca.settle', subject: id, detail: `what waited for it is dropped: ${of.key} was revoked` }, async (tx) => {
      for (const message of await findAll(ctx.store, 'outbox', { where: { device: id } })) tx.remove('outbox', message)
    })
    // A crash here: dropped; the next start goes on with the others.
    ctx.step('rollover.dropped')
  })
  return [...keys].toSorted()
}

/** One epoch that devices under a CA could read; what one of them alone could is the least of it. */
export type SharedExposure = Omit<Exposure, 'proof'> & { readonly devices: number }

/** What devices with certificates of one CA could read, and from when to when: what stands behind its signature. */
export interface CaBlastRadius {
  readonly generation: number
  /** Common name and serial (hex) of its certificate. */
  readonly issuing: string
  readonly serial: string
  readonly state: Generation['state']
  readonly revoked: Revocation | null
  /** While its certificates let somebody in; `until` null: they do. */
  readonly from: number
  readonly until: number | null
  /** Devices with certificates of it that are in force by their dates; connected over it; some of them. */
  readonly devices: number
  readonly connected: number
  readonly first: readonly DeviceId[]
  /** Messages that wait to be sent to them. */
  readonly waiting: number
  /** Topics of the broker: both of each device, here those of `first`. */
  readonly topics: readonly string[]
  readonly keys: readonly { readonly key: KeyId; readonly protection: ManagedKey['protection']; readonly epochs: readonly SharedExposure[] }[]
  /** Keys that its revocation rotates, by the policies of their groups. */
  readonly rotated: readonly KeyId[]
}

const later = (one: number | null, other: number | null): number | null => (one === null || other === null ? null : Math.max(one, other))

/** The blast radius of a CA as the ledger has it now. Reads every device: an operator's rare question. */
export const caBlastRadius = async (ctx: Context, { number, state, since, activatedAt, revoked }: Generation): Promise<CaBlastRadius> => {
  const key = issuingKey(number)
  const { issuing } = await caCertificates(ctx, { number })
  const ids: DeviceId[] = []
  const rotated = new Set<KeyId>()
  const epochs = new Map<string, { readonly key: KeyId; readonly exposure: SharedExposure }>()
  let [connected, waiting] = [0, 0]
  await eachUnder(ctx, { key, since: revoked?.at ?? ctx.now() }, async ({ id }) => {
    ids.push(id)
    const [holdings, outbox, lost, online] = await Promise.all([
      findAll(ctx.store, 'holding', { where: { device: id } }),
      findAll(ctx.store, 'outbox', { where: { device: id } }),
      keysLostBy(ctx, id),
      ctx.bus.online(id) ? restsOn(ctx, id, key) : false,
    ])
    if (online) connected++
    waiting += outbox.length
    for (const one of lost) rotated.add(one)
    for (const holding of holdings) {
      const name = `${holding.key}/${holding.epoch}`
      const epoch = await ctx.store.get('epoch', name)
      if (epoch === undefined) continue
      const { proof: _, ...exposure } = exposureOf(holding, epoch)
      const known = epochs.get(name)?.exposure
      const shared: SharedExposure = {
        ...exposure,
        devices: (known?.devices ?? 0) + 1,
        heldFrom: Math.min(exposure.heldFrom, known?.heldFrom ?? Infinity),
        heldUntil: known === undefined ? exposure.heldUntil : later(known.heldUntil, exposure.heldUntil),
      }
      epochs.set(name, { key: holding.key, exposure: shared })
    }
  })
  const names = [...new Set([...epochs.values()].map((one) => one.key))].toSorted()
  const keys = await Promise.all(
    names.map(async (name) => {
      const row = await ctx.store.get('key', name)
      const own = [...epochs.values()].filter((one) => one.key === name).map(({ exposure }) => exposure)
      return row === undefined ? [] : [{ key: name, protection: row.protection, epochs: own.toSorted((one, other) => one.epoch - other.epoch) }]
    }),
  )
  const first = ids.toSorted().slice(0, shown)
  return {
    generation: number,
    issuing: issuing.commonName ?? '',
    serial: issuing.serial,
    state,
    revoked: revoked ?? null,
    // The first CA is active from before there was a rollover to note it.
    from: Math.max(activatedAt ?? 0, issuing.notBefore),
    until: revoked?.at ?? (state === 'retiring' || state === 'retired' ? since : null),
    devices: ids.length,
    connected,
    first,
    waiting,
    topics: first.flatMap((id) => [deviceTopic(id, 'up'), deviceTopic(id, 'down')]),
    keys: keys.flat(),
    rotated: [...rotated].toSorted(),
  }
}
