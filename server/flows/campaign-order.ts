import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { inState, isRunning, isUnfinished, placeOf, running, startsOver, type Campaign, type Running } from '../campaigns/campaign.ts'
import { behindOf, needCampaign } from './campaign.ts'
import type { Context } from './context.ts'
import { endCampaign, startRotation } from './rotate.ts'
import { perform, type Transaction } from './perform.ts'
import { restartPass } from './send-pass.ts'
import { eachPage } from './rows.ts'
import { grantApproval } from './second-person.ts'

type Order = 'pause' | 'resume' | 'abort' | 'advance' | 'confirm' | 'retry'

/** One order against a campaign: the change, its durable step, a look at what comes next. The campaign afterwards. */
const order = async (
  ctx: Context,
  of: { readonly caller: Caller; readonly id: string; readonly order: Order; readonly detail?: string },
  change: (tx: Transaction, campaign: Campaign) => Promise<void> | void,
): Promise<Campaign> => {
  const { caller, id, detail } = of
  await perform(ctx, { caller, action: `campaign.${of.order}`, subject: id, ...(detail === undefined ? {} : { detail }) }, async (tx) =>
    change(tx, await needCampaign(ctx, id)),
  )
  // A crash here: the order stands; the clock looks at the campaign after the restart.
  ctx.step(`campaign.${of.order}`)
  ctx.wake(id)
  return await needCampaign(ctx, id)
}

const refuse = ({ id, state }: Campaign, why = ''): never => {
  throw new Problem('conflict', `campaign ${id} is ${state}${why}`, { reason: 'campaign.state' })
}

/** Pauses, resumes or aborts. `errorThreshold`: what a resumed campaign is judged by from now on; one that halted halts again otherwise. */
export const controlCampaign = async (
  ctx: Context,
  caller: Caller,
  id: string,
  of: { readonly order: 'pause' | 'resume' | 'abort'; readonly errorThreshold?: number | undefined },
): Promise<Campaign> =>
  await order(ctx, { caller, id, order: of.order }, async (tx, campaign) => {
    const stopped = campaign.state === 'paused' || campaign.state === 'halted'
    switch (of.order) {
      case 'pause':
        return isRunning(campaign.state) ? tx.update('campaign', inState(campaign, 'paused')) : refuse(campaign)
      case 'resume': {
        if (!stopped) return refuse(campaign)
        const { errorThreshold = campaign.policy.errorThreshold } = of
        tx.note(`error threshold ${errorThreshold}`)
        return tx.update('campaign', { ...resumed(campaign, ctx.now()), policy: { ...campaign.policy, errorThreshold } })
      }
      case 'abort':
        return isUnfinished(campaign.state) ? await endCampaign(ctx, tx, campaign, 'aborted') : refuse(campaign)
    }
  })

const phaseOf = ({ state, resumeTo }: Campaign): Running => (isRunning(state) ? state : (resumeTo ?? 'installing'))

const resumed = (campaign: Campaign, now: number): Campaign => running(campaign, phaseOf(campaign), now)

/** A person lets the campaign pass its newest wave (policy `advance: 'manual'`): the next one opens, or the epoch is activated, once the thresholds allow it. */
export const advanceCampaign = async (ctx: Context, caller: Caller, id: string): Promise<Campaign> =>
  await order(ctx, { caller, id, order: 'advance' }, (tx, campaign) => {
    if (campaign.state !== 'installing' || campaign.policy.advance !== 'manual') return refuse(campaign, ': nothing waits for a person')
    tx.note(`past wave ${campaign.wave + 1} of ${campaign.waves}`)
    return tx.update('campaign', { ...campaign, cleared: campaign.wave })
  })

/** A person agrees that so many devices lose the old epoch without having proven the new one (policy `overlap: 'strict'`). */
export const confirmCut = async (ctx: Context, caller: Caller, id: string, devices: number): Promise<Campaign> =>
  await order(ctx, { caller, id, order: 'confirm', detail: `${devices} devices may be cut` }, async (tx, campaign) => {
    if (campaign.policy.overlap !== 'strict' || !isUnfinished(campaign.state))
      return refuse(campaign, ', overlap ' + campaign.policy.overlap + ': it cuts no device')
    const behind = await behindOf(ctx, campaign)
    if (behind > devices && campaign.state === 'activating')
      throw new Problem('conflict', `${behind} devices have not proven epoch ${campaign.to}, not ${devices}`, { reason: 'campaign.cut' })
    return tx.update('campaign', { ...campaign, mayCut: devices })
  })

