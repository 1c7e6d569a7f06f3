/**
 * When work may be done: from `from` (minutes after midnight) for `minutes`, on these days of the week (0 = Sunday), in a zone that is `offset` minutes ahead of UTC.
 * The zone is the window's, not each device's, and its offset is fixed: there is no daylight saving time.
 */
export interface Window {
  readonly from: number
  /** At most a day. */
  readonly minutes: number
  readonly days: readonly number[]
  readonly offset: number
}

const minute = 60_000
const day = 1440 * minute

/** Whether the window is open at `now`; since when, or when it opens next. Milliseconds since 1970. */
export const windowAt = (
  window: Window,
  now: number,
): { readonly open: true; readonly since: number; readonly until: number } | { readonly open: false; readonly opens: number } => {
  const midnight = Math.floor((now + window.offset * minute) / day) * day
  // One that began yesterday may go on past midnight; the next one begins within eight days, whatever the days are.
  for (let ahead = -1; ahead <= 8; ahead++) {
    const local = midnight + ahead * day
    if (!window.days.includes(new Date(local).getUTCDay())) continue
    const begins = local + (window.from - window.offset) * minute
    const ends = begins + window.minutes * minute
    if (now < begins) return { open: false, opens: begins }
    if (now < ends) return { open: true, since: begins, until: ends }
  }
  // No day at all: it never opens.
  return { open: false, opens: Number.MAX_SAFE_INTEGER }
}
