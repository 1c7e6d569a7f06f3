import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { inStage } from '../campaigns/campaign.ts'
import type { EnrolledDevice, IdentifiedDevice, VerdictRecord } from '../fleet/device.ts'
import { dropSeats } from './broadcast.ts'
import { runningCampaign, targetsOf } from './campaign.ts'
import type { Context } from './context.ts'
import { keysOf, policyOf } from './membership.ts'
import { owe, settle } from './owed-rotation.ts'
import type { Transaction } from './perform.ts'
import { findAll } from './rows.ts'

/** What has to be done once a quarantine is durable. */
export interface Consequence {
  /** Rotations that go on without the device. */
  readonly campaigns: readonly string[]
  /** Marker of the rotation that its quarantine owes. */
  readonly owed: string | null
}

const nothing: Consequence = { campaigns: [], owed: null }
/** Targets in these stages have something before them that a device without keys cannot do, or are waited for. */
const unfinished: readonly string[] = ['pending', 'delivered', 'installed', 'active', 'failed', 'timed-out']

/**
 * Adds to a commit: this device has no keys coming from now on. Its waiting deliveries go, running rotations drop it with an outcome of its own, and the keys
 * it could read are rotated without it when policy says so. `device`: the row with the version that was read. Carry `Consequence` out after the commit.
 */
export const quarantine = async (ctx: Context, tx: Transaction, device: IdentifiedDevice, verdict: VerdictRecord): Promise<Consequence> => {
  const at = ctx.now()
  const again = device.state === 'quarantined'
  tx.update('device', {
    ...device,
    state: 'quarantined',
    quarantinedAt: again ? device.quarantinedAt : at,
    verdict,
    attestOrderedAt: null,
    lastRefusal: { at, code: 'attestation-failed', reason: verdict.reason.slice(0, 100) },
  })
  tx.note(`${again ? 'stays ' : ''}quarantined: ${verdict.reason}: ${verdict.detail}`.slice(0, 1000))
  if (again) return nothing
  await dropSeats(ctx, tx, device.id)
  // What it was told to erase it still should.
  for (const message of await findAll(ctx.store, 'outbox', { where: { device: device.id } }))
    if (!message.subject.startsWith('retire/')) tx.remove('outbox', message)
  const campaigns = await dropTargets(ctx, tx, device.id, { stage: 'quarantined', why: verdict.reason.slice(0, 200) })
  return { campaigns, owed: await oweRotation(ctx, tx, device, verdict) }
}

/** Adds to a commit: running rotations (of these keys, else of all that it may hold) go on without the device, with this outcome. The campaigns, which are to look again. */
export const dropTargets = async (
  ctx: Context,
  tx: Transaction,
  device: DeviceId,
  as: { readonly stage: 'quarantined' | 'left'; readonly why: string; readonly keys?: readonly KeyId[] },
): Promise<readonly string[]> => {
  const keys = as.keys ?? (await keysOf(ctx, device))
  const dropped = (await targetsOf(ctx, device, keys)).filter(({ target }) => unfinished.includes(target.stage))
  for (const { target } of dropped) tx.update('target', inStage(target, as.stage, ctx.now(), as.why))
  // While targets are written, each page of them and this are in order: the page leaves the device out, or the device is found among them here.
  for (const campaign of await Promise.all(keys.map(async (key) => await runningCampaign(ctx, key))))
    if (campaign?.state === 'preparing') tx.touch('campaign', campaign)
  return dropped.map(({ campaign }) => campaign.id)
}

const oweRotation = async (ctx: Context, tx: Transaction, device: IdentifiedDevice, verdict: VerdictRecord): Promise<string | null> => {
  if (!(await policyOf(ctx, device.id)).rotateOnQuarantine) return null
  const keys = await keysOf(ctx, device.id)
  if (keys.length === 0) return null
  const name = `quarantine/${device.id}/${ctx.now()}`
  owe(tx, name, { keys, because: `device ${device.id} quarantined: ${verdict.reason}`, kick: null })
  return name
}

/** After the commit: rotations look again, owed ones start. Harmless to repeat; a crash in between leaves it to the clock and the start-up sweep. */
export const carryOut = async (ctx: Context, { campaigns, owed }: Consequence): Promise<void> => {
  for (const campaign of campaigns) ctx.wake(campaign)
  if (owed !== null) await settle(ctx, owed)
}

/** The same device without its quarantine. */
export const released = (device: IdentifiedDevice): EnrolledDevice => {
  if (device.state === 'enrolled') return device
  const { quarantinedAt: _, ...rest } = device
  return { ...rest, state: 'enrolled' }
}
