import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Caller } from '../access/caller.ts'
import { issuerKeyOf } from '../ca/certificate.ts'
import type { Generation, Revocation } from '../ca/rollover.ts'
import type { IdentifiedDevice } from '../fleet/device.ts'
import { caCertificates, issuingKey } from './authority.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import type { Page } from './readers.ts'
import { findAll, inChunks } from './rows.ts'
import { gather, type SharedRadius } from './shared-radius.ts'
import { keysLostBy } from './suspend.ts'
import { eachDevice } from './trust.ts'

const system: Caller = { kind: 'system', id: 'rollover', from: 'server' }
/** Sessions that are looked at, and commits that are under way, at a time. */
const atOnce = 64

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

/** What devices with certificates of one CA could read, and from when to when: what stands behind its signature. `devices`: with certificates of it that are in force by their dates; `connected`: over it. */
export interface CaBlastRadius extends Omit<SharedRadius, 'identity'> {
  readonly generation: number
  /** Common name and serial (hex) of its certificate. */
  readonly issuing: string
  readonly serial: string
  readonly state: Generation['state']
  readonly revoked: Revocation | null
  readonly suspended: NonNullable<Generation['suspended']> | null
  /** While its certificates let somebody in; `until` null: they do. */
  readonly from: number
  readonly until: number | null
  /** Keys that its revocation rotates, by the policies of their groups. */
  readonly rotated: readonly KeyId[]
}

/** The blast radius of a CA as the ledger has it now. Reads every device: an operator's rare question. */
export const caBlastRadius = async (
  ctx: Context,
  { number, state, since, activatedAt, revoked, suspended }: Generation,
  page: Page,
): Promise<CaBlastRadius> => {
  const key = issuingKey(number)
  const { issuing } = await caCertificates(ctx, { number })
  const rotated = new Set<KeyId>()
  const all = gather(ctx)
  await eachUnder(ctx, { key, since: revoked?.at ?? ctx.now() }, async (device) => {
    for (const one of await keysLostBy(ctx, device.id)) rotated.add(one)
    await all.add(device, ctx.bus.online(device.id) && (await restsOn(ctx, device.id, key)))
  })
  // Identities outlive a CA: devices that came back by another one have theirs from then.
  const { identity: _, ...shared } = await all.radius(page)
  return {
    generation: number,
    issuing: issuing.commonName ?? '',
    serial: issuing.serial,
    state,
    revoked: revoked ?? null,
    suspended: suspended ?? null,
    // The first CA is active from before there was a rollover to note it.
    from: Math.max(activatedAt ?? 0, issuing.notBefore),
    until: revoked?.at ?? (state === 'retiring' || state === 'retired' ? since : null),
    ...shared,
    rotated: [...rotated].toSorted(),
  }
}
