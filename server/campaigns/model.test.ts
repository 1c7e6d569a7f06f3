import fc from 'fast-check'
import { afterAll, expect, test } from 'vitest'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import {
  defaultPolicy,
  faultOf,
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
const minute = 60_000

const policyOf = fc
  .record({
    waves: fc.constantFrom<CampaignPolicy['waves']>([1], [0.5, 1], [0.1, 0.5, 1], [{ devices: 1 }, 1], [{ devices: 2 }, 0.3, 1]),
    successThreshold: fc.constantFrom(0, 0.29, 0.5, 0.95, 1),
    errorThreshold: fc.constantFrom(0, 0.1, 0.29, 0.3, 0.5, 1),
    silent: fc.constantFrom<CampaignPolicy['silent']>('success', 'error', 'neither'),
    advance: fc.constantFrom<CampaignPolicy['advance']>('automatic', 'manual'),
    soak: fc.constantFrom(0, 0, 5 * minute),
    deadline: fc.constantFrom(minute, 10 * minute),
    retries: fc.constantFrom(0, 0, 1, 3),
    window: fc.constantFrom(null, null, { from: 30, minutes: 60, days: [0, 1, 2, 3, 4, 5, 6], offset: 0 }, { from: 0, minutes: 30, days: [5, 6], offset: 60 }),
    startAt: fc.constantFrom(null, null, 20 * minute),
    approval: fc.boolean(),
    overlap: fc.constantFrom<CampaignPolicy['overlap']>('patient', 'strict'),
    targets: fc.constantFrom<CampaignPolicy['targets']>('frozen', 'live'),
  })
  .map((policy): CampaignPolicy => ({ ...defaultPolicy, ...policy }))
  .filter((policy) => faultOf(policy) === undefined)

type Order = 'approve' | 'pause' | 'resume' | 'abort' | 'retry' | 'rollback' | 'advance' | 'confirm' | 'join'

type Happening =
  | { readonly what: 'device'; readonly at: number; readonly does: 'go-on' | 'fail' | 'return' | 'leave' | 'quarantine' }
  | { readonly what: 'help' }
  | { readonly what: 'time'; readonly by: number }
  | { readonly what: 'order'; readonly order: Order }

const happening: fc.Arbitrary<Happening> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      what: fc.constant('device' as const),
      at: fc.nat(11),
      does: fc.constantFrom('go-on' as const, 'go-on' as const, 'go-on' as const, 'fail' as const, 'return' as const, 'leave' as const, 'quarantine' as const),
    }),
  },
  { weight: 3, arbitrary: fc.constant({ what: 'help' as const }) },
  { weight: 2, arbitrary: fc.record({ what: fc.constant('time' as const), by: fc.constantFrom(1, minute, 10 * minute, 60 * minute) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      what: fc.constant('order' as const),
      order: fc.constantFrom<Order>(
        ...([
          'approve',
          'approve',
          'approve',
          'pause',
          'pause',
          'resume',
          'resume',
          'retry',
          'rollback',
          'advance',
          'advance',
          'confirm',
          'join',
          'join',
          'abort',
        ] as const),
      ),
    }),
  },
)

interface Model {
  campaign: Campaign
  targets: Target[]
  now: number
  approved: boolean
  readableUntil: number | null
}

const seen = { states: new Set<CampaignState>(), edges: new Set<string>(), steps: new Set<string>(), waits: new Set<string>() }

