import { expect } from 'vitest'

/** Times of the durable steps that a server in this process has gone through, by name: the last of each. */
export const stepClock = (): { readonly step: (name: string) => void; readonly at: (name: string) => number } => {
  const times = new Map<string, number>()
  return {
    step: (name) => void times.set(name, performance.now()),
    at(name) {
      const time = times.get(name)
      if (time === undefined) throw new Error(`no step ${name}`)
      return time
    },
  }
}

/** Revocation acts within this: from when the order is durable until the connection is gone, seen from its other end. Milliseconds. */
const acts = 1_000
/** Turns of the event loop after the answer to the order within which its connections are gone: they were cut before it was sent. */
const turns = 500
const pause = 5
/** A pause that took longer than this was time in which this process, server and devices included, was not let run. */
const late = 50

const nextTurn = async (): Promise<void> => await new Promise((resolve) => void setImmediate(resolve))

/**
 * Gives an order to a server in this process and expects what rests on it to be cut: before its answer arrives, and within a second from when it is durable.
 * What it says is how the machine let this process run: time that it was stopped for is not counted.
 */
export const expectCut = async <T>(of: {
  readonly order: () => Promise<T>
  /** Whether every connection is gone, as their other ends see it. */
  readonly isCut: () => boolean
  /** When the order was durable, once it is. */
  readonly durable: () => number
}): Promise<T> => {
  const stops: { readonly from: number; readonly until: number }[] = []
  let [cutAt, isOver] = [Infinity, false]
  const watching = (async () => {
    while (!isOver && cutAt === Infinity) {
      const before = performance.now()
      await new Promise((resolve) => void setTimeout(resolve, pause))
      const now = performance.now()
      if (now - before > late) stops.push({ from: before + pause, until: now })
      if (of.isCut()) cutAt = now
    }
  })()
  let done: T
  try {
    done = await of.order()
    let turn = 0
    for (; turn < turns && !of.isCut(); turn++) await nextTurn()
    expect(of.isCut(), `cut within ${turn} turns after the answer`).toBe(true)
    cutAt = Math.min(cutAt, performance.now())
  } finally {
    isOver = true
    await watching
  }
  const since = of.durable()
  const stopped = stops.reduce((sum, { from, until }) => sum + Math.max(0, Math.min(until, cutAt) - Math.max(from, since)), 0)
  expect(cutAt - since - stopped, `milliseconds until the cut; stopped for ${Math.round(stopped)}`).toBeLessThanOrEqual(acts)
  return done
}
