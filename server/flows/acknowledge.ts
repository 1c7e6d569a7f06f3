import { timingSafeEqual } from 'node:crypto'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import { sealedProof, tpmProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import { gaveUp, inStage, isForward, isRunning, type Stage } from '../campaigns/campaign.ts'
import { hasIdentity, isMeasured } from '../fleet/device.ts'
import { isHeld } from '../keys/entitlement.ts'
import { inHoldingStage, type Holding } from '../keys/key.ts'
import { ask } from './ask.ts'
import { broadcastFor, heldByBroadcast } from './broadcast.ts'
import { runningCampaign } from './campaign.ts'
import type { Context } from './context.ts'
import { convergeDevice } from './converge.ts'
import { perform, type Transaction } from './perform.ts'
import { findAll } from './rows.ts'
import { restartPass } from './send-pass.ts'
import { inTurn } from './turn.ts'

type Acknowledgement = BodyOf<'acknowledge'>

const same = (a: Uint8Array, b: Uint8Array): boolean => a.length === b.length && timingSafeEqual(a, b)

/**
 * Takes a device's signed statement of a stage (the caller has verified whose it is). `active` counts only with a proof of use: a MAC under the new key over
 * the nonce that went out with it. Stages only go forward; a repetition changes nothing and writes nothing. Throws Problem: `not-found` for a delivery that
 * was never made, `conflict` for another nonce, `unauthenticated` for a proof that does not verify.
 */
export const acknowledge = async (ctx: Context, device: DeviceId, said: Acknowledgement): Promise<void> => {
  const campaign = await inTurn(ctx.store, `device/${device}`, async () => {
    if (said.stage === 'retired') return await retired(ctx, device, said)
    return await advanced(ctx, device, said)
  })
  if (campaign !== undefined) ctx.wake(campaign)
  const session = ctx.sessions.of(device)
  // An older copy of its disk is in place: the recipient key that it had given since is gone. Under the approvals of now it has another one, or makes it.
  if (said.stage === 'failed' && said.reason === 'wrap.open' && session?.recipient === null) {
    session.recipient = 'wanted'
    const row = await ctx.store.get('device', device)
    if (hasIdentity(row) && isMeasured(row)) await ask(ctx, device)
  }
  // What it failed with is sent again; what it has not answered yet is on its way.
  if (await isBehind(ctx, device, said)) await convergeDevice(ctx, device, { news: said.stage !== 'failed' })
}

/**
 * The rotation has moved on without this device (it was away), or gives it another try to use what it has: what comes next for it is sent now, not at its next report.
 */
const isBehind = async (ctx: Context, device: DeviceId, said: Acknowledgement): Promise<boolean> => {
  if (said.stage === 'retired') return false
  const campaign = await runningCampaign(ctx, said.key)
  if (said.stage === 'failed')
    return campaign?.state === 'activating' && campaign.to === said.epoch && (await ctx.store.get('target', `${campaign.id}/${device}`))?.stage === 'installed'
  return said.stage === 'installed' ? campaign?.state !== 'installing' : campaign === undefined || campaign.state === 'retiring'
}

/** `again`: nothing of what is known changes; a message that asked for it a second time is done with. */
const intentOf = (device: DeviceId, said: Acknowledgement, again = false) =>
  ({
    caller: { kind: 'device', id: device, from: 'acknowledge' },
    action: 'device.acknowledge',
    subject: device,
    detail: `${said.key}/${said.epoch} ${said.stage}${again ? ' again' : ''}${said.reason === null ? '' : `: ${said.reason}`}`,
  }) as const

/** installed, active, failed: about one epoch. The campaign whose next step this may change. */
const advanced = async (ctx: Context, device: DeviceId, said: Acknowledgement): Promise<string | undefined> => {
  const holding = (await ctx.store.get('holding', `${device}/${said.key}/${said.epoch}`)) ?? (await heard(ctx, device, said))
  if (holding === undefined) throw new Problem('not-found', `${said.key}/${said.epoch} was never delivered to ${device}`, { reason: 'acknowledge.unknown' })
  if (!same(holding.nonce, said.nonce)) throw new Problem('conflict', `another nonce for ${holding.id}`, { reason: 'acknowledge.nonce' })
  if (said.stage === 'active') await provenUse(ctx, device, said)
  const stage = said.stage === 'retired' ? 'failed' : said.stage
  const waiting = (await findAll(ctx.store, 'outbox', { where: { device } })).filter(
    ({ subject }) => subject === `delivery/${said.key}/${said.epoch}` || (stage === 'active' && subject === `activate/${said.key}/${said.epoch}`),
  )
  const answered = stage === 'failed' ? [] : waiting
  if (!changes(holding, stage) && answered.length === 0 && !(await isNews(ctx, device, said, holding))) return undefined
  const campaign = await perform(ctx, intentOf(device, said, !changes(holding, stage)), async (tx) => {
    const now = await ctx.store.get('holding', holding.id)
    if (now === undefined) tx.insert('holding', inHoldingStage(holding, stage, ctx.now(), said.reason))
    else if (changes(now, stage)) tx.update('holding', inHoldingStage(now, stage, ctx.now(), said.reason))
    else if (stage === 'failed' && now.stage === 'installed') tx.update('holding', { ...now, reason: said.reason })
    for (const message of answered) tx.remove('outbox', message)
    return await moveTarget(ctx, tx, device, said, stage)
  })
  // A crash here: the statement counts; the device never saw the PUBACK, says it again, and nothing changes.
  ctx.step(`acknowledge.${stage}`)
  return campaign
}

/** A broadcast that reached it although nobody noted that it was connected. */
const heard = async (ctx: Context, device: DeviceId, said: Acknowledgement): Promise<Holding | undefined> => {
  const row = await broadcastFor(ctx, device, said.key, said.epoch)
  return row === undefined ? undefined : heldByBroadcast(ctx, device, row)
}

const rank: Readonly<Record<Holding['stage'], number>> = { delivered: 0, failed: 0, installed: 1, active: 2, retired: 3 }

const changes = (holding: Holding, stage: 'installed' | 'active' | 'failed'): boolean =>
  stage === 'failed' ? holding.stage === 'delivered' : rank[stage] > rank[holding.stage]

/**
 * That it failed is news where a rotation waits for just that, though it may have failed before. Where its applications do not take an epoch that is installed the epoch stays, why it is not
 * in use is noted, and the rotation counts it as failed for now.
 */
const isNews = async (ctx: Context, device: DeviceId, said: Acknowledgement, holding: Holding): Promise<boolean> => {
  if (said.stage !== 'failed') return false
  if (holding.stage === 'installed' && holding.reason !== said.reason) return true
  const campaign = await runningCampaign(ctx, said.key)
  const stage = campaign?.to === said.epoch ? (await ctx.store.get('target', `${campaign.id}/${device}`))?.stage : undefined
  return stage === 'delivered' || (stage === 'installed' && holding.stage === 'installed')
}

/** The proof of use, computed here from our own copy. */
const provenUse = async (ctx: Context, device: DeviceId, said: Acknowledgement): Promise<void> => {
  const [key, epoch] = await Promise.all([ctx.store.get('key', said.key), ctx.store.get('epoch', `${said.key}/${said.epoch}`)])
  if (key === undefined || epoch === undefined) throw new Problem('not-found', `no epoch ${said.key}/${said.epoch}`, { reason: 'acknowledge.unknown' })
  const material = ctx.vault.open(epoch)
  const transcript = useTranscript({ tenant: ctx.tenant, device, key: said.key, epoch: said.epoch, nonce: said.nonce })
  const expected = key.protection === 'sealed' ? sealedProof(material, transcript) : tpmProof(material, transcript)
  material.destroy()
  if (said.proof === null || !same(expected, said.proof))
    throw new Problem('unauthenticated', `the proof of use of ${said.key}/${said.epoch} does not verify`, { reason: 'acknowledge.proof' })
}

/** `below`: which epochs a `retired` is about, null for all of them. */
const moveTarget = async (
  ctx: Context,
  tx: Transaction,
  device: DeviceId,
  said: Acknowledgement,
  stage: Stage,
  below: number | null = null,
): Promise<string | undefined> => {
  const campaign = await runningCampaign(ctx, said.key)
  if (campaign === undefined || (stage !== 'retired' && campaign.to !== said.epoch)) return undefined
  // A device that reconnects erases the old epoch as soon as it has proven the new one, whatever the others have come to: it is not asked again.
  // An erasure of epochs before the one that is replaced says nothing about this rotation.
  if (stage === 'retired' && below !== null && below < campaign.to) return undefined
  const target = await ctx.store.get('target', `${campaign.id}/${device}`)
  if (target === undefined) return undefined
  if (stage === 'failed') {
    if (!['pending', 'delivered', 'installed'].includes(target.stage)) return undefined
    // A campaign that stands still tries nothing.
    const retries = isRunning(campaign.state) ? campaign.policy.retries : 0
    tx.update('target', gaveUp(target, { stage, retries, reason: said.reason, at: ctx.now() }))
    restartPass(ctx, campaign.id)
    return campaign.id
  }
  if (!isForward(target.stage, stage)) return undefined
  tx.update('target', inStage(target, stage, ctx.now(), said.reason))
  return campaign.id
}

/** The device states that it has erased every epoch of a key below what it was told (all of them after its grant was withdrawn). */
const retired = async (ctx: Context, device: DeviceId, said: Acknowledgement): Promise<string | undefined> => {
  const waiting = await ctx.store.get('outbox', `${device}/retire/${said.key}`)
  const asked = waiting === undefined ? undefined : readMessage(waiting.bytes, { max: 64 << 10 }).envelope.body
  if (waiting === undefined || asked?.type !== 'retire') {
    const holding = await ctx.store.get('holding', `${device}/${said.key}/${said.epoch}`)
    // Said before: its answer was lost.
    if (holding?.stage === 'retired') return undefined
    throw new Problem('not-found', `${device} was not asked to retire ${said.key}`, { reason: 'acknowledge.unknown' })
  }
  if (!same(asked.nonce, said.nonce)) throw new Problem('conflict', `another nonce for retiring ${said.key}`, { reason: 'acknowledge.nonce' })
  const campaign = await perform(ctx, intentOf(device, said), async (tx) => {
    tx.remove('outbox', waiting)
    const erased = (await findAll(ctx.store, 'holding', { where: { device } })).filter(
      (holding) => holding.key === said.key && isHeld(holding) && (asked.below === null || holding.epoch < asked.below),
    )
    for (const holding of erased) tx.update('holding', inHoldingStage(holding, 'retired', ctx.now()))
    tx.note(`erased ${erased.map(({ epoch }) => epoch).join(', ') || 'nothing'}`)
    return await moveTarget(ctx, tx, device, said, 'retired', asked.below)
  })
  // A crash here: as after any acknowledgement, the device repeats it and hears nothing new.
  ctx.step('acknowledge.retired')
  return campaign
}
