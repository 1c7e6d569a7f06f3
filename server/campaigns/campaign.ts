import type { DeviceId, Epoch, KeyId } from '@fleetkey/protocol/ids.ts'

type Running = 'installing' | 'activating' | 'retiring'

/** One rotation of one key over a fleet: install everywhere, then activate, then retire. */
export interface Campaign {
  readonly id: string
  readonly version: number
  readonly key: KeyId
  readonly from: number
  readonly to: Epoch
  readonly state: Running | 'done' | 'paused' | 'halted' | 'aborted'
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
  /** When the newest wave opened; then when the epoch was activated; then when retiring began. Deadlines count from here. */
  readonly since: number
}

export interface CampaignPolicy {
  /** Shares of the targets, ascending, the last is 1: [0.1, 0.5, 1]. */
  readonly waves: readonly number[]
  /** Share of a wave's devices that must be settled (installed, or away until the deadline) before the next wave opens. */
  readonly successThreshold: number
  /** Halts when the share of failed devices of a wave is strictly above it. */
  readonly errorThreshold: number
  /** Milliseconds until a silent device becomes `timed-out`; it still converges when it returns. */
  readonly deadline: number
}

export const defaultPolicy: CampaignPolicy = { waves: [1], successThreshold: 0.95, errorThreshold: 0.1, deadline: 3_600_000 }

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
}

export const placeOf = (campaign: string, wave: number, stage: Stage): string => `${campaign}/${wave}/${stage}`

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

/** 0-based wave of the target at this place among `total`, in waves that end at these shares. */
export const waveOf = (at: number, total: number, waves: readonly number[]): number => {
  const wave = waves.findIndex((share) => at < Math.ceil(share * total))
  return wave < 0 ? waves.length - 1 : wave
}
