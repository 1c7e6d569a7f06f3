import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Hello } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { issuerKeyOf, type Certificate } from '../ca/certificate.ts'
import { hasIdentity, type Device, type IdentifiedDevice } from '../fleet/device.ts'
import { firstIssue, isHeld, recoveryStep, type Recovery } from '../fleet/recovery.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'

/**
 * The LDevID certificate on record, in force now. No TLS certificate outlives it, so that whoever connects has both. Throws Problem('expired') when it is over,
 * 'forbidden' when it is not valid: only an enrolment leads on. Null when it comes from a CA that is left behind: a new one for the same key takes its place.
 */
export const ldevidOf = async (ctx: Context, device: IdentifiedDevice): Promise<Certificate | null> => {
  const certificate = await ctx.store.get('certificate', device.ldevidSerial)
  if (certificate !== undefined && isLeftBehind(ctx, certificate)) return null
  if (certificate === undefined || certificate.status !== 'valid')
    throw new Problem('forbidden', `LDevID ${device.ldevidSerial} of ${device.id} is ${certificate?.status ?? 'unknown'}`, { reason: 'ldevid.revoked' })
  if (certificate.notAfter <= ctx.now()) throw new Problem('expired', `LDevID ${certificate.id} of ${device.id} is over`, { reason: 'ldevid.expired' })
  return certificate
}

/**
 * The LDevID certificate that a return keeps. Null for whoever enrols, for a device that has no identity on record, and where its CA is left behind. Throws Problem:
 * `forbidden` for another LDevID key, `expired` when the LDevID is over.
 */
export const keptLdevid = async (ctx: Context, device: Device, hello: Hello, ldevidSpki: Uint8Array) => {
  if (hello.purpose !== 'return' || !hasIdentity(device)) return null
  if (Buffer.compare(device.keys.ldevidSpki, ldevidSpki) !== 0)
    throw new Problem('forbidden', `device ${device.id} returned with another LDevID key: it must enrol`, { reason: 'return.other-ldevid' })
  return await ldevidOf(ctx, device)
}

/** It comes from a CA that devices are renewed away from, or from which nothing is accepted any more. */
const isLeftBehind = ({ authority }: Context, certificate: Certificate): boolean => {
  const issuer = issuerKeyOf(certificate)
  return authority.tainted.has(issuer) || authority.retired.has(issuer)
}

/**
 * What the record says of recoveries after the next certificate. Throws Problem: 'rate-limited' when it has to wait,
 * 'forbidden' when its budget is spent.
 */
export const recoveryOf = (ctx: Context, device: Device): Recovery => {
  const now = ctx.now()
  if (!hasIdentity(device)) return firstIssue(now)
  const step = recoveryStep(device.recovery, ctx.recoveries, now)
  if (step.do === 'go') return step.next
  if (step.do === 'wait')
    throw new Problem('rate-limited', `${device.id}: a recovery whose certificates are never used`, {
      reason: 'recovery.pause',
      retryAfterSeconds: Math.ceil((step.until - now) / 1000),
    })
  throw new Problem('forbidden', `${device.id} has spent its recovery budget: device recover ${device.id}`, { reason: 'recovery.held' })
}

/** Before a challenge: who is held, or has to wait, costs no more than this. A device whose budget is spent is challenged once more: it is held when it has proven itself. */
export const mayAsk = (ctx: Context, device: Device): void => {
  const spent = hasIdentity(device) && device.recovery?.heldAt === null && recoveryStep(device.recovery, ctx.recoveries, ctx.now()).do === 'hold'
  if (!spent) recoveryOf(ctx, device)
}

/**
 * For a device that has proven itself: when its budget is spent, that is put on its record, so that it stays held until a person decides. Whoever only
 * claims to be the device brings nothing about.
 */
export const recoverOrHold = async (ctx: Context, caller: Caller, device: Device): Promise<void> => {
  try {
    recoveryOf(ctx, device)
  } catch (thrown) {
    if (thrown instanceof Problem && thrown.reason === 'recovery.held') await hold(ctx, caller, device.id)
    throw thrown
  }
}

const hold = async (ctx: Context, caller: Caller, id: DeviceId): Promise<void> => {
  const { count, window } = ctx.recoveries
  await perform(ctx, { caller, action: 'device.hold', subject: id, detail: `${count} recoveries within ${window / 86_400_000} days` }, async (tx) => {
    const row = await ctx.store.get('device', id)
    if (hasIdentity(row) && row.recovery?.heldAt === null) tx.update('device', { ...row, recovery: { ...row.recovery, heldAt: ctx.now() } })
  })
  // A crash here: it is held, and is told so when it asks again.
  ctx.step('recovery.held')
}

/** A person lets a device recover again: its budget is whole, whether it was held or not. `held`: it was. Throws Problem: 'not-found', 'conflict' without an identity. */
export const allowRecovery = async (ctx: Context, caller: Caller, id: DeviceId, reason: string): Promise<{ readonly held: boolean }> => {
  const result = await perform(ctx, { caller, action: 'device.recover', subject: id, detail: reason }, async (tx) => {
    const row = await ctx.store.get('device', id)
    if (row === undefined) throw new Problem('not-found', `no device ${id}`)
    if (!hasIdentity(row)) throw new Problem('conflict', `device ${id} is ${row.state}`)
    const { recovery: before, ...rest } = row
    tx.note(`${before?.begun.length ?? 0} recoveries before${isHeld(before) ? ', held' : ''}`)
    tx.update('device', rest)
    return { held: isHeld(before) }
  })
  // A crash here: it may recover; asking again changes nothing.
  ctx.step('recovery.allowed')
  return result
}
