import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { reasonIn, type RevocationReason } from '@fleetkey/protocol/x509/reasons.ts'
import type { Caller } from '../access/caller.ts'
import type { Certificate } from '../ca/certificate.ts'
import { hasIdentity, type Device, type RevokedDevice } from '../fleet/device.ts'
import { isHeld } from '../keys/entitlement.ts'
import { inHoldingStage } from '../keys/key.ts'
import { touchSeats } from './broadcast.ts'
import { endCertificates } from './certificates.ts'
import type { Context } from './context.ts'
import { keysOf } from './membership.ts'
import { owe, settle } from './owed-rotation.ts'
import { callerName, perform, type Transaction } from './perform.ts'
import { dropTargets } from './quarantine.ts'
import { findAll } from './rows.ts'

/** Who orders it, in whose words, and for which reason of RFC 5280. */
export interface Because {
  readonly by: string
  readonly why: string
  readonly code: RevocationReason
}

/** What an order against one device did. */
export interface Effect {
  /** It had been done before: nothing was changed. */
  readonly already: boolean
  /** Keys of its blast radius that are rotated without it, and the campaigns that do. */
  readonly keys: readonly KeyId[]
  readonly campaigns: readonly string[]
}

export const maxReason = 200

export const needDevice = async (ctx: Context, id: DeviceId): Promise<Device> => {
  const device = await ctx.store.get('device', id)
  if (device === undefined) throw new Problem('not-found', `no device ${id}`)
  return device
}

const revoked = (device: Device, { by, why, code }: Because, at: number): RevokedDevice => {
  const { id, version, serial, model, batch, registeredAt, lastRefusal } = device
  const last = device.state === 'suspended' ? device.before : device
  const [keys, enrolledAt] = hasIdentity(last) ? [last.keys, last.enrolledAt] : [null, null]
  const common = { id, version, serial, model, batch, registeredAt, lastRefusal, state: 'revoked' } as const
  return { ...common, revokedAt: at, revokedBy: by, reason: why, code, keys, enrolledAt }
}

/** Adds to a commit: this device, its certificates, its waiting messages and its memberships end for good. Keys that it could hold, certificates that changed, campaigns that are to look again. */
export const endDevice = async (
  ctx: Context,
  tx: Transaction,
  device: Device,
  because: Because,
): Promise<{ readonly keys: readonly KeyId[]; readonly certificates: readonly Certificate[]; readonly campaigns: readonly string[] }> => {
  const { id } = device
  const [certificates, outbox, members, holdings, keys] = await Promise.all([
    endCertificates(ctx, tx, id, { to: 'revoked', why: 'device revoked', code: because.code }),
    findAll(ctx.store, 'outbox', { where: { device: id } }),
    findAll(ctx.store, 'member', { where: { device: id } }),
    findAll(ctx.store, 'holding', { where: { device: id } }),
    keysOf(ctx, id),
  ])
  const at = ctx.now()
  // Nobody waits for it any more.
  const campaigns = await dropTargets(ctx, tx, id, { stage: 'left', why: 'revoked', keys })
  tx.update('device', revoked(device, because, at))
  for (const message of outbox) tx.remove('outbox', message)
  for (const member of members) tx.remove('member', member)
  await touchSeats(ctx, tx, members)
  // Its copies count as lost with it: they no longer keep an old epoch from being destroyed.
  for (const holding of holdings) if (isHeld(holding)) tx.update('holding', inHoldingStage(holding, 'failed', at, 'device revoked'))
  tx.note(`${because.code}; ${certificates.length} certificates, keys: ${keys.join(', ') || 'none'}`)
  return { keys, certificates, campaigns }
}

/**
 * Revokes a device for good: in one commit (which may use the store's reserve) the device, its certificates, its waiting messages and its
 * memberships; then its live session is cut and every key it could hold is rotated without it. A device that was never enrolled can be
 * revoked too: it then never will be; a suspended one as well. Repeated it changes nothing.
 * `why`: for operators; `code`: what CRL and OCSP say, the one that `why` names unless given.
 */
export const revokeDevice = async (ctx: Context, caller: Caller, id: DeviceId, why: string, code: RevocationReason = reasonIn(why)): Promise<Effect> => {
  const because: Because = { by: callerName(caller), why: why.slice(0, maxReason), code }
  const ended = await perform(ctx, { caller, action: 'device.revoke', subject: id, detail: because.why }, async (tx) => {
    const device = await needDevice(ctx, id)
    if (device.state === 'revoked') {
      tx.note('revoked before')
      return undefined
    }
    const done = await endDevice(ctx, tx, device, because)
    owe(tx, `revoke/${id}`, { keys: done.keys, because: `device ${id} revoked`, kick: id })
    return done
  })
  // A crash here: no connection survives it, no certificate is accepted any more; the start-up sweep rotates the keys.
  ctx.step('revoke.committed')
  if (ended === undefined) return { already: true, keys: [], campaigns: [] }
  ctx.certificatesChanged(ended.certificates)
  return { already: false, keys: ended.keys, campaigns: await settle(ctx, `revoke/${id}`) }
}
