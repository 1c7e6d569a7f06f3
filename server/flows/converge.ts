import type { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf, Place } from '@fleetkey/protocol/messages.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import { groupTopic } from '@fleetkey/protocol/topics.ts'
import { placeName } from '@fleetkey/protocol/wrap.ts'
import type { Caller } from '../access/caller.ts'
import { isAttestationDue } from '../attestation/due.ts'
import { inStage, isForward, newTarget, type Campaign, type Target } from '../campaigns/campaign.ts'
import { hasIdentity, isMeasured, type EnrolledDevice, type GroupPolicy, type IdentifiedDevice } from '../fleet/device.ts'
import { desiredEpochs, differences, type Desired, type Difference, type Reported } from '../keys/entitlement.ts'
import { holdingPlace, redelivered, type Holding } from '../keys/key.ts'
import type { Broadcast } from '../keys/broadcast.ts'
import { ask } from './ask.ts'
import { broadcastFor, broadcastMessage, labelsMessage, owedPlaces, placesOf, type OwedPlace } from './broadcast.ts'
import { runningCampaign } from './campaign.ts'
import { contactEvery } from './contacts.ts'
import type { Context, OutboxMessage } from './context.ts'
import { activateOf, deliveryOf } from './delivery.ts'
import { duePolicy } from './measured.ts'
import { entitledGroups, entitlementsOf, memberPages, policyOf } from './membership.ts'
import { messageTo } from './message.ts'
import { perform, type Transaction } from './perform.ts'
import { findAll, inChunks } from './rows.ts'
import { inSlots, isTurn } from './slots.ts'
import { inTurn } from './turn.ts'

const maxMessage = 64 << 10

/** What one device should hold, and the rotations that it takes part in. */
interface Standing {
  readonly desired: readonly Desired[]
  readonly rotations: ReadonlyMap<KeyId, { readonly campaign: Campaign; readonly target: Target | undefined }>
}

const standingOf = async (ctx: Context, device: EnrolledDevice): Promise<Standing> => {
  const rotations = new Map<KeyId, { campaign: Campaign; target: Target | undefined }>()
  const desired = await Promise.all(
    (await entitlementsOf(ctx, device)).map(async ({ key: id, from }): Promise<Desired[]> => {
      const [key, epochs, campaign] = await Promise.all([
        ctx.store.get('key', id),
        findAll(ctx.store, 'epoch', { where: { key: id } }),
        runningCampaign(ctx, id),
      ])
      if (key === undefined) return []
      const target = campaign === undefined ? undefined : await ctx.store.get('target', `${campaign.id}/${device.id}`)
      if (campaign !== undefined) rotations.set(id, { campaign, target })
      const next = campaign !== undefined && (await isTurn(ctx, campaign, target))
      return [desiredEpochs(key, epochs, next, ctx.now(), from)]
    }),
  )
  return { desired: desired.flat(), rotations }
}

/** Compares what the device says it holds with what it should, and sends the difference. */
export const converge = async (ctx: Context, device: DeviceId, report: BodyOf<'report'>): Promise<void> => {
  const reported = report.holdings.flatMap(({ key, epochs }) => epochs.map(({ epoch, stage }): Reported => ({ key, epoch, stage })))
  await settle(ctx, device, { kind: 'device', id: device, from: 'report' }, { reported, report })
}

/**
 * The same from what the server has recorded: something changed on this side while the device is connected. `news`: what waits for its answer already is not sent again, or each of
 * several answers would have the rest sent once more, and each of those be answered.
 */
export const convergeDevice = async (ctx: Context, device: DeviceId, { news = false }: { readonly news?: boolean } = {}): Promise<void> =>
  await settle(ctx, device, { kind: 'system', id: 'converge', from: 'server' }, null, news)

/** Devices that are served at a time. */
const atOnce = 32

/** The same for the connected members of these groups, `unless` it says otherwise of one; the others are served when they next report. */
export const convergeMembers = async (
  ctx: Context,
  groups: readonly GroupId[],
  unless: (device: DeviceId) => Promise<boolean> = async () => false,
): Promise<void> => {
  for await (const devices of memberPages(ctx, groups))
    await inChunks(
      devices.filter((device) => ctx.bus.online(device)),
      atOnce,
      async (device) => {
        if (!(await unless(device))) await convergeDevice(ctx, device)
      },
    )
}

