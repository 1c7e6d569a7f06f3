import assert from 'node:assert/strict'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import {
  gaveUp,
  inState,
  inStage,
  isForward,
  isRunning,
  isUnfinished,
  newTarget,
  running,
  stages,
  started,
  startsOver,
  transitions,
  turnOf,
  unfinishedIn,
  waveOf,
  withWave,
  type Campaign,
  type CampaignPolicy,
  type CampaignState,
  type Stage,
  type Target,
} from './campaign.ts'
import { countedIn, nextStep, type Facts, type Step } from './next-step.ts'
import { windowAt } from './window.ts'

/**
 * A model of a campaign with its devices, persons and clock: everything that happens, in any order, and the pure core alone decides. The model carries steps out with the
 * same pure changes as the server (flows/drive.ts), and judges each of them by arithmetic of its own.
 */
export type Order = 'approve' | 'pause' | 'resume' | 'abort' | 'retry' | 'rollback' | 'advance' | 'confirm' | 'join'

/** What a device may do. */
export type Deed = 'go-on' | 'fail' | 'return' | 'leave' | 'quarantine'

export interface Model {
  campaign: Campaign
  targets: Target[]
  now: number
  approved: boolean
  readableUntil: number | null
  /** How long the old epoch may be read. */
  readonly readers: number
}

/** What the models of this process came to. */
export const seen = { states: new Set<CampaignState>(), edges: new Set<string>(), steps: new Set<string>(), waits: new Set<string>() }

/** `current`: a campaign without a new epoch, and every other device has proven it. */
export const begin = (policy: CampaignPolicy, { devices, current, readers }: { devices: number; current: boolean; readers: number }): Model => ({
  campaign: {
    id: 'c',
    version: 1,
    key: KeyId.parse('k'),
    from: current ? 2 : 1,
    to: Epoch.parse(2),
    state: 'preparing',
    resumeTo: null,
    because: 'model',
    createdAt: 0,
    createdBy: 'model',
    finishedAt: null,
    policy,
    wave: 0,
    waves: policy.waves.length,
    since: 0,
    sizes: [],
    opened: [],
    due: 0,
    succeededAt: null,
    cleared: -1,
    approval: policy.approval ? 'a' : null,
    mayCut: policy.overlap === 'strict' ? 0 : null,
    halted: null,
  },
  targets: Array.from({ length: devices }, (_, at) => ({
    ...newTarget(
      { campaign: 'c', device: `d${at}` as never, wave: waveOf(at, devices, policy.waves), ...(current && at % 2 === 0 ? { stage: 'already-current' } : {}) },
      0,
    ),
    version: 1,
  })),
  now: 0,
  approved: false,
  readableUntil: null,
  readers,
})

const count = ({ targets }: Model, wave: number, ...of: Stage[]): number => targets.filter((one) => one.wave === wave && of.includes(one.stage)).length

const factsOf = (model: Model): Facts => {
  const { campaign, targets } = model
  const open = campaign.state === 'installing' ? campaign.wave + 1 : isRunning(campaign.state) ? campaign.waves : 0
  const progress = Array.from({ length: open }, (_, wave) => ({
    total: campaign.sizes[wave] ?? 0,
    counts: Object.fromEntries(countedIn(campaign.state).map((stage) => [stage, targets.filter((one) => one.wave === wave && one.stage === stage).length])),
  }))
  return { progress, now: model.now, readableUntil: campaign.state === 'activating' ? model.readableUntil : null, approved: model.approved }
}

const become = (model: Model, next: Campaign): void => {
  if (next.state !== model.campaign.state) {
    assert.ok((transitions[model.campaign.state] as readonly string[]).includes(next.state), `${model.campaign.state} to ${next.state}`)
    seen.edges.add(`${model.campaign.state} ${next.state}`)
  }
  seen.states.add(next.state)
  model.campaign = next
}

/** Numbers of a wave, by their definition: [those it is judged by, errors, successes]. Exact, in millionths. */
const judged = (model: Model, wave: number): readonly [bigint, bigint, bigint] => {
  const { policy, state } = model.campaign
  const away = count(model, wave, 'timed-out')
  const base = model.targets.filter((one) => one.wave === wave).length - count(model, wave, 'left', 'quarantined') - (policy.silent === 'neither' ? away : 0)
  const errors = count(model, wave, 'failed') + (policy.silent === 'error' ? away : 0)
  return [BigInt(base), BigInt(errors), BigInt(base - errors - count(model, wave, ...unfinishedIn(state)))]
}
const millionths = (share: number): bigint => BigInt(Math.round(share * 1e6))
const isFailing = (model: Model): boolean => {
  const { state, wave, waves, policy } = model.campaign
  return Array.from({ length: state === 'installing' ? wave + 1 : waves }, (_, at) => judged(model, at)).some(
    ([base, errors]) => errors * 1_000_000n > millionths(policy.errorThreshold) * base,
  )
}
const hasSucceeded = (model: Model): boolean => {
  const [base, , succeeded] = judged(model, model.campaign.wave)
  return succeeded * 1_000_000n >= millionths(model.campaign.policy.successThreshold) * base
}

