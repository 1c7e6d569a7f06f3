import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import {
  gaveUp,
  inState,
  newTarget,
  placeOf,
  running,
  started,
  turnOf,
  unfinishedIn,
  withWave,
  type Campaign,
  type Stage,
  type Target,
} from '../campaigns/campaign.ts'
import { nextStep, type Step } from '../campaigns/next-step.ts'
import { drawOf, Sample, waveAt } from '../campaigns/sample.ts'
import type { KeyEpoch } from '../keys/key.ts'
import { moved } from '../keys/states.ts'
import { factsOf, findCampaign } from './campaign.ts'
import { sendBroadcast } from './broadcast-wave.ts'
import { passing, type Context } from './context.ts'
import { convergeDevice, convergeMembers } from './converge.ts'
import { entitledAmong, entitledPages, groupsOf, memberPages } from './membership.ts'
import { destroyEpochs } from './old-epochs.ts'
import { perform, type Transaction } from './perform.ts'
import { restartPass, sendPass } from './send-pass.ts'
import { system } from './rotate.ts'
import { eachPage, findAll, inChunks } from './rows.ts'
import { spend } from './second-person.ts'
import { inTurn } from './turn.ts'

/** Devices that are worked on at a time: enough for group commit to pay, few enough to keep memory flat. */
const atOnce = 64
/** Targets of one commit: more would keep others waiting for longer. */
const chunk = 100
/** Old epochs that are kept for devices that have not come back, whoever orders the rotation: two less than a device holds. */
const mostOverlaps = 14

/** Takes every step that a campaign can take now. When to look again even if nothing happens; null when only an event can change it. */
export const drive = async (ctx: Context, id: string): Promise<number | null> =>
  await inTurn(ctx.store, `campaign/${id}`, async () => {
    let isTold = false
    for (;;) {
      const campaign = await findCampaign(ctx, id)
      if (campaign === undefined) return null
      const step = nextStep(campaign, await factsOf(ctx, campaign))
      if (step.do === 'time-out' && campaign.state === 'installing' && !isTold) {
        // Whoever is connected is told before it is given up: this server may have had no time for it until now.
        isTold = true
        await sendPass(ctx, campaign)
        continue
      }
      if (step.do !== 'wait') {
        await take(ctx, campaign, step)
        continue
      }
      if (campaign.state === 'installing') {
        if (step.for === 'window') restartPass(ctx, id)
        else await sendPass(ctx, campaign)
      }
      return step.until
    }
  })

const take = async (ctx: Context, campaign: Campaign, step: Exclude<Step, { do: 'wait' }>): Promise<void> => {
  const change = async (detail: string, work: (tx: Transaction, now: Campaign) => Promise<void> | void): Promise<void> => {
    await perform(ctx, { caller: system, action: 'campaign.step', subject: campaign.id, detail }, async (tx) => {
      const now = await findCampaign(ctx, campaign.id)
      // Somebody paused or aborted it meanwhile: this step is not due any more.
      if (now === undefined || now.state !== campaign.state || now.wave !== campaign.wave) return tx.note('not due any more')
      await work(tx, now)
    })
    // A crash here: the step is done or not done as a whole; the clock asks again after the restart.
    ctx.step(`rotate.${step.do}`)
  }
  const toTargets = async (stage: 'installed' | 'timed-out' | 'active'): Promise<void> => {
    const published = new Set<string>()
    for (let wave = 0; wave < campaign.waves; wave++) await convergeTargets(ctx, campaign, { wave, stage, published })
  }
  switch (step.do) {
    case 'prepare': {
      await prepare(ctx, campaign)
      const sizes = await sizesOf(ctx, campaign)
      return await change(`${sizes.reduce((sum, size) => sum + size, 0)} devices, ${campaign.waves} waves`, (tx, now) =>
        tx.update('campaign', now.approval === null ? started({ ...now, sizes }, ctx.now()) : inState({ ...now, sizes }, 'waiting')),
      )
    }
    case 'start':
      return await change('starts', async (tx, now) => {
        if (now.state === 'waiting' && now.approval !== null) await spend(ctx, tx, now.approval)
        tx.update('campaign', started(now, ctx.now()))
      })
    case 'halt':
      return await change(`halt: ${step.because}`, (tx, now) => tx.update('campaign', { ...inState(now, 'halted'), halted: step.because }))
    case 'time-out':
      return await timeOut(ctx, campaign)
    case 'soak':
      return await change(step.since === null ? 'below its success threshold again' : `at its success threshold: soaks`, (tx, now) =>
        tx.update('campaign', { ...now, succeededAt: step.since }),
      )
    case 'open-wave':
      return await change(`wave ${step.wave + 1} of ${campaign.waves} opens`, (tx, now) => tx.update('campaign', withWave(now, step.wave, ctx.now())))
    case 'activate':
      await change(`epoch ${campaign.to} active`, (tx, now) => activate(ctx, tx, now))
      await toTargets('installed')
      // Given up while they installed, and connected: they are not left with the old epoch until their next report.
      await toTargets('timed-out')
      return await convergeOthers(ctx, campaign)
    case 'retire':
      await change(`epochs below ${campaign.to} retire`, (tx, now) => retire(ctx, tx, now))
      await toTargets('active')
      return await convergeOthers(ctx, campaign)
    case 'finish':
      await change('done', (tx, now) => tx.update('campaign', { ...inState(now, 'done'), finishedAt: ctx.now() }))
      return await destroyEpochs(ctx, campaign.key)
  }
}

