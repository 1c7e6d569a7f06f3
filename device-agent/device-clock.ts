/** What a device takes the time to be, milliseconds since 1970. */
export interface Belief {
  /** The server's time as last signed, going on since; before the first one in this process, the clock's own, as far as it can be true. */
  readonly now: number
  /** Highest time that is durable and signed: it is later than this. */
  readonly floor: number
  /** Whether `now` rests on a signature, or on a clock that may show 1970 or 2106. */
  readonly signed: boolean
}

export interface DeviceClock {
  belief(): Belief
  /** Never below the floor. */
  now(): number
  /** Milliseconds since this process began; no clock that is set changes it. */
  uptime(): number
  /** The floor that an earlier process stored. */
  restore(floor: number): void
  /** The server has signed this time, freshly. The floor that follows, to be made durable. */
  hear(stated: number): number
}

const day = 86_400_000
/** A clock that differs by no more bears the server's word out. */
const agreement = day
/** Without that, the floor rises by no more at the start, and on each day that the process runs. */
const longestJump = 7 * day

/**
 * Time of a device whose own clock may show anything. Signed time leads as soon as there is any: it goes on by a clock that nobody can set, and the system's
 * clock may jump as it likes. The floor is what remains of it over a restart. A server whose time is wrong must not make it useless for ever: where the
 * device's own clock does not agree, the floor rises by seven days at most, and by as much a day (less than what is left of any certificate that a server
 * shows, so that the way back stays open when its time is right again). `born`: before this the server's root did not exist.
 */
export const openDeviceClock = (of: { readonly wall: () => number; readonly monotonic: () => number; readonly born?: number }): DeviceClock => {
  const { wall, monotonic, born = 0 } = of
  const begun = monotonic()
  const uptime = (): number => Math.max(0, monotonic() - begun)
  let floor = born
  /** Where the floor stood at the beginning of this process. */
  let base = born
  let heard: { readonly stated: number; readonly at: number } | undefined

  const belief = (): Belief =>
    heard === undefined ? { now: Math.max(wall(), floor), floor, signed: false } : { now: Math.floor(heard.stated + uptime() - heard.at), floor, signed: true }

  return {
    belief,
    now: () => Math.max(belief().now, floor),
    uptime,
    restore(stored) {
      floor = Math.max(floor, stored)
      base = Math.max(base, stored)
    },
    hear(stated) {
      heard = { stated, at: uptime() }
      const agrees = Math.abs(wall() - stated) <= agreement
      const highest = base + uptime() + longestJump * (1 + Math.floor(uptime() / day))
      floor = Math.max(floor, agrees ? stated : Math.min(stated, Math.floor(highest)))
      return floor
    },
  }
}

/**
 * When a certificate of the server is judged: at the time that its message states, else now; by a clock that is not signed, at the moment of its life that is
 * nearest to what that clock shows. Undefined when it was over before the floor: signed time says so, whatever clocks say.
 */
export const judgedAt = (
  life: { readonly notBefore: number; readonly notAfter: number },
  { now, floor, signed }: Belief,
  stated: number | null,
): number | undefined => {
  if (life.notAfter < floor) return undefined
  if (stated !== null) return stated
  return signed ? now : Math.min(Math.max(now, life.notBefore), life.notAfter)
}
