import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import {
  isRunning,
  isUnfinished,
  placeOf,
  stages,
  transitions,
  wholeCampaign,
  type Campaign,
  type CampaignState,
  type Stage,
  type Target,
} from '../campaigns/campaign.ts'
import { countedIn, nextStep, type Facts, type Step, type WaveProgress } from '../campaigns/next-step.ts'
import type { Context } from './context.ts'
import { findAll } from './rows.ts'
import { isGranted } from './second-person.ts'

const unfinishedStates = (Object.keys(transitions) as CampaignState[]).filter(isUnfinished)

export const findCampaign = async (ctx: Context, id: string): Promise<Campaign | undefined> => {
  const row = await ctx.store.get('campaign', id)
  return row === undefined ? undefined : wholeCampaign(row)
}

export const needCampaign = async (ctx: Context, id: string): Promise<Campaign> => {
  const campaign = await findCampaign(ctx, id)
  if (campaign === undefined) throw new Problem('not-found', `no campaign ${id}`)
  return campaign
}

/** The campaign of a key that is not finished, if there is one. There is at most one, and no newer one of the key. */
export const runningCampaign = async (ctx: Context, id: KeyId): Promise<Campaign | undefined> => {
  const key = await ctx.store.get('key', id)
  if (key === undefined) return undefined
  // Keys from before campaigns stood on them.
  const found =
    key.campaign === undefined
      ? (await Promise.all(unfinishedStates.map((state) => findAll(ctx.store, 'campaign', { where: { key: id, state } })))).flat()
      : [await ctx.store.get('campaign', key.campaign)]
  const newest = found.filter((one) => one !== undefined).toSorted((one, other) => other.createdAt - one.createdAt)[0]
  return newest !== undefined && isUnfinished(newest.state) ? wholeCampaign(newest) : undefined
}

/** Ids of every campaign that is not finished. */
export const unfinishedCampaigns = async (ctx: Context): Promise<readonly string[]> =>
  (await Promise.all(unfinishedStates.map((state) => findAll(ctx.store, 'campaign', { where: { state } })))).flat().map(({ id }) => id)

/** Where a device stands in the running campaigns of these keys. */
export const targetsOf = async (
  ctx: Context,
  device: DeviceId,
  keys: readonly KeyId[],
): Promise<readonly { readonly campaign: Campaign; readonly target: Target }[]> => {
  const found = await Promise.all(
    keys.map(async (key) => {
      const campaign = await runningCampaign(ctx, key)
      const target = campaign === undefined ? undefined : await ctx.store.get('target', `${campaign.id}/${device}`)
      return campaign === undefined || target === undefined ? [] : [{ campaign, target }]
    }),
  )
  return found.flat()
}

const counted = async (ctx: Context, { id }: Campaign, wave: number, of: readonly Stage[]): Promise<WaveProgress['counts']> =>
  Object.fromEntries(await Promise.all(of.map(async (stage) => [stage, await ctx.store.count('target', { place: placeOf(id, wave, stage) })] as const)))

/** Targets per wave and stage, every one counted by index: for people. */
export const countsOf = async (ctx: Context, campaign: Campaign): Promise<readonly Readonly<Record<Stage, number>>[]> =>
  await Promise.all(Array.from({ length: campaign.waves }, async (_, wave) => (await counted(ctx, campaign, wave, stages)) as Record<Stage, number>))

/** What the next step of a campaign rests on. Costs the devices that still have something before them, and the waves. */
export const factsOf = async (ctx: Context, campaign: Campaign): Promise<Facts> => {
  const { state, waves, wave, sizes, approval } = campaign
  const open = state === 'installing' ? wave + 1 : isRunning(state) ? waves : 0
  const [progress, readable, approved] = await Promise.all([
    Promise.all(Array.from({ length: open }, async (_, at) => ({ total: sizes[at] ?? 0, counts: await counted(ctx, campaign, at, countedIn(state)) }))),
    state === 'activating' ? readableUntil(ctx, campaign) : null,
    approval === null || state !== 'waiting' ? true : isGranted(ctx, approval),
  ])
  return { progress, readableUntil: readable, approved, now: ctx.now() }
}

/** Until when the epoch that is replaced may be read at least; null when nobody may read it. */
const readableUntil = async (ctx: Context, campaign: Campaign): Promise<number | null> => {
  const [key, old] = await Promise.all([ctx.store.get('key', campaign.key), ctx.store.get('epoch', `${campaign.key}/${campaign.from}`)])
  return key === undefined || old?.state !== 'deactivated' || old.deactivatedAt === null ? null : old.deactivatedAt + key.recipientUsage
}

/** What a campaign would do next. */
export const stepOf = async (ctx: Context, campaign: Campaign): Promise<Step> => nextStep(campaign, await factsOf(ctx, campaign))

/** Stages of devices that have not proven the new epoch and may need the old one. */
export const behindStages = ['pending', 'delivered', 'installed', 'failed', 'timed-out'] as const satisfies readonly Stage[]

/** How many devices have not proven the new epoch. */
export const behindOf = async (ctx: Context, campaign: Campaign): Promise<number> => {
  const waves = await Promise.all(Array.from({ length: campaign.waves }, (_, wave) => counted(ctx, campaign, wave, behindStages)))
  return waves.flatMap((counts) => behindStages.map((stage) => counts[stage] ?? 0)).reduce((total, count) => total + count, 0)
}