/**
 * Writes the targets, a page of members in order of id at a time. A target is who is entitled to the key in the moment when its page is committed, in one order with whatever
 * takes that from it: who leaves before is none, who leaves later is dropped. Who joins behind a page that is written is served as whoever joins while a rotation runs. What a crash left is
 * found and kept.
 */
const prepare = async (ctx: Context, campaign: Campaign): Promise<void> => {
  const { id, key, to } = campaign
  const bounds = await waveBounds(ctx, campaign)
  for await (const members of memberPages(ctx, await groupsOf(ctx, key))) {
    if (members.length === 0) continue
    const detail = `targets from ${members[0]} to ${members.at(-1)}`
    const isDue = await perform(ctx, { caller: system, action: 'campaign.step', subject: id, detail }, async (tx) => {
      const now = await findCampaign(ctx, id)
      if (now?.state !== 'preparing') return false
      // Refused if one of them left meanwhile, which touches it as well (`dropTargets`).
      tx.touch('campaign', now)
      const devices = await entitledAmong(ctx, key, members)
      for (const device of devices) {
        if ((await ctx.store.get('target', `${id}/${device}`, passing)) !== undefined) continue
        const wave = (await isCanary(ctx, campaign, device)) ? 0 : firstWave(campaign) + waveAt(bounds, drawOf(id, device))
        const current = campaign.from === to && (await ctx.store.get('holding', `${device}/${key}/${to}`, passing))?.stage === 'active'
        tx.insert('target', newTarget({ campaign: id, device, wave, ...(current ? { stage: 'already-current' } : {}) }, ctx.now()))
      }
      tx.note(`${devices.length} devices`)
      return true
    })
    if (!isDue) return
    // A crash here: these targets stand, the others follow after the restart.
    ctx.step('rotate.targets')
  }
}

/** Its canaries are a wave of their own, before those of the policy. */
const firstWave = ({ policy }: Campaign): number => (policy.canary === null ? 0 : 1)

const isCanary = async (ctx: Context, { policy }: Campaign, device: DeviceId): Promise<boolean> =>
  policy.canary !== null && (await ctx.store.get('member', `${policy.canary}/${device}`, passing)) !== undefined

/** Where each wave ends in the order of the draws: who comes or goes until its page is written makes a wave larger or smaller, and moves nobody to another one. */
const waveBounds = async (ctx: Context, campaign: Campaign): Promise<readonly number[]> => {
  const { policy, id, key } = campaign
  if (policy.waves.length === 1) return []
  const sample = new Sample()
  for await (const devices of entitledPages(ctx, key))
    for (const device of devices) if (!(await isCanary(ctx, campaign, device))) sample.add(drawOf(id, device))
  return sample.bounds(policy.waves)
}

const sizesOf = async (ctx: Context, campaign: Campaign): Promise<readonly number[]> =>
  await Promise.all(
    Array.from({ length: campaign.waves }, async (_, wave) => {
      const counts = await Promise.all(
        (['pending', 'already-current', 'left', 'quarantined'] as const).map(
          async (stage) => await ctx.store.count('target', { place: placeOf(campaign.id, wave, stage) }),
        ),
      )
      return counts.reduce((sum, count) => sum + count, 0)
    }),
  )

/** Sends what they lack to the connected targets in one place: by the broadcasts of their shards where there are any, else one by one. */
const convergeTargets = async (
  ctx: Context,
  campaign: Campaign,
  of: { readonly wave: number; readonly stage: Stage; readonly published: Set<string> },
): Promise<void> =>
  await eachPage(ctx.store, 'target', { where: { place: placeOf(campaign.id, of.wave, of.stage) } }, async (targets) => {
    const connected = targets.filter(({ device }) => ctx.bus.online(device))
    const others = await sendBroadcast(ctx, campaign, connected, of)
    await inChunks(others, atOnce, ({ device }) => convergeDevice(ctx, device))
  })

