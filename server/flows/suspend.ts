import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { Certificate } from '../ca/certificate.ts'
import { hasIdentity, type AdmissibleDevice, type SuspendedDevice } from '../fleet/device.ts'
import { dropSeats } from './broadcast.ts'
import { endCertificates } from './certificates.ts'
import type { Context } from './context.ts'
import { keysOf } from './membership.ts'
import { owe, settle } from './owed-rotation.ts'
import { callerName, perform, type Transaction } from './perform.ts'
import { dropTargets } from './quarantine.ts'
import { reappraise } from './reappraise.ts'
import { maxReason, needDevice, type Effect } from './revoke.ts'
import { findAll } from './rows.ts'

/** Keys that a device stops to be entitled to when it is out of service, in groups whose policy rotates without whoever leaves. */
export const keysLostBy = async (ctx: Context, device: DeviceId): Promise<readonly KeyId[]> => {
  const members = await findAll(ctx.store, 'member', { where: { device } })
  const groups = await Promise.all(members.map(async ({ group }) => await ctx.store.get('group', group)))
  const rotating = groups.filter((group) => group?.policy.rotateOnLeave === true)
  const grants = await Promise.all(rotating.map(async (group) => await findAll(ctx.store, 'grant', { where: { group: group?.id ?? '' } })))
  return [...new Set(grants.flat().map(({ key }) => key))].toSorted()
}

/** What an order would do to a device: whether there is nothing left to do, and which keys would be rotated. Changes nothing. Throws Problem('not-found'). */
export const previewDeviceOrder = async (ctx: Context, id: DeviceId, order: 'revoke' | 'suspend' | 'reinstate'): Promise<Effect> => {
  const device = await needDevice(ctx, id)
  const { state } = device
  const already = order === 'reinstate' ? state !== 'suspended' : state === 'revoked' || (order === 'suspend' && state === 'suspended')
  const loses = order === 'revoke' || (order === 'suspend' && hasIdentity(device))
  return { already, keys: already || !loses ? [] : await (order === 'revoke' ? keysOf : keysLostBy)(ctx, id), campaigns: [] }
}

/**
 * Adds to a commit: this device is out of service. Its certificates are on hold, what waits for it is dropped, running rotations go on without it; its
 * memberships and what it holds stay on record. The certificates that changed, and the campaigns that are to look again.
 */
export const holdDevice = async (
  ctx: Context,
  tx: Transaction,
  device: AdmissibleDevice,
  of: { readonly by: string; readonly why: string; readonly withBatch: boolean },
): Promise<{ readonly certificates: readonly Certificate[]; readonly campaigns: readonly string[] }> => {
  const { id, version, serial, model, batch, registeredAt, lastRefusal } = device
  const common = { id, version, serial, model, batch, registeredAt, lastRefusal, state: 'suspended' } as const
  tx.update('device', { ...common, suspendedAt: ctx.now(), suspendedBy: of.by, reason: of.why, withBatch: of.withBatch, before: device })
  const certificates = await endCertificates(ctx, tx, id, { to: 'held', why: 'device suspended', code: 'certificateHold' })
  for (const message of await findAll(ctx.store, 'outbox', { where: { device: id } })) tx.remove('outbox', message)
  // Somebody may have it who should not: what it knows of its groups is worth nothing by the time it is back.
  await dropSeats(ctx, tx, id)
  const campaigns = await dropTargets(ctx, tx, id, { stage: 'left', why: 'suspended' })
  tx.note(`${certificates.length} certificates on hold`)
  return { certificates, campaigns }
}

/**
 * Takes a device out of service until it is reinstated: in one commit the device, its certificates and its waiting messages; then its live session is cut, and
 * keys of groups that rotate when somebody leaves are rotated without it. One that was never enrolled cannot enrol meanwhile. Repeated it changes nothing.
 * Throws Problem('conflict') for a revoked one.
 */
export const suspendDevice = async (ctx: Context, caller: Caller, id: DeviceId, why: string): Promise<Effect> => {
  const reason = why.slice(0, maxReason)
  const owed = `suspend/${id}/${ctx.now()}`
  const held = await perform(ctx, { caller, action: 'device.suspend', subject: id, detail: reason }, async (tx) => {
    const device = await needDevice(ctx, id)
    if (device.state === 'revoked') throw new Problem('conflict', `device ${id} is revoked`)
    if (device.state === 'suspended') {
      tx.note('suspended before')
      return undefined
    }
    const keys = hasIdentity(device) ? await keysLostBy(ctx, id) : []
    const done = await holdDevice(ctx, tx, device, { by: callerName(caller), why: reason, withBatch: false })
    owe(tx, owed, { keys, because: `device ${id} suspended`, kick: id })
    tx.note(`keys: ${keys.join(', ') || 'none'}`)
    return { ...done, keys }
  })
  // A crash here: no connection survives it, and none is admitted; the start-up sweep rotates the keys, the clock looks at the campaigns.
  ctx.step('suspend.committed')
  if (held === undefined) return { already: true, keys: [], campaigns: [] }
  ctx.certificatesChanged(held.certificates)
  const campaigns = await settle(ctx, owed)
  for (const campaign of held.campaigns) ctx.wake(campaign)
  return { already: false, keys: held.keys, campaigns }
}

/** Adds to a commit: the device is what it was before. It is to attest anew; its certificates are good again where they have not run out. */
export const releaseDevice = async (ctx: Context, tx: Transaction, device: SuspendedDevice): Promise<readonly Certificate[]> => {
  const { version, lastRefusal, before } = device
  const same = { version, lastRefusal }
  tx.update('device', hasIdentity(before) ? { ...before, ...same, attestOrderedAt: ctx.now() } : { ...before, ...same })
  const certificates = await endCertificates(ctx, tx, device.id, { to: 'valid' })
  tx.note(`${before.state} again, ${certificates.length} certificates off hold`)
  return certificates
}

/**
 * Ends a suspension. What the device missed comes by itself: it connects, reports what it holds, and is sent the difference. Judged at once by what is
 * acceptable now. Repeated it changes nothing. Throws Problem('conflict') for a revoked device, and for one whose batch is suspended.
 */
export const reinstateDevice = async (ctx: Context, caller: Caller, id: DeviceId): Promise<{ readonly already: boolean }> => {
  const certificates = await perform(ctx, { caller, action: 'device.reinstate', subject: id }, async (tx) => {
    const device = await needDevice(ctx, id)
    if (device.state === 'revoked') throw new Problem('conflict', `device ${id} is revoked: that is for good`)
    const batch = await ctx.store.get('batch', device.batch)
    if (batch?.standing !== undefined) throw new Problem('conflict', `batch ${batch.id} of device ${id} is ${batch.standing.state}`)
    if (device.state !== 'suspended') {
      tx.note('not suspended')
      return undefined
    }
    return await releaseDevice(ctx, tx, device)
  })
  // A crash here: it is reinstated and connects; what changed meanwhile is judged with the evidence that it is asked for then.
  ctx.step('reinstate.committed')
  if (certificates === undefined) return { already: true }
  ctx.certificatesChanged(certificates)
  await reappraise(ctx, { devices: [id] }, 'reinstated')
  return { already: false }
}
