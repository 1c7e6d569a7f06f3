import type { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { windowAt, type Window } from './window.ts'

/**
 * States of a campaign and where each leads; no other change is made (`inState`). `docs/campaigns.md` draws this table.
 * `preparing`: its targets are written; `waiting`: for the person who approves it; `scheduled`: for its start time.
 */
export const transitions = {
  preparing: ['waiting', 'scheduled', 'installing', 'aborted'],
  waiting: ['scheduled', 'installing', 'aborted'],
  scheduled: ['installing', 'aborted'],
  installing: ['activating', 'paused', 'halted', 'aborted'],
  activating: ['retiring', 'done', 'paused', 'halted', 'aborted'],
  retiring: ['done', 'paused', 'aborted'],
  paused: ['installing', 'activating', 'retiring', 'aborted', 'rolled-back'],
  halted: ['installing', 'activating', 'aborted', 'rolled-back'],
  done: [],
  aborted: [],
  'rolled-back': [],
} as const satisfies Readonly<Record<string, readonly string[]>>

export type CampaignState = keyof typeof transitions
export type Running = 'installing' | 'activating' | 'retiring'

export const isRunning = (state: CampaignState): state is Running => state === 'installing' || state === 'activating' || state === 'retiring'
/** A campaign that may still act: a key has at most one. */
export const isUnfinished = (state: CampaignState): boolean => transitions[state].length > 0

/** One rotation of one key over a fleet: install everywhere, then activate, then retire. */
export interface Campaign {
  readonly id: string
  readonly version: number
  readonly key: KeyId
  /** The epoch that is replaced (0: there was none), and the one that replaces it. */
  readonly from: number
  readonly to: Epoch
  readonly state: CampaignState
  /** What `resume` goes back to. */
  readonly resumeTo: Running | null
  readonly because: string
  readonly createdAt: number
  readonly createdBy: string
  readonly finishedAt: number | null
  readonly policy: CampaignPolicy
  /** 0-based index of the newest open wave, and how many there are. */
  readonly wave: number
  readonly waves: number
  /** When it began to install, to activate, to retire, or was resumed to it. No deadline counts from before. */
  readonly since: number
  /** Targets of each wave. */
  readonly sizes: readonly number[]
  /** When each open wave opened. */
  readonly opened: readonly number[]
  /** No device runs out of time before. */
  readonly due: number
  /** Since when the newest wave is at its success threshold; null: it is not. Soak time counts from here. */
  readonly succeededAt: number | null
  /** The newest wave that a person has let pass, -1 for none (policy `advance: 'manual'`). */
  readonly cleared: number
  /** The approval that it waits for; null when it needs none. */
  readonly approval: string | null
  /** Devices that a person has agreed to cut off the old epoch (policy `overlap: 'strict'`); null: nobody was asked to, none may be cut. */
  readonly mayCut: number | null
  /** Why it halted. */
  readonly halted: string | null
}

/** Where a wave ends: a share of the targets (0 < share <= 1), or a number of them. */
export type WaveEnd = number | { readonly devices: number }

/** How a campaign goes about it. All times are milliseconds. */
export interface CampaignPolicy {
  /** `frozen`: the devices entitled when its targets are written, right after it was ordered; `live`: whoever comes to be entitled while it installs as well. */
  readonly targets: 'frozen' | 'live'
  /** Ascending, the last is 1: [0.1, 0.5, 1], [{ devices: 10 }, 1]. A wave that ends before it begins is empty, and succeeds. */
  readonly waves: readonly WaveEnd[]
  /** Its members go first, as a wave of their own: everybody else is held back until they have succeeded. */
  readonly canary: GroupId | null
  /** Share of a wave's devices that must have succeeded (at or above) before the next wave opens. Of the last: before the epoch is activated. */
  readonly successThreshold: number
  /** Halts when the share of a wave's devices that failed is strictly above. Judged before success. */
  readonly errorThreshold: number
  /** What a silent device counts as: it is away and converges when it returns; an error; or nothing, as if it were no target. */
  readonly silent: 'success' | 'error' | 'neither'
  /** `manual`: a person opens each wave, and activates, once the thresholds allow it. */
  readonly advance: 'automatic' | 'manual'
  /** How long a wave must stay at its success threshold before the next one opens. */
  readonly soak: number
  /** How long a device may be silent, from when it was its turn, before it becomes `timed-out`; it still converges when it returns. */
  readonly deadline: number
  /** How often a device that failed or was silent is tried again before it counts as such. */
  readonly retries: number
  /** Most devices that have been sent the epoch and have not installed it, at a time. Null: no limit. */
  readonly concurrency: number | null
  /** Nothing is installed or activated outside of it. */
  readonly window: Window | null
  readonly startAt: number | null
  /** Another person has to approve it before it starts. */
  readonly approval: boolean
  /**
   * When the old epoch ends. `patient`: when its recipient-usage period is over and every device has proven the new one. `strict`: when the period is over; devices
   * that have not proven the new epoch then are cut, once a person has agreed to that many.
   */
  readonly overlap: 'patient' | 'strict'
}

export const defaultPolicy: CampaignPolicy = {
  targets: 'frozen',
  waves: [1],
  canary: null,
  successThreshold: 0.95,
  errorThreshold: 0.1,
  silent: 'success',
  advance: 'automatic',
  soak: 0,
  deadline: 3_600_000,
  retries: 0,
  concurrency: null,
  window: null,
  startAt: null,
  approval: false,
  overlap: 'patient',
}

/** What a policy cannot be, in an operator's words; undefined for one that holds together. */
export const faultOf = (policy: CampaignPolicy): string | undefined => {
  const { waves, window, deadline } = policy
  if (waves.at(-1) !== 1) return 'the last wave ends with 1: everybody'
  for (const kind of ['number', 'object']) {
    const ends = waves.filter((end) => typeof end === kind).map((end) => (typeof end === 'number' ? end : end.devices))
    if (ends.some((end, at) => end <= (ends[at - 1] ?? 0))) return 'waves end at ascending shares (0.1,0.5,1) or numbers of devices'
  }
  const open = window === null ? Infinity : window.minutes * 60_000
  if (deadline > open) return 'the deadline is longer than the maintenance window: no device would ever run out of time'
  return undefined
}

/** A row as it was kept by an earlier version, with what is newer than it. */
export const wholeCampaign = (kept: Campaign): Campaign => ({
  ...kept,
  policy: { ...defaultPolicy, ...kept.policy },
  sizes: kept.sizes ?? [],
  opened: kept.opened ?? [],
  due: kept.due ?? 0,
  succeededAt: kept.succeededAt ?? null,
  cleared: kept.cleared ?? -1,
  approval: kept.approval ?? null,
  mayCut: kept.mayCut ?? null,
  halted: kept.halted ?? null,
})

/** The campaign in another state. Throws Problem('conflict') where the table has no such transition. */
export const inState = (campaign: Campaign, state: CampaignState): Campaign => {
  const { state: from } = campaign
  if (!(transitions[from] as readonly CampaignState[]).includes(state))
    throw new Problem('conflict', `campaign ${campaign.id} is ${from}, it cannot become ${state}`, { reason: 'campaign.state' })
  const stops = state === 'paused' || state === 'halted'
  return { ...campaign, state, resumeTo: stops && isRunning(from) ? from : null, halted: state === 'halted' ? campaign.halted : null }
}

/** The campaign running (again) at `now`: deadlines count anew. */
export const running = (campaign: Campaign, state: Running, now: number): Campaign => ({
  ...inState(campaign, state),
  since: now,
  due: now + campaign.policy.deadline,
  succeededAt: null,
})

/** Approved, or in no need of it: it begins, now or at its time. */
export const started = (campaign: Campaign, now: number): Campaign =>
  (campaign.policy.startAt ?? 0) > now && campaign.state !== 'scheduled'
    ? inState(campaign, 'scheduled')
    : { ...running(campaign, 'installing', now), wave: 0, opened: [now] }

/** Its next wave open. */
export const withWave = (campaign: Campaign, wave: number, now: number): Campaign => ({
  ...campaign,
  wave,
  opened: [...campaign.opened.slice(0, wave), now],
  due: Math.min(campaign.due, now + campaign.policy.deadline),
  succeededAt: null,
})

/** Stage of a device within a campaign; `already-current` is an outcome, as are `left` (it does not belong to the key any more) and `quarantined`. */
export const stages = ['pending', 'delivered', 'installed', 'active', 'retired', 'failed', 'timed-out', 'already-current', 'left', 'quarantined'] as const
export type Stage = (typeof stages)[number]

/** `id` is `<campaign>/<device>`. */
export interface Target {
  readonly id: string
  readonly version: number
  readonly campaign: string
  readonly device: DeviceId
  readonly wave: number
  readonly stage: Stage
  /** `<campaign>/<wave>/<stage>`: what counting and picking go by. */
  readonly place: string
  readonly changedAt: number
  readonly reason: string | null
  /** Tries that were used up. */
  readonly attempts?: number
}

export const placeOf = (campaign: string, wave: number, stage: Stage): string => `${campaign}/${wave}/${stage}`

/** A target that nothing has happened to yet. */
export const newTarget = (of: Pick<Target, 'campaign' | 'device' | 'wave'> & { readonly stage?: Stage }, now: number): Omit<Target, 'version'> => {
  const { campaign, device, wave, stage = 'pending' } = of
  return { id: `${campaign}/${device}`, campaign, device, wave, stage, place: placeOf(campaign, wave, stage), changedAt: now, reason: null }
}

/** The target in another stage. */
export const inStage = (target: Target, stage: Stage, now: number, reason: string | null = null): Target => ({
  ...target,
  stage,
  place: placeOf(target.campaign, target.wave, stage),
  changedAt: now,
  reason,
})

const order: Readonly<Partial<Record<Stage, number>>> = { pending: 0, delivered: 1, installed: 2, active: 3, retired: 4 }

/** Whether a device's statement moves its target on: forward only; a device that was given up and returns goes on from where it is. */
export const isForward = (from: Stage, to: Stage): boolean =>
  from === 'timed-out' || from === 'failed' || from === 'quarantined'
    ? to === 'installed' || to === 'active' || to === 'retired'
    : (order[to] ?? -1) > (order[from] ?? 99)

/** Stages of a device that has something before it while a campaign is in this state. */
export const unfinishedIn = (state: CampaignState): readonly Stage[] =>
  state === 'installing' ? ['pending', 'delivered'] : state === 'activating' ? ['pending', 'delivered', 'installed'] : state === 'retiring' ? ['active'] : []

/** Since when it is this device's turn: its deadline counts from then. No time passes for it while nothing is sent. */
export const turnOf = (campaign: Campaign, target: Pick<Target, 'changedAt' | 'wave'>, now: number): number => {
  const window = campaign.state === 'installing' && campaign.policy.window !== null ? windowAt(campaign.policy.window, now) : null
  return Math.max(target.changedAt, campaign.since, campaign.opened[target.wave] ?? 0, window?.open === true ? window.since : 0)
}

/** A device that did not do it in time, or said that it cannot: tried again while its budget lasts, else given up as `stage`. */
export const gaveUp = (
  target: Target,
  of: { readonly stage: 'failed' | 'timed-out'; readonly retries: number; readonly reason: string | null; readonly at: number },
): Target => {
  const attempts = (target.attempts ?? 0) + 1
  if (attempts > of.retries) return inStage(target, of.stage, of.at, of.reason)
  // It starts over with what it lacks: what it has installed it keeps.
  const from = target.stage === 'delivered' ? 'pending' : target.stage
  return { ...inStage(target, from, of.at, `try ${attempts + 1} of ${of.retries + 1}${of.reason === null ? '' : `: ${of.reason}`}`), attempts }
}

/** The stage from which a device that was given up starts over: with `installed` it has the epoch already. */
export const startsOver = (target: Target, stage: 'pending' | 'installed' | 'active', now: number): Target => ({
  ...inStage(target, stage, now, 'tried again'),
  attempts: 0,
})

/** Index after the last target of each wave among `total`. */
export const waveEnds = (waves: readonly WaveEnd[], total: number): readonly number[] => {
  let last = 0
  // A share of a total that floating point puts a hair above a whole number is that number.
  return waves.map((end) => (last = Math.max(last, Math.min(total, typeof end === 'number' ? Math.ceil(end * total - 1e-9) : end.devices))))
}

/** 0-based wave of the target at this place among `total`. */
export const waveOf = (at: number, total: number, waves: readonly WaveEnd[]): number => {
  const wave = waveEnds(waves, total).findIndex((end) => at < end)
  return wave < 0 ? waves.length - 1 : wave
}