/** Judges a step by what stands in docs/campaigns.md, then carries it out. */
const take = (model: Model, step: Exclude<Step, { do: 'wait' }>): void => {
  const { campaign, now } = model
  const { policy } = campaign
  seen.steps.add(step.do)
  const isOpen = policy.window === null || windowAt(policy.window, now).open
  switch (step.do) {
    case 'prepare': {
      const sizes = Array.from({ length: campaign.waves }, (_, wave) => model.targets.filter((one) => one.wave === wave).length)
      return become(model, campaign.approval === null ? started({ ...campaign, sizes }, now) : inState({ ...campaign, sizes }, 'waiting'))
    }
    case 'start':
      assert.ok(campaign.approval === null || model.approved, 'starts without its approval')
      return become(model, started(campaign, now))
    case 'halt': {
      const [, , succeeded] = judged(model, campaign.wave)
      const hopeless = campaign.state === 'installing' && !hasSucceeded(model) && count(model, campaign.wave, 'pending', 'delivered') === 0
      assert.ok(isFailing(model) || hopeless, `halts at ${step.because}, ${succeeded}`)
      return become(model, { ...inState(campaign, 'halted'), halted: step.because })
    }
    case 'soak':
      assert.equal(step.since !== null, hasSucceeded(model) && step.since === now)
      return become(model, { ...campaign, succeededAt: step.since })
    case 'open-wave':
    case 'activate': {
      assert.ok(!isFailing(model), 'goes on above its error threshold')
      assert.ok(hasSucceeded(model), 'goes on below its success threshold')
      assert.ok(isOpen, 'goes on outside its window')
      assert.ok(policy.soak === 0 || (campaign.succeededAt !== null && now >= campaign.succeededAt + policy.soak), 'has not soaked')
      assert.ok(policy.advance === 'automatic' || campaign.cleared >= campaign.wave, 'nobody let it pass')
      assert.ok(policy.startAt === null || now >= policy.startAt, 'before its start time')
      if (step.do === 'open-wave') {
        assert.equal(step.wave, campaign.wave + 1)
        return become(model, withWave(campaign, step.wave, now))
      }
      assert.equal(campaign.wave, campaign.waves - 1)
      for (let wave = 0; wave < campaign.waves; wave++) assert.equal(count(model, wave, 'pending', 'delivered'), 0)
      model.readableUntil = campaign.from === campaign.to ? null : now + model.readers
      return become(model, running(campaign, 'activating', now))
    }
    case 'retire': {
      assert.ok(model.readableUntil === null || now >= model.readableUntil, 'the old epoch may still be read')
      const behind = model.targets.filter(({ stage }) => ['pending', 'delivered', 'installed', 'failed', 'timed-out'].includes(stage)).length
      // Nobody loses the old epoch unless a person has agreed to it.
      assert.ok(behind <= (policy.overlap === 'strict' ? (campaign.mayCut ?? 0) : 0), `${behind} lose the old epoch`)
      return become(model, running(campaign, 'retiring', now))
    }
    case 'finish':
      return become(model, { ...inState(campaign, 'done'), finishedAt: now })
    case 'time-out': {
      let due = now + policy.deadline
      const unfinished = unfinishedIn(campaign.state)
      model.targets = model.targets.map((target) => {
        if (target.wave > campaign.wave || !unfinished.includes(target.stage)) return target
        const end = turnOf(campaign, target, now) + policy.deadline
        if (end > now) {
          due = Math.min(due, end)
          return target
        }
        return gaveUp(target, { stage: 'timed-out', retries: policy.retries, reason: null, at: now })
      })
      return become(model, { ...campaign, due: Math.max(due, now + Math.ceil(policy.deadline / 20)) })
    }
  }
}

/** Everything that is due, as the server does after each event. */
export const drive = (model: Model): Extract<Step, { do: 'wait' }> => {
  for (let steps = 0; ; steps++) {
    assert.ok(steps < 200, 'it does not come to wait')
    const facts = factsOf(model)
    const step = nextStep(model.campaign, facts)
    assert.deepEqual(nextStep(model.campaign, facts), step)
    // I15: the stages add up, at any time.
    if (model.campaign.sizes.length > 0) {
      assert.equal(
        model.campaign.sizes.reduce((sum, size) => sum + size, 0),
        model.targets.length,
      )
      for (const [wave, size] of model.campaign.sizes.entries()) assert.equal(count(model, wave, ...stages), size)
    }
    // It halts as soon as it is above its threshold, and not before.
    if (model.campaign.state === 'installing' || model.campaign.state === 'activating')
      assert.ok(step.do === 'halt' || !isFailing(model), 'it does not halt above its threshold')
    if (step.do === 'wait') {
      seen.waits.add(step.for)
      assert.ok(step.until === null || step.until > model.now, `waits for ${step.for} until ${step.until}, which is over`)
      return step
    }
    take(model, step)
  }
}

