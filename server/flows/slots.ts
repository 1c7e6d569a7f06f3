import { placeOf, type Campaign, type Target } from '../campaigns/campaign.ts'
import { windowAt } from '../campaigns/window.ts'
import type { Context } from './context.ts'
import { inTurn } from './turn.ts'

/** How many more devices may have the new epoch on its way to them; Infinity without a limit. */
export const freeSlots = async (ctx: Context, campaign: Campaign): Promise<number> => {
  const { concurrency } = campaign.policy
  if (concurrency === null) return Infinity
  const counts = await Promise.all(
    Array.from({ length: campaign.wave + 1 }, async (_, wave) => await ctx.store.count('target', { place: placeOf(campaign.id, wave, 'delivered') })),
  )
  return concurrency - counts.reduce((sum, count) => sum + count, 0)
}

const refused = new WeakMap<object, Set<string>>()

/** Whether a device had to wait for a slot since this was asked last. */
export const wasRefused = ({ store }: Context, campaign: string): boolean => refused.get(store)?.delete(campaign) === true

const isTaken = async (ctx: Context, campaign: Campaign): Promise<boolean> => {
  if ((await freeSlots(ctx, campaign)) > 0) return false
  const known = refused.get(ctx.store) ?? new Set()
  refused.set(ctx.store, known.add(campaign.id))
  return true
}

/** Whether a device's turn has come to install the epoch of this campaign: its wave and the window are open, and not too many others are at it. `target`: undefined for none. */
export const isTurn = async (ctx: Context, campaign: Campaign, target: Target | undefined): Promise<boolean> => {
  const { state, wave, policy } = campaign
  if (state !== 'installing') return false
  if (target === undefined ? policy.targets === 'frozen' : target.wave > wave) return false
  if (policy.window !== null && !windowAt(policy.window, ctx.now()).open) return false
  if (target !== undefined && target.stage !== 'pending') return true
  return !(await isTaken(ctx, campaign))
}

/** Runs `work` while no other device of these campaigns takes a slot: a limit is a limit. */
export const inSlots = async <R>(ctx: Context, campaigns: readonly Campaign[], work: () => Promise<R>): Promise<R> => {
  const limited = campaigns.filter(({ state, policy }) => state === 'installing' && policy.concurrency !== null).map(({ id }) => id)
  return await limited.toSorted().reduce<() => Promise<R>>((inner, id) => async () => await inTurn(ctx.store, `slots/${id}`, inner), work)()
}
