import { openDeviceClock, type Belief, type DeviceClock } from './device-clock.ts'

/** For tests: time as the server signed it. */
export const signedAt = (now: number): Belief => ({ now, floor: 0, signed: true })

/** For tests: a clock that stands. */
export const clockAt = (now: number): DeviceClock => {
  const clock = openDeviceClock({ wall: () => now, monotonic: () => 0 })
  clock.hear(now)
  return clock
}
