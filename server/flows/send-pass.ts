import { placeOf, type Campaign } from '../campaigns/campaign.ts'
import { windowAt } from '../campaigns/window.ts'
import { sendBroadcast } from './broadcast-wave.ts'
import type { Context } from './context.ts'
import { convergeDevice } from './converge.ts'
import { inChunks } from './rows.ts'
import { freeSlots, wasRefused } from './slots.ts'
import { othersFirst } from './turn.ts'

/**
 * How far this process has got in sending an installing campaign to its connected targets: once through those that have nothing yet after each opening of a wave,
 * resumption or restart. Whoever connects later is served when it reports. It lives in memory: a process that starts goes through them anew, which sends nothing twice.
 */
interface Pass {
  /** What it is a pass for. */
  readonly of: string
  readonly wave: number
  readonly after: string | undefined
  readonly done: boolean
  /** Broadcasts that stand on their topics since it began. */
  readonly published: Set<string>
}

const passes = new WeakMap<object, Map<string, Pass>>()
const passesOf = ({ store }: Context): Map<string, Pass> => {
  const known = passes.get(store) ?? new Map<string, Pass>()
  passes.set(store, known)
  return known
}

/** Targets that are looked at before others have their turn. */
const pageSize = 100
const atOnce = 64

/** Its connected targets are gone through again: some may have nothing yet. */
export const restartPass = (ctx: Context, campaign: string): void => void passesOf(ctx).delete(campaign)

/** Goes on until every connected target of the open waves was sent the epoch, or no more may be under way. */
export const sendPass = async (ctx: Context, campaign: Campaign): Promise<void> => {
  const { id, since, wave: newest, policy } = campaign
  const known = passesOf(ctx)
  // Somebody who connected meanwhile had to wait: it stands anywhere.
  if (known.get(id)?.done === true && wasRefused(ctx, id)) known.delete(id)
  const of = `${since}/${newest}`
  const before = known.get(id)
  let pass: Pass = before?.of === of ? before : { of, wave: 0, after: undefined, done: false, published: new Set() }
  while (!pass.done && (policy.window === null || windowAt(policy.window, ctx.now()).open)) {
    const free = await freeSlots(ctx, campaign)
    if (free <= 0) break
    pass = await sendPage(ctx, campaign, pass, free)
    await othersFirst()
  }
  known.set(id, pass)
}

/** One page of targets that have nothing yet, `free` of them at most. How far that gets. */
const sendPage = async (ctx: Context, campaign: Campaign, pass: Pass, free: number): Promise<Pass> => {
  const { id, wave: newest } = campaign
  const { wave, after, published } = pass
  const found = await ctx.store.find('target', { where: { place: placeOf(id, wave, 'pending') }, limit: pageSize, ...(after === undefined ? {} : { after }) })
  const connected = found.filter(({ device }) => ctx.bus.online(device))
  const served = connected.slice(0, free)
  const others = await sendBroadcast(ctx, campaign, served, { stage: 'pending', published })
  await inChunks(others, atOnce, async ({ device }) => await convergeDevice(ctx, device))
  if (served.length < connected.length) return { ...pass, after: served.at(-1)?.id ?? after }
  if (found.length === pageSize) return { ...pass, after: found.at(-1)?.id }
  return wave < newest ? { ...pass, wave: wave + 1, after: undefined } : { ...pass, done: true }
}
