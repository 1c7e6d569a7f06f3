import { Epoch, type KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { defaultPolicy, inStage, placeOf, stages, waveOf, type Campaign, type CampaignPolicy, type Stage } from '../campaigns/campaign.ts'
import { nextStep, type Progress, type Step } from '../campaigns/next-step.ts'
import { moved } from '../keys/states.ts'
import type { Context } from './context.ts'
import { addBroadcasts, dropBroadcasts, prepareBroadcasts } from './broadcast.ts'
import { sendBroadcast } from './broadcast-wave.ts'
import { convergeDevice, runningCampaign } from './converge.ts'
import { newEpoch } from './create-key.ts'
import { entitledDevices } from './membership.ts'
import { hex } from './message.ts'
import { callerName, perform, type Transaction } from './perform.ts'
import { findAll, inChunks } from './rows.ts'
import { inTurn } from './turn.ts'

const system: Caller = { kind: 'system', id: 'rotation', from: 'server' }
/** Devices that are worked on at a time: enough for group commit to pay, few enough to keep memory flat. */
const atOnce = 64

/** After a revocation nobody waits long: who is away converges on return. */
const urgent: CampaignPolicy = { waves: [1], successThreshold: 0, errorThreshold: 1, deadline: 60_000 }

/** Starts one rotation: a new epoch and a campaign with its targets, in one commit. Throws Problem('conflict') while another one of this key runs. */
export const startRotation = async (
  ctx: Context,
  caller: Caller,
  key: KeyId,
  of: { policy?: { readonly [P in keyof CampaignPolicy]?: CampaignPolicy[P] | undefined }; because: string; supersede?: boolean },
): Promise<{ campaign: string; epoch: number }> => {
  const policy = policyFrom(of.policy ?? {})
  const id = `${ctx.now().toString(36)}-${hex(ctx.random(4))}`
  await prepareBroadcasts(ctx, key)
  const epoch = await perform(ctx, { caller, action: 'key.rotate', subject: key, detail: of.because }, async (tx) => {
    const row = await ctx.store.get('key', key)
    if (row === undefined) throw new Problem('not-found', `no key ${key}`)
    const running = await runningCampaign(ctx, key)
    if (running !== undefined) {
      if (of.supersede !== true && !(await onlyRetires(ctx, running)))
        throw new Problem('conflict', `campaign ${running.id} of key ${key} is ${running.state}: finish or abort it first`)
      await supersede(ctx, tx, running)
    }
    const to = Epoch.parse(row.latest + 1)
    const devices = await entitledDevices(ctx, key, id)
    const made = newEpoch(ctx, key, to, 'pre-activation')
    tx.insert('epoch', made)
    await addBroadcasts(ctx, tx, row, { ...made, version: 0 })
    tx.update('key', { ...row, latest: to })
    tx.insert('campaign', {
      id,
      key,
      from: row.current,
      to,
      state: 'installing',
      resumeTo: null,
      because: of.because,
      createdAt: ctx.now(),
      createdBy: callerName(caller),
      finishedAt: null,
      policy,
      wave: 0,
      waves: policy.waves.length,
      since: ctx.now(),
    })
    for (const [at, device] of devices.entries()) {
      const wave = waveOf(at, devices.length, policy.waves)
      tx.insert('target', {
        id: `${id}/${device}`,
        campaign: id,
        device,
        wave,
        stage: 'pending',
        place: placeOf(id, wave, 'pending'),
        changedAt: ctx.now(),
        reason: null,
      })
    }
    tx.note(`campaign ${id}: epoch ${to}, ${devices.length} devices, ${policy.waves.length} waves`)
    return to
  })
  // A crash here: the campaign stands; the clock goes on with it after the restart.
  ctx.step('rotate.started')
  ctx.wake(id)
  return { campaign: id, epoch }
}

const policyFrom = (input: { readonly [P in keyof CampaignPolicy]?: CampaignPolicy[P] | undefined }): CampaignPolicy => {
  const waves = input.waves ?? defaultPolicy.waves
  if (waves.some((share, at) => share <= (waves[at - 1] ?? 0)) || waves.at(-1) !== 1)
    throw new Problem('malformed', 'waves are ascending shares of the targets that end with 1, such as 0.1,0.5,1', { reason: 'campaign.waves' })
  return {
    waves,
    successThreshold: input.successThreshold ?? defaultPolicy.successThreshold,
    errorThreshold: input.errorThreshold ?? defaultPolicy.errorThreshold,
    deadline: input.deadline ?? defaultPolicy.deadline,
  }
}

/** Every device has proven the new epoch or was given up: what is left is to retire the old one, which a newer rotation does as well. */
const onlyRetires = async (ctx: Context, campaign: Campaign): Promise<boolean> => {
  if (campaign.state === 'retiring') return true
  if (campaign.state !== 'activating') return false
  return (await progressOf(ctx, campaign)).every((counts) => counts.pending + counts.delivered + counts.installed === 0)
}

/** Ends a rotation that a newer one overtakes: an epoch that was never active is destroyed. */
const supersede = async (ctx: Context, tx: Transaction, running: Campaign): Promise<void> => {
  const state = (await onlyRetires(ctx, running)) ? 'done' : 'aborted'
  tx.update('campaign', { ...running, state, finishedAt: ctx.now() })
  await dropUnused(ctx, tx, running)
  tx.note(`supersedes campaign ${running.id}`)
}

const dropUnused = async (ctx: Context, tx: Transaction, campaign: Campaign): Promise<void> => {
  const epoch = await ctx.store.get('epoch', `${campaign.key}/${campaign.to}`)
  if (epoch?.state !== 'pre-activation') return
  tx.update('epoch', moved(epoch, 'destroyed', ctx.now()))
  await dropBroadcasts(ctx, tx, epoch.id)
}

/** Rotates these keys at once, whatever else runs: somebody must not read on. The campaigns. */
export const rotateKeys = async (ctx: Context, keys: readonly KeyId[], because: string): Promise<readonly string[]> => {
  const campaigns: string[] = []
  for (const key of keys) campaigns.push((await startRotation(ctx, system, key, { policy: urgent, because, supersede: true })).campaign)
  return campaigns
}

/** Targets per wave and stage, counted. */
export const progressOf = async (ctx: Context, campaign: Campaign): Promise<Progress> =>
  await Promise.all(
    Array.from({ length: campaign.waves }, async (_, wave) => {
      const counts = await Promise.all(
        stages.map(async (stage) => [stage, await ctx.store.count('target', { place: placeOf(campaign.id, wave, stage) })] as const),
      )
      return Object.fromEntries(counts) as Record<Stage, number>
    }),
  )

const readableUntil = async (ctx: Context, campaign: Campaign): Promise<number | null> => {
  const [key, old] = await Promise.all([ctx.store.get('key', campaign.key), ctx.store.get('epoch', `${campaign.key}/${campaign.from}`)])
  return key === undefined || old === undefined || old.deactivatedAt === null ? null : old.deactivatedAt + key.recipientUsage
}

/** Takes every step that a campaign can take now. When to look again even if nothing happens; null when only an event can change it. */
export const drive = async (ctx: Context, id: string): Promise<number | null> =>
  await inTurn(ctx.store, `campaign/${id}`, async () => {
    await deliverOpenWaves(ctx, id)
    for (;;) {
      const campaign = await ctx.store.get('campaign', id)
      if (campaign === undefined) return null
      const step = nextStep(campaign, await progressOf(ctx, campaign), ctx.now(), await readableUntil(ctx, campaign))
      if (step.do === 'wait') return step.until
      await take(ctx, campaign, step)
    }
  })

/** Deliveries to targets of open waves that are connected and have none yet (a crash, or a connection that came between). */
const deliverOpenWaves = async (ctx: Context, id: string): Promise<void> => {
  const campaign = await ctx.store.get('campaign', id)
  if (campaign?.state !== 'installing') return
  for (let wave = 0; wave <= campaign.wave; wave++) await convergeTargets(ctx, campaign, [wave], ['pending'])
}

const convergeTargets = async (ctx: Context, campaign: Campaign, waves: readonly number[], of: readonly Stage[]): Promise<void> => {
  for (const wave of waves)
    for (const stage of of) {
      const targets = (await findAll(ctx.store, 'target', { where: { place: placeOf(campaign.id, wave, stage) } })).filter(({ device }) =>
        ctx.bus.online(device),
      )
      const others = await sendBroadcast(ctx, campaign, targets, stage)
      await inChunks(others, atOnce, ({ device }) => convergeDevice(ctx, device))
    }
}

const take = async (ctx: Context, campaign: Campaign, step: Exclude<Step, { do: 'wait' }>): Promise<void> => {
  const waves = Array.from({ length: campaign.waves }, (_, wave) => wave)
  const change = async (detail: string, work: (tx: Transaction, now: Campaign) => Promise<void> | void): Promise<void> => {
    await perform(ctx, { caller: system, action: 'campaign.step', subject: campaign.id, detail }, async (tx) => {
      const now = await ctx.store.get('campaign', campaign.id)
      // Somebody paused or aborted it meanwhile: this step is not due any more.
      if (now === undefined || now.state !== campaign.state || now.wave !== campaign.wave) return tx.note('not due any more')
      await work(tx, now)
    })
    // A crash here: the step is done or not done as a whole; the clock asks again after the restart.
    ctx.step(`rotate.${step.do}`)
  }
  switch (step.do) {
    case 'halt':
      return await change(`halt: ${step.because}`, (tx, now) => tx.update('campaign', { ...now, state: 'halted', resumeTo: runningState(now) }))
    case 'time-out':
      return await timeOut(ctx, campaign, step.waves, step.stages)
    case 'open-wave':
      await change(`wave ${step.wave + 1} of ${campaign.waves} opens`, (tx, now) => tx.update('campaign', { ...now, wave: step.wave, since: ctx.now() }))
      return await convergeTargets(ctx, campaign, [step.wave], ['pending'])
    case 'activate':
      await change(`epoch ${campaign.to} active`, (tx, now) => activate(ctx, tx, now))
      await convergeTargets(ctx, campaign, waves, ['installed'])
      return await convergeOthers(ctx, campaign)
    case 'retire':
      await change(`epochs below ${campaign.to} retire`, (tx, now) => tx.update('campaign', { ...now, state: 'retiring', since: ctx.now() }))
      return await convergeTargets(ctx, campaign, waves, ['active'])
    case 'finish':
      await change('done', (tx, now) => tx.update('campaign', { ...now, state: 'done', finishedAt: ctx.now() }))
      return await destroyEpochs(ctx, campaign.key)
  }
}

const runningState = (campaign: Campaign): Campaign['resumeTo'] =>
  campaign.state === 'installing' || campaign.state === 'activating' || campaign.state === 'retiring' ? campaign.state : campaign.resumeTo

/** One commit takes the new epoch into use and the old one out of it: there is never none and never two. */
const activate = async (ctx: Context, tx: Transaction, campaign: Campaign): Promise<void> => {
  const [key, next, old] = await Promise.all([
    ctx.store.get('key', campaign.key),
    ctx.store.get('epoch', `${campaign.key}/${campaign.to}`),
    ctx.store.get('epoch', `${campaign.key}/${campaign.from}`),
  ])
  if (key === undefined || next === undefined) throw new Problem('internal', `campaign ${campaign.id} without its key`)
  tx.update('epoch', moved(next, 'active', ctx.now()))
  if (old?.state === 'active') tx.update('epoch', moved(old, 'deactivated', ctx.now()))
  tx.update('key', { ...key, current: campaign.to })
  tx.update('campaign', { ...campaign, state: 'activating', since: ctx.now() })
}

/** Devices that joined since the rotation began hold the key without being targets. */
const convergeOthers = async (ctx: Context, campaign: Campaign): Promise<void> => {
  const devices = (await entitledDevices(ctx, campaign.key)).filter((device) => ctx.bus.online(device))
  await inChunks(devices, atOnce, async (device) => {
    if ((await ctx.store.get('target', `${campaign.id}/${device}`)) === undefined) await convergeDevice(ctx, device)
  })
}

const timeOut = async (ctx: Context, campaign: Campaign, waves: readonly number[], of: readonly Stage[]): Promise<void> => {
  for (const wave of waves)
    for (const stage of of) {
      const targets = await findAll(ctx.store, 'target', { where: { place: placeOf(campaign.id, wave, stage) } })
      for (let start = 0; start < targets.length; start += 500) {
        const some = targets.slice(start, start + 500)
        await perform(
          ctx,
          { caller: system, action: 'campaign.step', subject: campaign.id, detail: `${some.length} devices timed out while ${stage}` },
          async (tx) => {
            for (const { id } of some) {
              const now = await ctx.store.get('target', id)
              if (now?.stage === stage) tx.update('target', inStage(now, 'timed-out', ctx.now(), `silent while ${stage}`))
            }
          },
        )
        ctx.step('rotate.time-out')
      }
    }
}

/**
 * Destroys superseded epochs whose recipient-usage period is over and which no device holds any more (a device that is away keeps its epoch alive until it
 * returns and has proven a newer one, or is revoked).
 */
export const destroyEpochs = async (ctx: Context, key: KeyId): Promise<void> => {
  const row = await ctx.store.get('key', key)
  if (row === undefined) return
  for (const epoch of await findAll(ctx.store, 'epoch', { where: { key } })) {
    if (epoch.state !== 'deactivated' || epoch.deactivatedAt === null || ctx.now() < epoch.deactivatedAt + row.recipientUsage) continue
    const held = await Promise.all(
      (['delivered', 'installed', 'active'] as const).map((stage) => ctx.store.count('holding', { place: `${epoch.id}/${stage}` })),
    )
    if (held.some((count) => count > 0)) continue
    await perform(ctx, { caller: system, action: 'key.destroy', subject: epoch.id, detail: 'recipient usage over, no device holds it' }, async (tx) => {
      const now = await ctx.store.get('epoch', epoch.id)
      if (now?.state !== 'deactivated') return
      tx.update('epoch', moved(now, 'destroyed', ctx.now()))
      await dropBroadcasts(ctx, tx, epoch.id)
    })
    // A crash here: the material is gone from the store.
    ctx.step('key.destroyed')
  }
}

/** Pause, resume and abort: what an operator may do to a running campaign. The campaign afterwards. */
export const controlCampaign = async (ctx: Context, caller: Caller, id: string, order: 'pause' | 'resume' | 'abort'): Promise<Campaign> => {
  await perform(ctx, { caller, action: `campaign.${order}`, subject: id }, async (tx) => {
    const campaign = await ctx.store.get('campaign', id)
    if (campaign === undefined) throw new Problem('not-found', `no campaign ${id}`)
    const running = campaign.state === 'installing' || campaign.state === 'activating' || campaign.state === 'retiring'
    const stopped = campaign.state === 'paused' || campaign.state === 'halted'
    if (order === 'resume' ? !stopped : order === 'pause' ? !running : !running && !stopped)
      throw new Problem('conflict', `campaign ${id} is ${campaign.state}`)
    if (order === 'pause') return tx.update('campaign', { ...campaign, state: 'paused', resumeTo: runningState(campaign) })
    if (order === 'resume') return tx.update('campaign', { ...campaign, state: campaign.resumeTo ?? 'installing', resumeTo: null, since: ctx.now() })
    tx.update('campaign', { ...campaign, state: 'aborted', finishedAt: ctx.now() })
    return await dropUnused(ctx, tx, campaign)
  })
  ctx.step(`campaign.${order}`)
  ctx.wake(id)
  const now = await ctx.store.get('campaign', id)
  if (now === undefined) throw new Problem('not-found', `no campaign ${id}`)
  return now
}