export const say = (model: Model, at: number, does: Deed): void => {
  const target = model.targets[at % Math.max(1, model.targets.length)]
  const { state, wave, policy } = model.campaign
  if (target === undefined || !isUnfinished(state)) return
  const put = (next: Target): void => void (model.targets = model.targets.map((one) => (one.id === next.id ? next : one)))
  const open = target.wave <= wave && (policy.window === null || windowAt(policy.window, model.now).open)
  switch (does) {
    case 'go-on': {
      if (state === 'installing' && target.stage === 'pending' && open) put(inStage(target, 'delivered', model.now))
      else if (target.stage === 'delivered') put(inStage(target, 'installed', model.now))
      else if (target.stage === 'installed' && state === 'activating') put(inStage(target, 'active', model.now))
      else if (target.stage === 'active' && state === 'retiring') put(inStage(target, 'retired', model.now))
      return
    }
    case 'fail':
      if (target.stage === 'delivered' || (target.stage === 'installed' && state === 'activating'))
        put(gaveUp(target, { stage: 'failed', retries: isRunning(state) ? policy.retries : 0, reason: 'model', at: model.now }))
      return
    case 'return': {
      const to = state === 'activating' || state === 'retiring' ? 'active' : 'installed'
      if ((target.stage === 'timed-out' || target.stage === 'failed') && isForward(target.stage, to) && target.wave <= wave) put(inStage(target, to, model.now))
      return
    }
    default:
      if (['pending', 'delivered', 'installed', 'active', 'failed', 'timed-out'].includes(target.stage))
        put(inStage(target, does === 'leave' ? 'left' : 'quarantined', model.now))
  }
}

export const orders: Readonly<Record<Order, (model: Model) => void>> = {
  approve: (model) => void (model.approved = true),
  pause: (model) => isRunning(model.campaign.state) && become(model, inState(model.campaign, 'paused')),
  resume: (model) => {
    const { state, resumeTo } = model.campaign
    if (state === 'paused' || state === 'halted') become(model, running(model.campaign, resumeTo ?? 'installing', model.now))
  },
  abort: (model) => isUnfinished(model.campaign.state) && become(model, inState(model.campaign, 'aborted')),
  retry: (model) => {
    const { state, resumeTo } = model.campaign
    if (!isRunning(state) && state !== 'paused' && state !== 'halted') return
    const phase = isRunning(state) ? state : (resumeTo ?? 'installing')
    const from = phase === 'installing' ? 'pending' : phase === 'activating' ? 'installed' : 'active'
    model.targets = model.targets.map((one) => (one.stage === 'failed' || one.stage === 'timed-out' ? startsOver(one, from, model.now) : one))
    if (isRunning(state)) model.campaign = { ...model.campaign, due: Math.min(model.campaign.due, model.now + model.campaign.policy.deadline) }
    else become(model, running(model.campaign, phase, model.now))
  },
  rollback: (model) => (model.campaign.state === 'paused' || model.campaign.state === 'halted') && become(model, inState(model.campaign, 'rolled-back')),
  advance: (model) => model.campaign.state === 'installing' && become(model, { ...model.campaign, cleared: model.campaign.wave }),
  confirm: (model) =>
    become(model, {
      ...model.campaign,
      mayCut: model.targets.filter(({ stage }) => ['pending', 'delivered', 'installed', 'failed', 'timed-out'].includes(stage)).length,
    }),
  join: (model) => {
    const { state, policy, wave, sizes } = model.campaign
    if (state !== 'installing' || policy.targets === 'frozen') return
    model.targets.push({ ...newTarget({ campaign: 'c', device: `d${model.targets.length}` as never, wave, stage: 'delivered' }, model.now), version: 1 })
    model.campaign = { ...model.campaign, sizes: sizes.map((size, at) => (at === wave ? size + 1 : size)) }
  },
}

/** What the campaign waits for happens. */
export const help = (model: Model, wait: Extract<Step, { do: 'wait' }>): void => {
  if (wait.for === 'approval') orders.approve(model)
  else if (wait.for === 'person') orders.advance(model)
  else if (wait.for === 'confirmation') orders.confirm(model)
  else if (wait.for === 'stragglers') for (const at of model.targets.keys()) say(model, at, 'return')
  else {
    const before = JSON.stringify(model.targets)
    for (const at of model.targets.keys()) say(model, at, 'go-on')
    if (JSON.stringify(model.targets) === before) model.now = wait.until ?? model.now
  }
}
