import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import type { Caller } from '../access/caller.ts'
import { isAttestationDue } from '../attestation/due.ts'
import { inStage, isForward, type Campaign, type Target } from '../campaigns/campaign.ts'
import { hasIdentity, isMeasured, type EnrolledDevice, type GroupPolicy, type IdentifiedDevice } from '../fleet/device.ts'
import { desiredEpochs, differences, type Desired, type Difference, type Reported } from '../keys/entitlement.ts'
import { holdingPlace, type Holding } from '../keys/key.ts'
import { ask } from './ask.ts'
import type { Context, OutboxMessage } from './context.ts'
import { activateOf, deliveryOf } from './delivery.ts'
import { duePolicy } from './measured.ts'
import { entitledKeys, policyOf } from './membership.ts'
import { messageTo } from './message.ts'
import { perform, type Transaction } from './perform.ts'
import { findAll } from './rows.ts'
import { inTurn } from './turn.ts'

/** A device's record takes its time of last contact at most this often. */
const seenEvery = 60_000
const maxMessage = 64 << 10

/** What one device should hold, and the rotations that it takes part in. */
interface Standing {
  readonly desired: readonly Desired[]
  readonly rotations: ReadonlyMap<KeyId, { readonly campaign: Campaign; readonly target: Target | undefined }>
}

const runningStates = ['installing', 'activating', 'retiring', 'paused', 'halted'] as const

/** The rotation of a key that is not finished, if there is one; the newest of several. */
export const runningCampaign = async (ctx: Context, key: KeyId): Promise<Campaign | undefined> => {
  const found = await Promise.all(runningStates.map((state) => findAll(ctx.store, 'campaign', { where: { key, state } })))
  return found.flat().toSorted((one, other) => other.to - one.to)[0]
}

const standingOf = async (ctx: Context, device: EnrolledDevice): Promise<Standing> => {
  const rotations = new Map<KeyId, { campaign: Campaign; target: Target | undefined }>()
  const desired = await Promise.all(
    (await entitledKeys(ctx, device)).map(async (id): Promise<Desired[]> => {
      const [key, epochs, campaign] = await Promise.all([
        ctx.store.get('key', id),
        findAll(ctx.store, 'epoch', { where: { key: id } }),
        runningCampaign(ctx, id),
      ])
      if (key === undefined) return []
      const target = campaign === undefined ? undefined : await ctx.store.get('target', `${campaign.id}/${device.id}`)
      if (campaign !== undefined) rotations.set(id, { campaign, target })
      const next = campaign?.state === 'installing' && target !== undefined && target.wave <= campaign.wave
      return [desiredEpochs(key, epochs, next, ctx.now())]
    }),
  )
  return { desired: desired.flat(), rotations }
}

/** Compares what the device says it holds with what it should, and sends the difference. */
export const converge = async (ctx: Context, device: DeviceId, report: BodyOf<'report'>): Promise<void> => {
  const reported = report.holdings.flatMap(({ key, epochs }) => epochs.map(({ epoch, stage }): Reported => ({ key, epoch, stage })))
  await settle(ctx, device, { kind: 'device', id: device, from: 'report' }, { reported, report })
}

/** The same from what the server has recorded: something changed on this side while the device is connected. */
export const convergeDevice = async (ctx: Context, device: DeviceId): Promise<void> =>
  await settle(ctx, device, { kind: 'system', id: 'converge', from: 'server' }, null)

const settle = async (
  ctx: Context,
  id: DeviceId,
  caller: Caller,
  told: { readonly reported: readonly Reported[]; readonly report: BodyOf<'report'> } | null,
): Promise<void> => {
  const send = await inTurn(ctx.store, `device/${id}`, async () => {
    const device = await ctx.store.get('device', id)
    if (!hasIdentity(device)) return []
    const policy = await policyOf(ctx, id)
    const seen = told !== null && ctx.now() - device.lastSeenAt >= seenEvery
    const lacking = device.state === 'enrolled' && (await outstanding(ctx, device, told?.reported ?? null)).found.length > 0
    const release = lacking && !(await withheld(ctx, device, policy))
    // Keys are waiting for it: it is asked now, not at its next report.
    if (lacking && !release) await ask(ctx, id)
    if (!seen && !release) return []
    const messages = await perform(ctx, { caller, action: release ? 'key.deliver' : 'device.report', subject: id }, async (tx) => {
      const now = await ctx.store.get('device', id)
      if (!hasIdentity(now)) return []
      if (seen) tx.update('device', { ...now, lastSeenAt: ctx.now(), agent: told.report.agent })
      return release && now.state === 'enrolled' && !(await withheld(ctx, now, policy)) ? await record(ctx, tx, now, told?.reported ?? null) : []
    })
    // A crash here: the messages stand in the outbox; the device reports when it reconnects and gets them then.
    ctx.step('deliver.recorded')
    return messages
  })
  for (const message of send) await ctx.bus.send(id, message)
}

/** Whether keys wait until the device has attested. */
const withheld = async (ctx: Context, device: IdentifiedDevice, policy: GroupPolicy): Promise<boolean> => {
  const due = isAttestationDue({ ...device, quotes: isMeasured(device) }, await duePolicy(ctx, device, policy), null, ctx.now())
  return due.due && due.withholds
}

