import type { BrokerLimits } from './limits.ts'

/** A socket that was accepted. `go` is called when it is its turn, `giveUp` when it waited too long or too many wait. */
export interface Arrival {
  readonly endpoint: string
  go(): void
  giveUp(): void
}

/**
 * Sockets between accept and CONNACK: the rest waits unread, so that a storm is served in order. Per address prefix a bounded number goes on, prefixes take turns,
 * and nobody is let on while the event loop's turns are long: whoever is connected already is served as if there were no storm.
 */
export interface Arrivals {
  add(from: string, arrival: Arrival): void
  /** This one has its CONNACK, or is gone. Harmless to repeat. */
  done(from: string, endpoint: string): void
}

/** The event loop: its time, milliseconds, and its next turn. */
export interface Turns {
  now(): number
  next(run: () => void): void
}

const eventLoop: Turns = { now: () => performance.now(), next: (run) => void setImmediate(run) }

interface Prefix {
  readonly going: Set<string>
  readonly waiting: Map<string, Arrival & { readonly timer: NodeJS.Timeout }>
}

export const arrivals = (limits: Pick<BrokerLimits, 'arriving' | 'waiting' | 'patience' | 'turn' | 'longest'>, turns: Turns = eventLoop): Arrivals => {
  const prefixes = new Map<string, Prefix>()
  /** Those of which one may go, in the order of their turns. */
  const ready = new Set<string>()
  let ticking = false
  let turnBegan = 0
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
    // To the end: the other prefixes come first now.
    ready.delete(from)
    weigh(from, prefix)
    lastStart = turns.now()
    go()
  }

  /** One arrival for each turn that was short; one in a while however long they are, or a busy server would never let anybody in. */
  const tick = (): void => {
    const now = turns.now()
    if (now - turnBegan <= limits.turn || now - lastStart >= limits.longest) startOne()
    if (ready.size === 0) {
      ticking = false
      return
    }
    turnBegan = turns.now()
    turns.next(tick)
  }
  const wake = (): void => {
    if (ticking || ready.size === 0) return
    ticking = true
    turnBegan = turns.now()
    turns.next(tick)
  }

  return {
    add(from, arrival) {
      const prefix = prefixes.get(from) ?? { going: new Set(), waiting: new Map() }
      prefixes.set(from, prefix)
      if (prefix.waiting.size >= limits.waiting) return arrival.giveUp()
      prefix.waiting.set(arrival.endpoint, { ...arrival, timer: setTimeout(() => arrival.giveUp(), limits.patience) })
      weigh(from, prefix)
      wake()
    },
    done(from, endpoint) {
      const prefix = prefixes.get(from)
      if (prefix === undefined) return
      clearTimeout(prefix.waiting.get(endpoint)?.timer)
      prefix.waiting.delete(endpoint)
      prefix.going.delete(endpoint)
      weigh(from, prefix)
      wake()
    },
  }
}
