import type { BrokerLimits } from './limits.ts'

/** A socket that was accepted. `go` is called when it is its turn, `giveUp` when it waited too long or too many wait. */
export interface Arrival {
  readonly endpoint: string
  go(): void
  giveUp(): void
}

/**
 * Sockets between accept and their first message: the rest waits unread, so that a storm is served in order. Per address prefix a bounded number goes on, prefixes take
 * turns, and nobody is let on while the event loop's turns are long: whoever is connected already is served as if there were no storm. How many go on at a time follows
 * from that: what they do comes in bursts, since they are answered together. Each long turn takes a quarter off, each short one in which others wait adds one, so that it is
 * few where the server is what they wait for, and many where it is the network or a slow TPM.
 */
export interface Arrivals {
  add(from: string, arrival: Arrival): void
  /** This one is through, or gone. Harmless to repeat. */
  done(from: string, endpoint: string): void
}

/** The event loop: its time, milliseconds, its next turn, and the first one after a while. */
export interface Turns {
  now(): number
  next(run: () => void): void
  later(run: () => void, milliseconds: number): void
}

const eventLoop: Turns = {
  now: () => performance.now(),
  next: (run) => void setImmediate(run),
  later: (run, milliseconds) => void setTimeout(run, milliseconds),
}

/** Milliseconds after which it is looked again whether more may go on, when as many do as may. */
const pause = 5

interface Prefix {
  readonly going: Set<string>
  readonly waiting: Map<string, Arrival & { readonly timer: NodeJS.Timeout }>
}

export const arrivals = (
  limits: Pick<BrokerLimits, 'arriving' | 'atLeast' | 'patience' | 'turn' | 'longest'>,
  /** Sockets that the listener could take besides those it has. */
  room: () => number,
  turns: Turns = eventLoop,
): Arrivals => {
  const prefixes = new Map<string, Prefix>()
  /** Those of which one may go, in the order of their turns. */
  const ready = new Set<string>()
  let ticking = false
  /** When this turn was to begin. */
  let due = 0
  /** How many go on, and how many may. */
  let going = 0
  let window = limits.atLeast
  let lastStart = Number.NEGATIVE_INFINITY

  const weigh = (from: string, prefix: Prefix): void => {
    if (prefix.waiting.size > 0 && prefix.going.size < limits.arriving) ready.add(from)
    else ready.delete(from)
    if (prefix.waiting.size === 0 && prefix.going.size === 0) prefixes.delete(from)
  }

  const startOne = (): void => {
    const [from] = ready
    const prefix = prefixes.get(from ?? '')
    if (from === undefined || prefix === undefined) return
    const [next] = prefix.waiting
    if (next === undefined) return
    const [endpoint, { go, timer }] = next
    clearTimeout(timer)
    prefix.waiting.delete(endpoint)
    prefix.going.add(endpoint)
    going++
    // To the end: the other prefixes come first now.
    ready.delete(from)
    weigh(from, prefix)
    lastStart = turns.now()
    go()
  }

  const wait = (): void => {
    const isFull = going >= window
    due = turns.now() + (isFull ? pause : 0)
    if (isFull) turns.later(tick, pause)
    else turns.next(tick)
  }

  /** One arrival for each turn that was short; one in a while however long they are, or a busy server would never let anybody in. */
  const tick = (): void => {
    const now = turns.now()
    const isShort = now - due <= limits.turn
    if (!isShort) window = Math.max(limits.atLeast, Math.floor(window * 0.75))
    else if (going >= window) window++
    if ((isShort && going < window) || now - lastStart >= limits.longest) startOne()
    if (ready.size === 0) ticking = false
    else wait()
  }
  const wake = (): void => {
    if (ticking || ready.size === 0) return
    ticking = true
    wait()
  }

  return {
    add(from, arrival) {
      const prefix = prefixes.get(from) ?? { going: new Set(), waiting: new Map() }
      prefixes.set(from, prefix)
      // As many of one prefix wait as there is room left: a crowded site is served in one go on an idle listener, and there is always room for others.
      if (prefix.waiting.size > room()) return arrival.giveUp()
      prefix.waiting.set(arrival.endpoint, { ...arrival, timer: setTimeout(() => arrival.giveUp(), limits.patience) })
      weigh(from, prefix)
      wake()
    },
    done(from, endpoint) {
      const prefix = prefixes.get(from)
      if (prefix === undefined) return
      clearTimeout(prefix.waiting.get(endpoint)?.timer)
      prefix.waiting.delete(endpoint)
      if (prefix.going.delete(endpoint)) going--
      weigh(from, prefix)
      wake()
    },
  }
}
