import { unfinishedIn, type Campaign, type Stage } from './campaign.ts'
import { windowAt } from './window.ts'

/** One wave: how many targets it has, and how many of them are in each stage that matters in the state the campaign is in (`countedIn`). */
export interface WaveProgress {
  readonly total: number
  readonly counts: Readonly<Partial<Record<Stage, number>>>
}
/** Wave by wave, all of them. */
export type Progress = readonly WaveProgress[]

/** What the decision rests on besides the campaign itself. */
export interface Facts {
  readonly progress: Progress
  readonly now: number
  /** End of the recipient-usage period of the epoch that is replaced; null when nothing of it is to be read any more. */
  readonly readableUntil: number | null
  /** Whether another person has approved the campaign. */
  readonly approved: boolean
}

/** What a campaign waits for. */
export type Wait =
  | 'approval'
  | 'start-time'
  | 'window'
  | 'devices'
  | 'soak'
  /** Somebody who opens the next wave, or activates. */
  | 'person'
  /** The end of the old epoch's recipient-usage period. */
  | 'readers'
  /** Devices that have not proven the new epoch, and may need the old one. */
  | 'stragglers'
  /** Somebody who agrees to cut them. */
  | 'confirmation'
  /** Nothing: it is over, or stopped. */
  | 'nothing'

/** What a rotation does next. */
export type Step =
  | { readonly do: 'prepare' }
  | { readonly do: 'start' }
  | { readonly do: 'halt'; readonly because: string }
  | { readonly do: 'time-out' }
  | { readonly do: 'soak'; readonly since: number | null }
  | { readonly do: 'open-wave'; readonly wave: number }
  | { readonly do: 'activate' }
  | { readonly do: 'retire' }
  | { readonly do: 'finish' }
  /** `until`: when asking again makes sense even if nothing happens; null: only an event can change it. */
  | { readonly do: 'wait'; readonly for: Wait; readonly until: number | null }

const wait = (what: Wait, until: number | null = null): Step => ({ do: 'wait', for: what, until })

/** Devices of a wave, weighed by the policy. Whoever left or is quarantined is no target any more. */
interface Weighed {
  readonly base: number
  readonly errors: number
  readonly succeeded: number
  readonly unfinished: number
}

const sum = ({ counts }: WaveProgress, of: readonly Stage[]): number => of.reduce((total, stage) => total + (counts[stage] ?? 0), 0)

const weighed = (campaign: Campaign, wave: WaveProgress): Weighed => {
  const { silent } = campaign.policy
  const away = sum(wave, ['timed-out'])
  const failed = sum(wave, ['failed'])
  const unfinished = sum(wave, unfinishedIn(campaign.state))
  const base = wave.total - sum(wave, ['left', 'quarantined']) - (silent === 'neither' ? away : 0)
  const errors = failed + (silent === 'error' ? away : 0)
  return { base, errors, unfinished, succeeded: base - errors - unfinished }
}

/** Shares are exact to a millionth: three of ten are at a threshold of 0.3, whatever floating point makes of it. */
const scale = 1_000_000
const isAbove = (part: number, share: number, whole: number): boolean => part * scale > Math.round(share * scale) * whole

/** Stages whose counts decide while a campaign is in this state: whoever is done with it is not counted, so that a decision costs what is left to do. */
export const countedIn = (state: Campaign['state']): readonly Stage[] =>
  state === 'installing' || state === 'activating' ? [...unfinishedIn(state), 'failed', 'timed-out', 'left', 'quarantined'] : unfinishedIn(state)

/**
 * The decision, pure: same campaign, same facts, same answer; asking twice is harmless, and every step but `wait` changes the campaign or a target, so that it ends.
 * Errors are judged before success.
 */
