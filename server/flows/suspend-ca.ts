import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { isOver, withSuspended, type Generation } from '../ca/rollover.ts'
import { issuingKey } from './authority.ts'
import type { Context } from './context.ts'
import { callerName, refuse } from './perform.ts'
import { caNamed } from './revoke-ca.ts'
import { maxReason } from './revoke.ts'
import { done, inOrder, move, subjectOf, type RolloverOutcome } from './rollover.ts'
import { cutSessionsUnder } from './under-ca.ts'

const mayNot = async (
  ctx: Context,
  of: { readonly caller: Caller; readonly order: 'suspend' | 'reinstate'; readonly number: number },
  why: string,
): Promise<never> => {
  const problem = new Problem('conflict', `generation ${of.number} ${why}`, { reason: 'rollover.order' })
  await refuse(ctx, { caller: of.caller, action: `ca.${of.order}`, subject: subjectOf(of.number) }, problem)
  throw problem
}

/** Why a CA cannot be suspended; undefined when it can. Somebody has to sign: what signs is revoked, which has the next one take its place. */
const hindrance = (generation: Generation): string | undefined => {
  if (isOver(generation)) return `is ${generation.state}: nothing it has issued is accepted`
  if (generation.state === 'active') return 'signs everything: activate its successor first, or revoke it with --force'
  return generation.state === 'superseded' || generation.state === 'tainted' ? undefined : `is ${generation.state}: it has issued nothing for others`
}

/**
 * Suspends an issuing CA that signs no more: until it is reinstated nothing it has issued is accepted, and every connection over its certificates is cut. Devices
 * prove themselves anew meanwhile and get certificates of the CA that signs. Nothing is destroyed and nothing published: others learn of a revocation only.
 * Repeated it changes nothing. Throws Problem('conflict') for a CA that signs, or is over.
 */
export const suspendCa = async (ctx: Context, caller: Caller, name: string, why: string): Promise<RolloverOutcome> =>
  await inOrder(ctx, async () => {
    const generation = await caNamed(ctx, name)
    const { number } = generation
    const hindered = hindrance(generation)
    if (hindered !== undefined) return await mayNot(ctx, { caller, order: 'suspend', number }, hindered)
    const suspended = { at: ctx.now(), by: callerName(caller), reason: why.slice(0, maxReason) }
    if (generation.suspended === undefined)
      await move(ctx, { caller, action: 'ca.suspend', number, step: 'rollover.suspended', detail: suspended.reason }, (now) =>
        withSuspended(now, number, suspended),
      )
    // A crash here: nothing of it is accepted, and no connection has survived.
    await ctx.authority.reload()
    await cutSessionsUnder(ctx, issuingKey(number), 'the CA of its certificate was suspended')
    return done(generation, generation.suspended !== undefined)
  })

/** Accepts again what a suspended CA has issued and nothing else speaks against. Repeated it changes nothing. */
export const reinstateCa = async (ctx: Context, caller: Caller, name: string): Promise<RolloverOutcome> =>
  await inOrder(ctx, async () => {
    const generation = await caNamed(ctx, name)
    const { number, suspended } = generation
    if (isOver(generation)) return await mayNot(ctx, { caller, order: 'reinstate', number }, `is ${generation.state}: that is for good`)
    if (suspended !== undefined) {
      await move(ctx, { caller, action: 'ca.reinstate', number, step: 'rollover.reinstated' }, (now) => withSuspended(now, number, undefined))
      await ctx.authority.reload()
    }
    // A crash here: it counts again; its devices connect when they next try.
    return done(generation, suspended === undefined)
  })
