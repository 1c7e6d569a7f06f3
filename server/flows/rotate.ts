import { Epoch, type KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { defaultPolicy, faultOf, inState, type Campaign, type CampaignPolicy } from '../campaigns/campaign.ts'
import type { KeyEpoch, ManagedKey } from '../keys/key.ts'
import { moved } from '../keys/states.ts'
import { addBroadcasts, dropBroadcasts, prepareBroadcasts } from './broadcast.ts'
import { runningCampaign } from './campaign.ts'
import type { Context } from './context.ts'
import { newEpoch } from './create-key.ts'
import { mayBeCut } from './cut.ts'
import { hex } from './message.ts'
import { callerName, perform, type Transaction } from './perform.ts'
import { findAll } from './rows.ts'
import { askIn, campaignPrefix } from './second-person.ts'

export const system: Caller = { kind: 'system', id: 'rotation', from: 'server' }

/** Somebody must not read on: nobody is waited for for long, who is away converges on return, and the old epoch ends when its recipient-usage period does. */
const urgent = { successThreshold: 0, errorThreshold: 1, deadline: 60_000, overlap: 'strict' } as const satisfies PolicyInput

/** Old epochs that are kept for devices that have not come back; a device holds 16 epochs of a key. */
export const maxOverlaps = 12

/** Old epochs of a key that are kept for devices that have not proven a newer one. */
export const keptOverlaps = async (ctx: Context, key: KeyId): Promise<readonly KeyEpoch[]> =>
  (await findAll(ctx.store, 'epoch', { where: { key } })).filter(({ overlap }) => overlap === true)

export type PolicyInput = { readonly [P in keyof CampaignPolicy]?: CampaignPolicy[P] | undefined }

export interface RotationOrder {
  readonly policy?: PolicyInput
  readonly because: string
  /** `next`: a new epoch; `current`: no new one, devices that have not proven the epoch in use are brought to it. */
  readonly epoch?: 'next' | 'current'
  /** Ends what else runs for this key, as so. */
  readonly supersede?: 'aborted' | 'rolled-back'
  /** The epoch in use is in other hands: it is `compromised` from this commit on, and nobody reads under it once its successor is in use. */
  readonly compromised?: boolean
  /** Devices that may be cut off the old epoch when its recipient-usage period is over (policy `strict`). */
  readonly mayCut?: number
}

/**
 * Starts one campaign: a new epoch and the campaign, in one commit; its targets follow (`prepare`). Throws Problem: `not-found`, `malformed` for a policy that does not
 * hold together, `conflict` while another one of this key runs, or when more devices may be cut than were agreed to.
 */
export const startRotation = async (ctx: Context, caller: Caller, key: KeyId, of: RotationOrder): Promise<{ campaign: string; epoch: number }> => {
  const policy = policyFrom(of.policy ?? {})
  const id = `${ctx.now().toString(36)}-${hex(ctx.random(4))}`
  const mayCut = await agreedCut(ctx, caller, key, { ...of, policy })
  if (of.epoch !== 'current') await prepareBroadcasts(ctx, key)
  const epoch = await perform(ctx, { caller, action: 'key.rotate', subject: key, detail: of.because }, async (tx) => {
    const row = await ctx.store.get('key', key)
    if (row === undefined) throw new Problem('not-found', `no key ${key}`)
    await endRunning(ctx, tx, key, of.supersede)
    const to = of.epoch === 'current' ? Epoch.parse(row.current) : await nextEpoch(ctx, tx, row, of)
    if (policy.canary !== null && (await ctx.store.get('group', policy.canary)) === undefined) throw new Problem('not-found', `no group ${policy.canary}`)
    tx.update('key', { ...row, latest: Epoch.parse(Math.max(row.latest, to)), campaign: id })
    const approval = policy.approval ? askIn(ctx, tx, caller, { what: `${campaignPrefix}${id}`, detail: `rotation of key ${key}`, reason: of.because }) : null
    tx.insert('campaign', {
      id,
      key,
      from: row.current,
      to,
      state: 'preparing',
      resumeTo: null,
      because: of.because,
      createdAt: ctx.now(),
      createdBy: callerName(caller),
      finishedAt: null,
      policy,
      wave: 0,
      waves: policy.waves.length + (policy.canary === null ? 0 : 1),
      since: ctx.now(),
      sizes: [],
      opened: [],
      due: ctx.now() + policy.deadline,
      succeededAt: null,
      cleared: -1,
      approval,
      mayCut,
      halted: null,
    })
    tx.note(
      `campaign ${id}: epoch ${to}${of.compromised === true ? `, epoch ${row.current} compromised` : ''}${approval === null ? '' : `, approval ${approval}`}`,
    )
    return to
  })
  // A crash here: the campaign stands without targets; the clock goes on with it after the restart.
  ctx.step('rotate.started')
  ctx.wake(id)
  return { campaign: id, epoch }
}

export const policyFrom = (input: PolicyInput): CampaignPolicy => {
  const given = Object.fromEntries(Object.entries(input).filter(([, value]) => value !== undefined)) as Partial<CampaignPolicy>
  const policy: CampaignPolicy = { ...defaultPolicy, ...given }
  const fault = faultOf(policy)
  if (fault !== undefined) throw new Problem('malformed', fault, { reason: 'campaign.policy' })
  return policy
}

/** How many devices this campaign may cut; null when its policy cuts none. Throws Problem('conflict') when a person has not agreed to what may happen. */
const agreedCut = async (ctx: Context, caller: Caller, key: KeyId, of: RotationOrder & { readonly policy: CampaignPolicy }): Promise<number | null> => {
  if (of.policy.overlap !== 'strict') return null
  // What follows from a revocation does not wait for anybody.
  if (caller.kind === 'system' || of.compromised === true) return Number.MAX_SAFE_INTEGER
  const { count } = await mayBeCut(ctx, key, { limit: 0 })
  const agreed = of.mayCut ?? 0
  if (count > agreed)
    throw new Problem('conflict', `${count} devices may be cut off the old epoch, ${agreed} were agreed to: see campaign preview`, { reason: 'campaign.cut' })
  return agreed
}

const nextEpoch = async (ctx: Context, tx: Transaction, row: ManagedKey, of: RotationOrder): Promise<Epoch> => {
  const [kept, current] = await Promise.all([keptOverlaps(ctx, row.id), ctx.store.get('epoch', `${row.id}/${row.current}`)])
  if (of.policy?.overlap !== 'strict' && kept.length >= maxOverlaps)
    throw new Problem(
      'conflict',
      `${kept.length} old epochs of ${row.id} are kept for devices that have not come back: revoke or remove those, or order it strict`,
      {
        reason: 'campaign.overlaps',
      },
    )
  if (of.compromised === true && current?.state === 'active') tx.update('epoch', moved(current, 'compromised', ctx.now()))
  const to = Epoch.parse(row.latest + 1)
  const made = newEpoch(ctx, row.id, to, 'pre-activation')
  tx.insert('epoch', made)
  await addBroadcasts(ctx, tx, row, { ...made, version: 0 })
  return to
}

/** Every device has proven the new epoch or was given up: what is left is to retire the old one, which a newer rotation does as well. */
export const onlyRetires = async (ctx: Context, campaign: Campaign): Promise<boolean> => {
  if (campaign.state === 'retiring') return true
  if (campaign.state !== 'activating') return false
  const unfinished = await Promise.all(
    Array.from({ length: campaign.waves }, async (_, wave) =>
      Promise.all(
        (['pending', 'delivered', 'installed'] as const).map(async (stage) => await ctx.store.count('target', { place: `${campaign.id}/${wave}/${stage}` })),
      ),
    ),
  )
  return unfinished.flat().every((count) => count === 0)
}

/** Ends the campaign that a newer one of the same key overtakes: an epoch that was never active is destroyed. */
const endRunning = async (ctx: Context, tx: Transaction, key: KeyId, as: RotationOrder['supersede']): Promise<void> => {
  const running = await runningCampaign(ctx, key)
  if (running === undefined) return
  const over = await onlyRetires(ctx, running)
  if (!over && as === undefined) throw new Problem('conflict', `campaign ${running.id} of key ${key} is ${running.state}: finish or abort it first`)
  await endCampaign(ctx, tx, running, as === 'rolled-back' ? as : over ? 'done' : 'aborted')
  tx.note(`supersedes campaign ${running.id}`)
}

/** Adds to a commit: the campaign is over. */
export const endCampaign = async (ctx: Context, tx: Transaction, campaign: Campaign, as: 'done' | 'aborted' | 'rolled-back'): Promise<void> => {
  tx.update('campaign', { ...inState(campaign, as), finishedAt: ctx.now() })
  const epoch = await ctx.store.get('epoch', `${campaign.key}/${campaign.to}`)
  if (epoch?.state !== 'pre-activation') return
  tx.update('epoch', moved(epoch, 'destroyed', ctx.now()))
  await dropBroadcasts(ctx, tx, epoch.id)
}

/** Rotates these keys at once, whatever else runs: somebody must not read on. The campaigns. */
export const rotateKeys = async (ctx: Context, keys: readonly KeyId[], because: string): Promise<readonly string[]> => {
  const campaigns: string[] = []
  for (const key of keys) campaigns.push((await startRotation(ctx, system, key, { policy: urgent, because, supersede: 'aborted' })).campaign)
  return campaigns
}

/** Says that the epoch in use is in other hands, and replaces it at once. */
export const rotateCompromised = async (ctx: Context, caller: Caller, key: KeyId, because: string): Promise<{ campaign: string; epoch: number }> =>
  await startRotation(ctx, caller, key, { policy: urgent, because, supersede: 'aborted', compromised: true })