/** The second person approves a campaign that waits for it: it starts, now or at its time. Throws Problem as `grantApproval` does. */
export const approveCampaign = async (ctx: Context, caller: Caller, id: string): Promise<Campaign> => {
  const { approval } = await needCampaign(ctx, id)
  if (approval === null) throw new Problem('conflict', `campaign ${id} needs no approval`, { reason: 'campaign.approval' })
  await grantApproval(ctx, caller, approval)
  return await needCampaign(ctx, id)
}

/**
 * Tries the devices again that failed or were given up, each from where it is, with their whole budget; a campaign that halted or is paused goes on. Harmless to repeat.
 */
export const retryCampaign = async (ctx: Context, caller: Caller, id: string): Promise<Campaign> => {
  const campaign = await needCampaign(ctx, id)
  if (!isRunning(campaign.state) && campaign.state !== 'paused' && campaign.state !== 'halted') return refuse(campaign)
  let count = 0
  for (let wave = 0; wave <= campaign.wave; wave++)
    for (const stage of ['failed', 'timed-out'] as const)
      await eachPage(ctx.store, 'target', { where: { place: placeOf(id, wave, stage) } }, async (targets) => {
        if (targets.length === 0) return
        await perform(ctx, { caller, action: 'campaign.retry', subject: id, detail: `${targets.length} devices that were ${stage}` }, async (tx) => {
          for (const { id: one, device } of targets) {
            const [now, holding] = await Promise.all([ctx.store.get('target', one), ctx.store.get('holding', `${device}/${campaign.key}/${campaign.to}`)])
            if (now?.stage !== stage) continue
            const has = holding?.stage === 'active' ? 'active' : holding?.stage === 'installed' ? 'installed' : 'pending'
            tx.update('target', startsOver(now, has, ctx.now()))
          }
        })
        count += targets.length
        // A crash here: these are to be tried, the others are still given up; the order is given again.
        ctx.step('campaign.retried')
      })
  restartPass(ctx, id)
  return await order(ctx, { caller, id, order: 'retry', detail: `${count} devices` }, (tx, now) =>
    tx.update('campaign', isRunning(now.state) ? { ...now, due: Math.min(now.due, ctx.now() + now.policy.deadline) } : resumed(now, ctx.now())),
  )
}

/**
 * Takes back a campaign that halted or is paused. Before its epoch was activated: the epoch is destroyed, everybody uses the one they used all along. After that no
 * device could go back (an epoch is never used again once it was superseded): a further epoch replaces both, and both are read until every device has proven it.
 * The campaign that is in charge then: this one, or the one that replaces it.
 */
export const rollBack = async (ctx: Context, caller: Caller, id: string): Promise<Campaign> => {
  const campaign = await needCampaign(ctx, id)
  if (campaign.state !== 'halted' && campaign.state !== 'paused') return refuse(campaign, ': pause it first')
  if (phaseOf(campaign) === 'installing') {
    await perform(ctx, { caller, action: 'campaign.rollback', subject: id, detail: `epoch ${campaign.to} was never in use` }, async (tx) => {
      const now = await needCampaign(ctx, id)
      if (now.state !== campaign.state) return refuse(now)
      return await endCampaign(ctx, tx, now, 'rolled-back')
    })
    // A crash here: it is taken back; what devices have installed of it was never used, and goes with the next epoch that they retire.
    ctx.step('campaign.rollback')
    return await needCampaign(ctx, id)
  }
  const { startAt: _, approval: __, ...policy } = campaign.policy
  const next = await startRotation(ctx, caller, campaign.key, {
    policy,
    because: `rollback of campaign ${id}`,
    supersede: 'rolled-back',
    mayCut: campaign.mayCut ?? 0,
  })
  return await needCampaign(ctx, next.campaign)
}
