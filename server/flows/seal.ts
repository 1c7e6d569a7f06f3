import { Problem } from '@fleetkey/protocol/problem.ts'
import { authorise } from '../access/authorise.ts'
import type { Caller } from '../access/caller.ts'
import type { Base, Context, Seal, SealStatus, SplitOrder } from './context.ts'
import { perform } from './perform.ts'
import { askApproval, spendApproval } from './second-person.ts'

/**
 * One share from whoever has it: the share is the proof, there is no other. Whose shares opened the keys stands in the log, by their numbers. Throws Problem
 * as `Seal.unseal`.
 */
export const handInShare = async (
  ctx: Base,
  seal: Seal,
  { caller, share, reset }: { readonly caller: Caller; readonly share: Uint8Array; readonly reset: boolean },
): Promise<SealStatus> => {
  const { status, set, index, fresh } = await seal.unseal(share, reset)
  // One that was handed in before changes nothing, and is no entry: whoever has a share cannot fill the log with it.
  if (status.sealed && !fresh && !reset) return status
  const detail = status.sealed ? (reset ? 'those before it are forgotten' : undefined) : 'the keys are open'
  await perform(ctx, { caller, action: 'seal.unseal', subject: `share ${index} of set ${set}`, ...(detail === undefined ? {} : { detail }) }, () => undefined)
  ctx.step('seal.handed-in')
  return status
}

/** What a split has come to. `approval`: it waits for a second person, and nothing was done. */
export interface SplitOutcome {
  readonly set: string | null
  readonly shares: readonly Uint8Array[]
  readonly approval: string | null
}

/**
 * A new set of shares, once a second person has approved exactly this split. Whoever is given the shares confirms the set; until then the one before it opens
 * the keys as well, so that no crash and no lost answer leaves a set that nobody has as the only one. Throws Problem: `forbidden`, `unavailable` while sealed.
 */
export const splitSeal = async (
  ctx: Context,
  seal: Seal,
  of: { readonly caller: Caller; readonly order: SplitOrder; readonly reason: string; readonly recipient: Uint8Array },
): Promise<SplitOutcome> => {
  const { caller, order, reason, recipient } = of
  authorise(caller, 'seal.split')
  const what = `seal.split ${order.threshold} of ${order.shares}${order.only ? ', nothing else' : ''}`
  const detail = `${order.threshold} of ${order.shares} shares open the keys${order.only ? '; no passphrase or key file does any more' : ''}; earlier shares do not`
  const approval = await askApproval(ctx, caller, { what, detail, reason })
  if (approval.grantedAt === null) return { set: null, shares: [], approval: approval.id }
  const { set, shares } = await seal.split(order, recipient)
  // A crash here: a set that nobody has, not confirmed; the approval is still good.
  await perform(ctx, { caller, action: 'seal.split', subject: `set ${set}`, detail: `${order.threshold} of ${order.shares}` }, async (tx) => {
    if (!(await spendApproval(ctx, tx, caller, what))) throw new Problem('forbidden', 'nobody else has approved it', { reason: 'approval.missing' })
  })
  ctx.step('seal.split-audited')
  return { set, shares, approval: null }
}

/** The shares of this set have arrived: it alone counts from now on. Harmless to repeat. Throws Problem('not-found'). */
export const confirmSeal = async (ctx: Context, seal: Seal, caller: Caller, set: string): Promise<SealStatus> => {
  authorise(caller, 'seal.confirm')
  const known = (await seal.status()).sets.find((one) => one.set === set)
  if (known === undefined) throw new Problem('not-found', `no set of shares ${set}`, { reason: 'seal.set' })
  await perform(
    ctx,
    { caller, action: 'seal.confirm', subject: `set ${set}`, detail: known.only ? 'nothing else opens the keys' : 'earlier shares open nothing' },
    () => undefined,
  )
  // A crash here: the log says it, and both sets open the keys until it is asked for again.
  ctx.step('seal.confirming')
  return await seal.confirm(set)
}
