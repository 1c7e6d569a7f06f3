import assert from 'node:assert/strict'
import { expect, test } from 'vitest'
import { defaultPolicy, faultOf, isRunning, isUnfinished, turnOf, unfinishedIn, type Campaign, type CampaignPolicy, type Target } from './campaign.ts'
import { begin, drive, orders, say, type Deed, type Model, type Order } from './test-model.ts'

/**
 * Every state that small campaigns can come to, not a sample of them: breadth first, until nothing new turns up. One tick is the deadline, the soak time and the recipient-usage period
 * at once, so that a time is either over or not, and the states are finitely many.
 */
const tick = 1
/** When a state is looked at: all its times stand relative to this. */
const here = 10 * tick

const switches = {
  silent: ['success', 'error', 'neither'],
  overlap: ['patient', 'strict'],
  successThreshold: [0, 0.5, 1],
  errorThreshold: [0, 0.5, 1],
} as const satisfies Partial<Record<keyof CampaignPolicy, readonly unknown[]>>
/** What a campaign may have besides: each by itself, and all of it. */
const extras: readonly Partial<CampaignPolicy>[] = [
  {},
  { soak: tick },
  { advance: 'manual' },
  { retries: 1 },
  { targets: 'live' },
  { approval: true, startAt: here + tick },
  { soak: tick, advance: 'manual', targets: 'live', approval: true, startAt: here + tick },
]

const names = Object.keys(switches) as (keyof typeof switches)[]

const policyOf = (extra: Partial<CampaignPolicy>, at: readonly number[]): CampaignPolicy => ({
  ...defaultPolicy,
  deadline: tick,
  waves: [{ devices: 1 }, 1],
  ...extra,
  ...Object.fromEntries(names.map((name, index) => [name, switches[name][(at[index] ?? 0) % switches[name].length]])),
})

/** Every combination of the switches under every extra. */
const everyPolicy = (): readonly CampaignPolicy[] =>
  extras.flatMap((extra) =>
    names
      .reduce<readonly (readonly number[])[]>((all, name) => all.flatMap((at) => switches[name].map((_, value) => [...at, value])), [[]])
      .map((at) => policyOf(extra, at)),
  )
/** Every value of every switch under every extra, and every two thresholds together. */
const somePolicies = (): readonly CampaignPolicy[] =>
  extras.flatMap((extra, at) => [0, 1, 2].map((turn) => policyOf(extra, [at + turn, at + turn, turn, (at + 1) * turn + at])))

/** The same state as others that behave alike from here on: a time that is over is over, however long ago, and devices of one wave are alike. */
const canonical = (model: Model): Model => {
  const { campaign, now } = model
  const { state, policy } = campaign
  const age = (at: number): number => here - Math.min(tick, Math.max(0, now - at))
  const ahead = (at: number): number => here + Math.min(tick, Math.max(0, at - now))
  const unfinished = unfinishedIn(state)
  // A deadline counts from the latest of several moments (`turnOf`): all that is kept of them is that one.
  const turn = (target: Target): number => (unfinished.includes(target.stage) ? age(turnOf(campaign, target, now)) : 0)
  const targets = model.targets.map((target): Target => ({ ...target, changedAt: turn(target), reason: null }))
  const key = (target: Target): string => `${target.wave} ${target.stage} ${target.changedAt} ${target.attempts ?? 0}`
  targets.sort((one, other) => (key(one) < key(other) ? -1 : 1))
  const startAt = policy.startAt === null ? null : ahead(policy.startAt)
  const next: Campaign = {
    ...campaign,
    policy: { ...policy, startAt },
    since: 0,
    opened: campaign.opened.map(() => 0),
    finishedAt: null,
    due: isRunning(state) ? ahead(campaign.due) : 0,
    succeededAt: campaign.succeededAt === null ? null : age(campaign.succeededAt),
    halted: campaign.halted === null ? null : 'it halted',
  }
  return {
    ...model,
    now: here,
    readableUntil: model.readableUntil === null ? null : ahead(model.readableUntil),
    campaign: next,
    targets: targets.map((target, at) => ({ ...target, id: `c/d${at}` })),
  }
}

const nameOf = ({ campaign, targets, approved, readableUntil }: Model): string =>
  [
    campaign.state,
    campaign.resumeTo,
    campaign.wave,
    campaign.sizes,
    campaign.opened.length,
    campaign.due,
    campaign.succeededAt,
    campaign.cleared,
    campaign.mayCut,
    campaign.halted,
    campaign.policy.startAt,
    approved,
    readableUntil,
    targets.map(({ wave, stage, changedAt, attempts = 0 }) => `${wave}${stage}${changedAt}${attempts}`),
  ].join(' ')

const copy = (model: Model): Model => ({ ...model, targets: [...model.targets] })

const deeds: readonly Deed[] = ['go-on', 'fail', 'return', 'leave', 'quarantine']

