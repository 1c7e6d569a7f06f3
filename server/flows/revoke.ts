import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { hasIdentity, type Device, type RevokedDevice } from '../fleet/device.ts'
import { isHeld } from '../keys/entitlement.ts'
import { inHoldingStage } from '../keys/key.ts'
import type { Context } from './context.ts'
import { keysOf } from './membership.ts'
import { owe, settle } from './owed-rotation.ts'
import { callerName, perform } from './perform.ts'
import { findAll } from './rows.ts'

const revoked = (device: Device, by: string, reason: string, at: number): RevokedDevice => {
  const { id, version, serial, model, batch, registeredAt, lastRefusal } = device
  const keys = hasIdentity(device) ? device.keys : null
  return { id, version, serial, model, batch, registeredAt, lastRefusal, state: 'revoked', revokedAt: at, revokedBy: by, reason, keys }
}

/**
 * Revokes a device for good: in one commit (which may use the store's reserve) the device, its certificates, its waiting messages and its
 * memberships; then its live session is cut and every key it could hold is rotated without it. A device that was never enrolled can be
 * revoked too: it then never will be. The keys of its blast radius and the campaigns that rotate them.
 */
export const revokeDevice = async (
  ctx: Context,
  caller: Caller,
  id: DeviceId,
  reason: string,
): Promise<{ keys: readonly KeyId[]; campaigns: readonly string[] }> => {
  const keys = await perform(ctx, { caller, action: 'device.revoke', subject: id, detail: reason.slice(0, 200) }, async (tx) => {
    const device = await ctx.store.get('device', id)
    if (device === undefined) throw new Problem('not-found', `no device ${id}`)
    if (device.state === 'revoked') throw new Problem('conflict', `device ${id} is revoked already`)
    const [certificates, outbox, members, holdings, keys] = await Promise.all([
      findAll(ctx.store, 'certificate', { where: { device: id } }),
      findAll(ctx.store, 'outbox', { where: { device: id } }),
      findAll(ctx.store, 'member', { where: { device: id } }),
      findAll(ctx.store, 'holding', { where: { device: id } }),
      keysOf(ctx, id),
    ])
    const at = ctx.now()
    tx.update('device', revoked(device, callerName(caller), reason.slice(0, 200), at))
    for (const certificate of certificates)
      if (certificate.status === 'valid') tx.update('certificate', { ...certificate, status: 'revoked', revokedAt: at, reason: 'device revoked' })
    for (const message of outbox) tx.remove('outbox', message)
    for (const member of members) tx.remove('member', member)
    // Its copies count as lost with it: they no longer keep an old epoch from being destroyed.
    for (const holding of holdings) if (isHeld(holding)) tx.update('holding', inHoldingStage(holding, 'failed', at, 'device revoked'))
    owe(tx, `revoke/${id}`, { keys, because: `device ${id} revoked`, kick: id })
    tx.note(`${certificates.length} certificates, keys: ${keys.join(', ') || 'none'}`)
    return keys
  })
  // A crash here: no connection survives it, no certificate is accepted any more; the start-up sweep rotates the keys.
  ctx.step('revoke.committed')
  return { keys, campaigns: await settle(ctx, `revoke/${id}`) }
}
