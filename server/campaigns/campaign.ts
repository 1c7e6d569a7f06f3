import type { DeviceId, Epoch, KeyId } from '@fleetkey/protocol/ids.ts'

/** One rotation of one key over a fleet: install everywhere, then activate, then retire. */
export interface Campaign {
  readonly id: string
  readonly version: number
  readonly key: KeyId
  readonly from: number
  readonly to: Epoch
  readonly state: 'installing' | 'activating' | 'retiring' | 'done' | 'paused' | 'halted' | 'aborted'
  /** What `resume` goes back to. */
  readonly resumeTo: 'installing' | 'activating' | 'retiring' | null
  readonly because: string
  readonly createdAt: number
  readonly createdBy: string
  readonly finishedAt: number | null
  readonly policy: CampaignPolicy
  /** Waves opened so far, 0-based index of the newest open one. */
  readonly wave: number
  readonly waves: number
  /** Targets per stage; kept with every stage change so that a decision never counts rows. */
  readonly counts: Readonly<Record<Stage, number>>
  /** The same per wave, same order as the waves. */
  readonly waveCounts: readonly Readonly<Record<Stage, number>>[]
}

export interface CampaignPolicy {
  /** Shares of the targets, ascending, the last is 1: [0.1, 0.5, 1]. */
  readonly waves: readonly number[]
  /** Share of a wave's devices that must be installed (or proven away as `timed-out`) before the next wave opens. */
  readonly successThreshold: number
  /** Halts when the share of failed devices of a wave is strictly above it. */
  readonly errorThreshold: number
  /** Milliseconds after delivery until a silent device becomes `timed-out`; it still converges when it returns. */
  readonly deadline: number
}

/** Stage of a device within a campaign; `current` of an outcome is `already-current`. */
export type Stage = 'pending' | 'delivered' | 'installed' | 'active' | 'retired' | 'failed' | 'timed-out' | 'already-current' | 'left'

/** `id` is `<campaign>/<device>`. */
export interface Target {
  readonly id: string
  readonly version: number
  readonly campaign: string
  readonly device: DeviceId
  readonly wave: number
  readonly stage: Stage
  readonly changedAt: number
  readonly reason: string | null
}