export const nextStep = (campaign: Campaign, facts: Facts): Step => {
  switch (campaign.state) {
    case 'preparing':
      return { do: 'prepare' }
    case 'waiting':
      return facts.approved ? { do: 'start' } : wait('approval')
    case 'scheduled': {
      const { startAt } = campaign.policy
      return startAt === null || facts.now >= startAt ? { do: 'start' } : wait('start-time', startAt)
    }
    case 'installing':
      return installing(campaign, facts)
    case 'activating':
      return activating(campaign, facts)
    case 'retiring': {
      if (facts.progress.every((wave) => sum(wave, ['active']) === 0)) return { do: 'finish' }
      return facts.now >= campaign.due ? { do: 'time-out' } : wait('devices', campaign.due)
    }
    default:
      return wait('nothing')
  }
}

const installing = (campaign: Campaign, { progress, now }: Facts): Step => {
  const open = progress.slice(0, campaign.wave + 1).map((wave) => weighed(campaign, wave))
  const failing = halt(campaign, open)
  if (failing !== undefined) return failing
  const { policy, wave } = campaign
  const window = policy.window === null ? null : windowAt(policy.window, now)
  if (window?.open === false) return wait('window', window.opens)
  // Nobody runs out of time while nothing is sent.
  const due = Math.max(campaign.due, window === null ? 0 : window.since + policy.deadline)
  const unfinished = open.reduce((total, of) => total + of.unfinished, 0)
  if (unfinished > 0 && now >= due) return { do: 'time-out' }
  const newest = open[wave] ?? { base: 0, errors: 0, succeeded: 0, unfinished: 0 }
  const last = wave === campaign.waves - 1
  const reached = newest.succeeded * scale >= Math.round(policy.successThreshold * scale) * newest.base
  const later = unfinished > 0 ? due : null
  // Everybody of the last wave, and of those before it, has installed the epoch or was given up before it is activated.
  if (!reached || (last && unfinished > 0)) {
    if (campaign.succeededAt !== null) return { do: 'soak', since: null }
    if (!reached && newest.unfinished === 0)
      return { do: 'halt', because: `wave ${wave + 1}: ${newest.succeeded} of ${newest.base} succeeded, ${newest.errors} failed` }
    return wait('devices', later)
  }
  if (policy.soak > 0 && campaign.succeededAt === null) return { do: 'soak', since: now }
  const soaked = campaign.succeededAt === null ? now : campaign.succeededAt + policy.soak
  if (now < soaked) return wait('soak', Math.min(soaked, later ?? soaked))
  if (policy.advance === 'manual' && campaign.cleared < wave) return wait('person', later)
  return last ? { do: 'activate' } : { do: 'open-wave', wave: wave + 1 }
}

const activating = (campaign: Campaign, { progress, now, readableUntil }: Facts): Step => {
  const open = progress.map((wave) => weighed(campaign, wave))
  const failing = halt(campaign, open)
  if (failing !== undefined) return failing
  if (open.some(({ unfinished }) => unfinished > 0)) return now >= campaign.due ? { do: 'time-out' } : wait('devices', campaign.due)
  // No new epoch came with it: there is none to retire.
  if (campaign.from === campaign.to) return { do: 'finish' }
  if (readableUntil === null) return { do: 'retire' }
  if (now < readableUntil) return wait('readers', readableUntil)
  const behind = progress.reduce((total, wave) => total + sum(wave, ['failed', 'timed-out']), 0)
  if (campaign.policy.overlap === 'patient') return behind === 0 ? { do: 'retire' } : wait('stragglers')
  return behind <= (campaign.mayCut ?? 0) ? { do: 'retire' } : wait('confirmation')
}

/** Error threshold: strictly above it. */
const halt = (campaign: Campaign, open: readonly Weighed[]): Step | undefined => {
  const wave = open.findIndex(({ errors, base }) => isAbove(errors, campaign.policy.errorThreshold, base))
  const failing = open[wave]
  return failing === undefined ? undefined : { do: 'halt', because: `wave ${wave + 1}: ${failing.errors} of ${failing.base} failed` }
}