interface Space {
  /** What leads on from each state, and by what; nothing leads on from one that is over. */
  readonly states: ReadonlyMap<string, { readonly model: Model; readonly next: ReadonlyMap<string, string> }>
  readonly transitions: number
}

/** Everything that a campaign of this policy over so many devices may come to. Each step on the way is judged by the model (`take`, `drive`). */
const explore = (policy: CampaignPolicy, devices: number, current: boolean): Space => {
  const happenings: (readonly [string, (model: Model) => unknown])[] = [
    ['time passes', (model) => (model.now += tick)],
    ...(Object.keys(orders) as Order[])
      // Orders that a policy has no use for change nothing that counts.
      .filter((order) => (order !== 'advance' || policy.advance === 'manual') && (order !== 'confirm' || policy.overlap === 'strict'))
      .filter((order) => (order !== 'approve' || policy.approval) && (order !== 'join' || policy.targets === 'live'))
      .map((order): readonly [string, (model: Model) => unknown] => [
        order,
        (model) => (order !== 'join' || model.targets.length <= devices) && orders[order](model),
      ]),
    ...Array.from({ length: devices + 1 }, (_, at) => at).flatMap((at) =>
      deeds.map((deed): readonly [string, (model: Model) => unknown] => [`${at} ${deed}`, (model) => at < model.targets.length && say(model, at, deed)]),
    ),
  ]
  const first = begin(policy, { devices, current, readers: tick })
  first.now = here
  drive(first)
  const states = new Map<string, { model: Model; next: Map<string, string> }>()
  const queue: string[] = []
  const reached = (model: Model): string => {
    const whole = canonical(model)
    const name = nameOf(whole)
    if (!states.has(name)) {
      states.set(name, { model: whole, next: new Map() })
      queue.push(name)
    }
    return name
  }
  reached(first)
  let transitions = 0
  for (let at = 0; at < queue.length; at++) {
    const state = states.get(queue[at] ?? '')
    if (state === undefined) break
    // Asked again, it has nothing new to say: what is reached is at rest.
    const again = copy(state.model)
    const step = drive(again)
    assert.equal(nameOf(canonical(again)), queue[at])
    if (!isUnfinished(state.model.campaign.state)) {
      assert.deepEqual(step, { do: 'wait', for: 'nothing', until: null })
      continue
    }
    for (const [what, happen] of happenings) {
      const model = copy(state.model)
      try {
        happen(model)
        drive(model)
      } catch (thrown) {
        throw new Error(`${what} in ${queue[at]} under ${JSON.stringify(policy)}`, { cause: thrown })
      }
      state.next.set(what, reached(model))
      transitions++
    }
  }
  return { states, transitions }
}

/** States from which no way leads to its good end, though nobody aborts it or takes it back. */
const stranded = ({ states }: Space): readonly string[] => {
  const before = new Map<string, string[]>()
  for (const [name, { next }] of states)
    for (const [what, to] of next) if (what !== 'abort' && what !== 'rollback') before.set(to, [...(before.get(to) ?? []), name])
  const good = [...states].filter(([, { model }]) => model.campaign.state === 'done').map(([name]) => name)
  const saved = new Set(good)
  for (const name of good)
    for (const one of before.get(name) ?? [])
      if (!saved.has(one)) {
        saved.add(one)
        good.push(one)
      }
  return [...states].filter(([name, { model }]) => !saved.has(name) && isUnfinished(model.campaign.state)).map(([name]) => name)
}

const long = process.env['FLEETKEY_LONG'] === '1'

test(
  'every state of small campaigns: each step is allowed, it halts exactly above its threshold, nothing is said twice, and a way leads to its end',
  { timeout: long ? 3_600_000 : 600_000 },
  () => {
    // Two devices, one in each wave, or one and another that joins; a campaign without a new epoch; in the long run three devices as well.
    const runs = (long ? everyPolicy() : somePolicies()).map((policy) => ({ policy, devices: policy.targets === 'live' && !long ? 1 : 2, current: false }))
    const more = extras.map((extra, at) => policyOf(extra, [at, at, at, at]))
    runs.push(...more.slice(0, long ? more.length : 2).map((policy) => ({ policy, devices: 2, current: true })))
    if (long) runs.push(...more.map((policy) => ({ policy, devices: 3, current: false })))
    let [states, transitions] = [0, 0]
    const ends = new Set<string>()
    for (const { policy, devices, current } of runs) {
      expect(faultOf(policy)).toBeUndefined()
      const space = explore(policy, devices, current)
      expect(stranded(space), JSON.stringify(policy)).toEqual([])
      states += space.states.size
      transitions += space.transitions
      for (const { model } of space.states.values()) if (!isUnfinished(model.campaign.state)) ends.add(model.campaign.state)
    }
    process.stdout.write(`campaigns: ${states} states, ${transitions} ways between them, under ${runs.length} policies\n`)
    expect([...ends].toSorted()).toEqual(['aborted', 'done', 'rolled-back'])
  },
)