/** One commit takes the new epoch into use and the old one out of it: there is never none and never two. */
const activate = async (ctx: Context, tx: Transaction, campaign: Campaign): Promise<void> => {
  const { id, key: keyId, from, to } = campaign
  const [key, next, epochs] = await Promise.all([
    ctx.store.get('key', keyId),
    ctx.store.get('epoch', `${keyId}/${to}`),
    findAll(ctx.store, 'epoch', { where: { key: keyId } }),
  ])
  if (key === undefined || next === undefined) throw new Problem('internal', `campaign ${id} without its key`)
  tx.update('campaign', running(campaign, 'activating', ctx.now()))
  if (from === to) return
  tx.update('epoch', moved(next, 'active', ctx.now()))
  const old = epochs.find(({ epoch }) => epoch === from)
  // It is read until everybody has proven the new one: `retire` ends that.
  if (old?.state === 'active') tx.update('epoch', { ...moved(old, 'deactivated', ctx.now()), overlap: true })
  const kept = epochs.filter(({ overlap }) => overlap === true).toSorted((one, other) => one.epoch - other.epoch)
  for (const epoch of kept.slice(0, Math.max(0, kept.length + 1 - mostOverlaps))) {
    tx.update('epoch', withoutOverlap(epoch))
    tx.note(`epoch ${epoch.epoch} is no longer kept for devices that have not come back: there are too many`)
  }
  tx.update('key', { ...key, current: to })
}

const withoutOverlap = (epoch: KeyEpoch): KeyEpoch => {
  const { overlap: _, ...rest } = epoch
  return rest
}

/** Nobody who may need an older epoch is left, or those were agreed to be cut. */
const retire = async (ctx: Context, tx: Transaction, campaign: Campaign): Promise<void> => {
  tx.update('campaign', running(campaign, 'retiring', ctx.now()))
  for (const epoch of await findAll(ctx.store, 'epoch', { where: { key: campaign.key } }))
    if (epoch.overlap === true && epoch.epoch < campaign.to) tx.update('epoch', withoutOverlap(epoch))
}

/** Devices that joined since the rotation began hold the key, old epochs that they may read included, without being targets. */
const convergeOthers = async (ctx: Context, campaign: Campaign): Promise<void> => {
  const isTarget = async (device: DeviceId): Promise<boolean> => (await ctx.store.get('target', `${campaign.id}/${device}`)) !== undefined
  await convergeMembers(ctx, await groupsOf(ctx, campaign.key), isTarget)
}

/**
 * Looks at every device that still has something before it: whoever was silent for too long is tried again while its budget lasts, else given up. Then it is known when
 * the next one runs out of time.
 */
const timeOut = async (ctx: Context, campaign: Campaign): Promise<void> => {
  const { policy, id, state } = campaign
  const now = ctx.now()
  const runsOut = (target: Target): number => turnOf(campaign, target, now) + policy.deadline
  // One that is connected and waits until others are done is not silent.
  const held = (target: Target): boolean => policy.concurrency !== null && target.stage === 'pending' && ctx.bus.online(target.device)
  let due = now + policy.deadline
  for (let wave = 0; wave <= campaign.wave; wave++)
    for (const stage of unfinishedIn(state))
      await eachPage(ctx.store, 'target', { where: { place: placeOf(id, wave, stage) } }, async (targets) => {
        const late = targets.filter((target) => !held(target) && runsOut(target) <= now)
        for (const target of targets) if (!late.includes(target) && !held(target)) due = Math.min(due, runsOut(target))
        for (let start = 0; start < late.length; start += chunk) await timeOutSome(ctx, campaign, late.slice(start, start + chunk), stage)
      })
  await perform(ctx, { caller: system, action: 'campaign.step', subject: id, detail: 'devices that were silent for too long' }, async (tx) => {
    const current = await findCampaign(ctx, id)
    // Not again at once for each device: they are looked at together, a twentieth of the deadline late at most.
    if (current?.state === state) tx.update('campaign', { ...current, due: Math.max(due, now + Math.ceil(policy.deadline / 20)) })
  })
  // A crash here or before: who has run out of time is looked for again.
  ctx.step('rotate.time-out')
  restartPass(ctx, id)
}

const timeOutSome = async (ctx: Context, campaign: Campaign, late: readonly Target[], stage: Stage): Promise<void> => {
  const again = await perform(
    ctx,
    { caller: system, action: 'campaign.step', subject: campaign.id, detail: `${late.length} devices silent while ${stage}` },
    async (tx) => {
      const looked = await Promise.all(
        late.map(async ({ id }) => {
          const now = await ctx.store.get('target', id)
          if (now?.stage !== stage) return undefined
          const next = gaveUp(now, { stage: 'timed-out', retries: campaign.policy.retries, reason: `silent while ${stage}`, at: ctx.now() })
          tx.update('target', next)
          return next
        }),
      )
      const retried = looked.filter((target) => target !== undefined).filter(({ stage: became }) => became !== 'timed-out')
      tx.note(`${retried.length} tried again`)
      return retried
    },
  )
  ctx.step('rotate.timed-out')
  if (campaign.state !== 'installing')
    await inChunks(
      again.filter(({ device }) => ctx.bus.online(device)),
      atOnce,
      ({ device }) => convergeDevice(ctx, device),
    )
}