const settle = async (
  ctx: Context,
  id: DeviceId,
  caller: Caller,
  told: { readonly reported: readonly Reported[]; readonly report: BodyOf<'report'> } | null,
  news = false,
): Promise<void> => {
  const send = await inTurn(ctx.store, `device/${id}`, async () => {
    const device = await ctx.store.get('device', id)
    if (!hasIdentity(device)) return []
    const policy = await policyOf(ctx, id)
    const isNews = told !== null && (ctx.now() - device.lastSeenAt >= contactEvery || device.agent !== told.report.agent)
    if (isNews) ctx.sessions.hear(id, { at: ctx.now(), agent: told.report.agent })
    const places = await owedTo(ctx, device, told?.report.places ?? null)
    const expected = device.state === 'enrolled' ? await outstanding(ctx, device, told?.reported ?? null) : undefined
    const lacking = places.length > 0 || (expected !== undefined && expected.found.length > 0)
    const release = lacking && !(await withheld(ctx, device, policy))
    // Keys are waiting for it: it is asked now, not at its next report.
    if (lacking && !release) await ask(ctx, id)
    if (!release) return []
    const limited = [...(expected?.standing.rotations.values() ?? [])].map(({ campaign }) => campaign)
    const outgoing = await inSlots(ctx, limited, () =>
      perform(ctx, { caller, action: 'key.deliver', subject: id }, async (tx) => {
        const now = await ctx.store.get('device', id)
        if (!hasIdentity(now)) return []
        if (now.state !== 'enrolled' || (await withheld(ctx, now, policy))) return []
        for (const { place, erase } of places) tx.note(`${erase ? 'erase labels' : 'labels'} ${placeName(place)} generation ${place.generation}`)
        return [...places.map((owed): Outgoing => ({ labels: owed, to: now })), ...(await record(ctx, tx, now, told?.reported ?? null, news))]
      }),
    )
    // A crash here: the messages stand in the outbox; the device reports when it reconnects and gets them then.
    ctx.step('deliver.recorded')
    return outgoing
  })
  for (const one of send) {
    const message = await messageOf(ctx, one)
    if (message !== undefined) await ctx.bus.send(id, message)
  }
}

/** What leaves once it is recorded. Labels, and what many get, are made then: they stand nowhere but in what they are made from. */
type Outgoing =
  | { readonly bytes: Uint8Array }
  | { readonly broadcast: Broadcast; readonly activate: boolean }
  | { readonly labels: OwedPlace; readonly to: EnrolledDevice }

const messageOf = async (ctx: Context, of: Outgoing): Promise<Uint8Array | undefined> => {
  if ('bytes' in of) return of.bytes
  return 'labels' in of ? await labelsMessage(ctx, of.to, of.labels) : await broadcastMessage(ctx, of.broadcast, of.activate ? 'activate' : 'install')
}