const outstanding = async (
  ctx: Context,
  device: EnrolledDevice,
  reported: readonly Reported[] | null,
): Promise<{ standing: Standing; holdings: readonly Holding[]; found: readonly Difference[] }> => {
  const [standing, holdings] = await Promise.all([standingOf(ctx, device), findAll(ctx.store, 'holding', { where: { device: device.id } })])
  return { standing, holdings, found: differences(standing.desired, holdings, reported) }
}

/** Collects holdings, stages and outgoing messages of one device; the messages, to be sent once that is durable. */
const record = async (ctx: Context, tx: Transaction, device: EnrolledDevice, reported: readonly Reported[] | null): Promise<readonly Uint8Array[]> => {
  const { standing, holdings, found } = await outstanding(ctx, device, reported)
  const outbox = new Map((await findAll(ctx.store, 'outbox', { where: { device: device.id } })).map((row) => [row.subject, row]))
  const messages: Uint8Array[] = []
  for (const difference of found) {
    const rotation = standing.rotations.get(difference.do === 'retire' ? difference.key : difference.key.id)
    const body = recordOne(ctx, tx, device, difference, holdings, rotation)
    const subject = subjectOf(difference)
    const waiting = outbox.get(subject)
    const bytes = waiting !== undefined && says(waiting, body) ? waiting.bytes : await messageTo(ctx, ctx.authority.roles.delivery, device.id, body())
    if (waiting === undefined) tx.insert('outbox', { id: `${device.id}/${subject}`, device: device.id, subject, bytes, createdAt: ctx.now() })
    else if (waiting.bytes !== bytes) tx.update('outbox', { ...waiting, bytes, createdAt: ctx.now() })
    tx.note(describe(difference, holdings, reported))
    messages.push(bytes)
  }
  return messages
}

type Sent = BodyOf<'delivery'> | BodyOf<'activate'> | BodyOf<'retire'>
/** What a message would say without making it: wrapping is the dear part, and a waiting message that says the same is sent again as it is. */
interface Draft {
  (): Sent
  readonly same: (other: Sent) => boolean
}

const draft = (same: Draft['same'], make: () => Sent): Draft => Object.assign(make, { same })

const recordOne = (
  ctx: Context,
  tx: Transaction,
  device: EnrolledDevice,
  difference: Difference,
  holdings: readonly Holding[],
  rotation: { readonly campaign: Campaign; readonly target: Target | undefined } | undefined,
): Draft => {
  const campaign = rotation?.campaign.id ?? null
  if (difference.do === 'retire') {
    const { key, below } = difference
    return draft(
      (other) => other.type === 'retire' && other.below === below,
      () => ({ type: 'retire', key, below, campaign, nonce: ctx.random(16) }),
    )
  }
  if (difference.do === 'activate') {
    const { holding } = difference
    return draft(
      (other) => other.type === 'activate' && other.epoch === holding.epoch,
      () => activateOf(holding, campaign),
    )
  }
  const { key, epoch, as } = difference
  const held = holdings.find((one) => one.key === key.id && one.epoch === epoch.epoch)
  const nonce = held?.nonce ?? ctx.random(16)
  if (held === undefined)
    tx.insert('holding', {
      id: `${device.id}/${key.id}/${epoch.epoch}`,
      device: device.id,
      key: key.id,
      epoch: epoch.epoch,
      stage: 'delivered',
      place: holdingPlace(key.id, epoch.epoch, 'delivered'),
      nonce,
      deliveredAt: ctx.now(),
      installedAt: null,
      activeAt: null,
      retiredAt: null,
      reason: null,
    })
  const target = rotation?.target
  if (target !== undefined && rotation?.campaign.to === epoch.epoch && isForward(target.stage, 'delivered'))
    tx.update('target', inStage(target, 'delivered', ctx.now()))
  return draft(
    (other) => other.type === 'delivery' && other.activate === (as === 'active') && other.readOnly === (as === 'readable') && same(other.nonce, nonce),
    () => deliveryOf(ctx, device, { key, epoch, as, nonce, campaign }),
  )
}

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

const says = (waiting: OutboxMessage, body: Draft): boolean => body.same(readMessage(waiting.bytes, { max: maxMessage }).envelope.body as Sent)

/** One waiting message per subject: a newer one replaces it. */
const subjectOf = (difference: Difference): string => {
  switch (difference.do) {
    case 'deliver':
      return `delivery/${difference.key.id}/${difference.epoch.epoch}`
    case 'activate':
      return `activate/${difference.key.id}/${difference.holding.epoch}`
    case 'retire':
      return `retire/${difference.key}`
  }
}

/** For the audit entry. A device without an epoch that it has proven was restored from an old copy, or lost its memory: that is said aloud. */
const describe = (difference: Difference, holdings: readonly Holding[], reported: readonly Reported[] | null): string => {
  if (difference.do === 'retire') return `retire ${difference.key} below ${difference.below ?? 'all'}`
  if (difference.do === 'activate') return `activate ${difference.key.id}/${difference.holding.epoch}`
  const { key, epoch, as } = difference
  const proven = holdings.find((one) => one.key === key.id && one.epoch === epoch.epoch)?.stage
  const lost = reported !== null && (proven === 'active' || proven === 'installed')
  return `deliver ${epoch.id} as ${as}${lost ? `; ALARM: the device lost an epoch that it had proven ${proven}` : ''}`
}