const begin = (policy: CampaignPolicy, devices: number, current: boolean): Model => ({
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
    expect((transitions[model.campaign.state] as readonly string[]).includes(next.state)).toBe(true)
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
      expect(campaign.approval === null || model.approved).toBe(true)
      return become(model, started(campaign, now))
    case 'halt': {
      const [, , succeeded] = judged(model, campaign.wave)
      const hopeless = campaign.state === 'installing' && !hasSucceeded(model) && count(model, campaign.wave, 'pending', 'delivered') === 0
      expect(isFailing(model) || hopeless, `${step.because}, ${succeeded}`).toBe(true)
      return become(model, { ...inState(campaign, 'halted'), halted: step.because })
    }
    case 'soak':
      expect(step.since !== null).toBe(hasSucceeded(model) && step.since === now)
      return become(model, { ...campaign, succeededAt: step.since })
    case 'open-wave':
    case 'activate': {
      expect(isFailing(model)).toBe(false)
      expect(hasSucceeded(model)).toBe(true)
      expect(isOpen).toBe(true)
      expect(policy.soak === 0 || (campaign.succeededAt !== null && now >= campaign.succeededAt + policy.soak)).toBe(true)
      expect(policy.advance === 'automatic' || campaign.cleared >= campaign.wave).toBe(true)
      expect(policy.startAt === null || now >= policy.startAt).toBe(true)
      if (step.do === 'open-wave') {
        expect(step.wave).toBe(campaign.wave + 1)
        return become(model, withWave(campaign, step.wave, now))
      }
      expect(campaign.wave).toBe(campaign.waves - 1)
      for (let wave = 0; wave < campaign.waves; wave++) expect(count(model, wave, 'pending', 'delivered')).toBe(0)
      model.readableUntil = campaign.from === campaign.to ? null : now + 30 * minute
      return become(model, running(campaign, 'activating', now))
    }
    case 'retire': {
      expect(model.readableUntil === null || now >= model.readableUntil).toBe(true)
      const behind = model.targets.filter(({ stage }) => ['pending', 'delivered', 'installed', 'failed', 'timed-out'].includes(stage)).length
      // Nobody loses the old epoch unless a person has agreed to it.
      expect(behind).toBeLessThanOrEqual(policy.overlap === 'strict' ? (campaign.mayCut ?? 0) : 0)
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
const drive = (model: Model): Extract<Step, { do: 'wait' }> => {
  for (let steps = 0; ; steps++) {
    expect(steps).toBeLessThan(200)
    const facts = factsOf(model)
    const step = nextStep(model.campaign, facts)
    expect(nextStep(model.campaign, facts)).toStrictEqual(step)
    // I15: the stages add up, at any time.
    if (model.campaign.sizes.length > 0) {
      expect(model.campaign.sizes.reduce((sum, size) => sum + size, 0)).toBe(model.targets.length)
      for (const [wave, size] of model.campaign.sizes.entries()) expect(count(model, wave, ...stages)).toBe(size)
    }
    // It halts as soon as it is above its threshold, and not before.
    if (model.campaign.state === 'installing' || model.campaign.state === 'activating') expect(step.do === 'halt' || !isFailing(model)).toBe(true)
    if (step.do === 'wait') {
      seen.waits.add(step.for)
      if (step.until !== null) expect(step.until).toBeGreaterThan(model.now)
      return step
    }
    take(model, step)
  }
}

const say = (model: Model, at: number, does: Extract<Happening, { what: 'device' }>['does']): void => {
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

const orders: Readonly<Record<Order, (model: Model) => void>> = {
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
const help = (model: Model, wait: Extract<Step, { do: 'wait' }>): void => {
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

const long = process.env['FLEETKEY_LONG'] === '1'

test('whatever devices, persons and the clock do: every step is allowed, it halts exactly at its threshold, its stages add up, and it comes to an end', () =>
  fc.assert(
    fc.property(policyOf, fc.nat(12), fc.boolean(), fc.array(happening, { maxLength: 60, size: 'max' }), (policy, devices, current, happenings) => {
      const model = begin(policy, devices, current)
      seen.states.add('preparing')
      for (const one of happenings) {
        if (one.what === 'time') model.now += one.by
        else if (one.what === 'help') help(model, drive(model))
        else if (one.what === 'device') say(model, one.at, one.does)
        else orders[one.order](model)
        drive(model)
      }
      // In the end everybody does what is asked, and persons see to what waits for them: nothing hangs.
      for (let rounds = 0; isUnfinished(model.campaign.state); rounds++) {
        expect(rounds, JSON.stringify(model.campaign)).toBeLessThan(400)
        const wait = drive(model)
        if (wait.for === 'nothing' && isUnfinished(model.campaign.state)) (rounds > 200 ? orders.rollback : orders.retry)(model)
        else help(model, wait)
      }
      expect(drive(model)).toEqual({ do: 'wait', for: 'nothing', until: null })
    }),
    // The same each time, so that what it covers can be asked below; the long run goes elsewhere.
    long ? { numRuns: 20_000 } : { numRuns: 800, seed: 5 },
  ))

afterAll(() => {
  // Every state, every step, and every way from one to the other was taken. What ends a campaign from outside (a newer one of the same key) is `abort` here, but for `done`.
  expect([...seen.states].toSorted()).toEqual(Object.keys(transitions).toSorted())
  const wanted = Object.entries(transitions).flatMap(([from, to]) => to.map((one) => `${from} ${one}`))
  expect(wanted.filter((edge) => !seen.edges.has(edge))).toEqual([])
  expect([...seen.steps].toSorted()).toEqual(['activate', 'finish', 'halt', 'open-wave', 'prepare', 'retire', 'soak', 'start', 'time-out'])
  expect([...seen.waits].toSorted()).toEqual([
    'approval',
    'confirmation',
    'devices',
    'nothing',
    'person',
    'readers',
    'soak',
    'start-time',
    'stragglers',
    'window',
  ])
})