/** Where it may hear broadcasts from now on, and what it has to be told about that. */
const owedTo = async (ctx: Context, device: IdentifiedDevice, reported: readonly Place[] | null): Promise<readonly OwedPlace[]> => {
  const groups = device.state === 'enrolled' ? (await entitledGroups(ctx, device)).map(({ group }) => group.id) : []
  const places = await placesOf(ctx, device.id, groups)
  ctx.bus.assign(
    device.id,
    places.map(({ group, shard }) => groupTopic(group, shard)),
  )
  return device.state === 'enrolled' ? owedPlaces(ctx, device.id, places, reported) : []
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

/** Milliseconds after which a device that still reports what a withdrawal was to erase is sent another one. */
const ignoredAfter = 60_000

/** Collects holdings, stages and outgoing messages of one device; the messages, to be sent once that is durable. */
const record = async (
  ctx: Context,
  tx: Transaction,
  device: EnrolledDevice,
  reported: readonly Reported[] | null,
  news: boolean,
): Promise<readonly Outgoing[]> => {
  const { standing, holdings, found } = await outstanding(ctx, device, reported)
  const outbox = new Map((await findAll(ctx.store, 'outbox', { where: { device: device.id } })).map((row) => [row.subject, row]))
  const messages: Outgoing[] = []
  for (const difference of found) {
    const rotation = standing.rotations.get(difference.do === 'retire' ? difference.key : difference.key.id)
    const broadcast = await broadcastOf(ctx, device.id, difference)
    if (broadcast !== undefined && difference.do === 'deliver') {
      const isNews = holdings.every(({ key, epoch, nonce }) => key !== difference.key.id || epoch !== difference.epoch.epoch || !same(nonce, broadcast.nonce))
      if (news && !isNews) continue
      recordDelivery(ctx, tx, device, difference, { holdings, rotation, nonce: broadcast.nonce })
      tx.note(`${describe(difference, holdings, reported)}, as it was broadcast`)
      messages.push({ broadcast, activate: difference.as === 'active' })
      continue
    }
    const body = recordOne(ctx, tx, device, difference, holdings, rotation)
    const subject = subjectOf(difference)
    const waiting = outbox.get(subject)
    // Withdrawn, its word of it lost, and given the key once more by a delivery that came late: it takes the same withdrawal for a repetition, however often it is sent.
    const isIgnored =
      difference.do === 'retire' && difference.below === null && reported !== null && waiting !== undefined && ctx.now() - waiting.createdAt > ignoredAfter
    const isSame = waiting !== undefined && !isIgnored && says(waiting, body)
    if (news && isSame) continue
    const bytes = isSame ? waiting.bytes : await messageTo(ctx, ctx.authority.roles.delivery, device.id, body())
    if (waiting === undefined) tx.insert('outbox', { id: `${device.id}/${subject}`, device: device.id, subject, bytes, createdAt: ctx.now() })
    else if (waiting.bytes !== bytes) tx.update('outbox', { ...waiting, bytes, createdAt: ctx.now() })
    tx.note(describe(difference, holdings, reported))
    messages.push({ bytes })
  }
  return messages
}

/** The message that many got, for what a device is to be sent: to read only, it is sent by itself. */
const broadcastOf = async (ctx: Context, device: DeviceId, difference: Difference): Promise<Broadcast | undefined> =>
  difference.do === 'deliver' && difference.as !== 'readable' && difference.key.protection === 'sealed'
    ? await broadcastFor(ctx, device, difference.key.id, difference.epoch.epoch)
    : undefined

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
  const nonce = recordDelivery(ctx, tx, device, difference, { holdings, rotation, nonce: null })
  return draft(
    (other) => other.type === 'delivery' && other.activate === (as === 'active') && other.readOnly === (as === 'readable') && same(other.nonce, nonce),
    () => deliveryOf(ctx, device, { key, epoch, as, nonce, campaign }),
  )
}

/** Collects that an epoch is on its way, with the nonce that its use is to be proven with: this one, or the one that it has, or a new one. */
const recordDelivery = (
  ctx: Context,
  tx: Transaction,
  device: EnrolledDevice,
  { key, epoch }: Extract<Difference, { do: 'deliver' }>,
  of: {
    readonly holdings: readonly Holding[]
    readonly rotation: { readonly campaign: Campaign; readonly target: Target | undefined } | undefined
    readonly nonce: Uint8Array | null
  },
): Uint8Array => {
  const held = of.holdings.find((one) => one.key === key.id && one.epoch === epoch.epoch)
  const isErased = held?.stage === 'retired'
  const nonce = of.nonce ?? (isErased ? undefined : held?.nonce) ?? ctx.random(16)
  if (isErased) tx.update('holding', redelivered(held, nonce, ctx.now()))
  else if (held !== undefined && !same(held.nonce, nonce)) tx.update('holding', { ...held, nonce })
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
  if (of.rotation?.campaign.to === epoch.epoch) targetIn(ctx, tx, device, of.rotation)
  return nonce
}

/** The device is on its way to the new epoch. One that came to be entitled since is a target of the newest wave, where policy takes it. */
const targetIn = (
  ctx: Context,
  tx: Transaction,
  device: EnrolledDevice,
  { campaign, target }: { readonly campaign: Campaign; readonly target: Target | undefined },
): void => {
  if (target !== undefined) {
    if (isForward(target.stage, 'delivered')) tx.update('target', inStage(target, 'delivered', ctx.now()))
    return
  }
  if (campaign.policy.targets === 'frozen' || campaign.state !== 'installing') return
  tx.insert('target', newTarget({ campaign: campaign.id, device: device.id, wave: campaign.wave, stage: 'delivered' }, ctx.now()))
  tx.update('campaign', { ...campaign, sizes: campaign.sizes.map((size, wave) => (wave === campaign.wave ? size + 1 : size)) })
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
