/**
 * What a connection leaves behind when its peer has gone, done a little in each turn of the event loop: at the end of a storm's line thousands go at once, and whoever
 * stays connected is not kept waiting for them. `turn`: milliseconds of one turn that may be used.
 */
export const departures = (
  turn: number,
  loop: { now(): number; next(run: () => void): void } = { now: () => performance.now(), next: (run) => void setImmediate(run) },
): { add(leave: () => void): void } => {
  let waiting: (() => void)[] = []
  let at = 0
  const run = (): void => {
    const end = loop.now() + turn
    do waiting[at++]?.()
    while (at < waiting.length && loop.now() < end)
    if (at < waiting.length) return loop.next(run)
    waiting = []
    at = 0
  }
  return {
    add(leave) {
      if (waiting.push(leave) === 1) loop.next(run)
    },
  }
}
