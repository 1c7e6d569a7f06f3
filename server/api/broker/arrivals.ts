import type { BrokerLimits } from './limits.ts'

/** A socket that was accepted. `go` is called when it is its turn, `giveUp` when it waited too long or too many wait. */
export interface Arrival {
  readonly endpoint: string
  go(): void
  giveUp(): void
}

/** Sockets between accept and CONNACK, per address prefix: a bounded number goes on, the rest waits unread, so that a storm is served in order. */
export interface Arrivals {
  add(from: string, arrival: Arrival): void
  /** This one has its CONNACK, or is gone. Harmless to repeat. */
  done(from: string, endpoint: string): void
}

export const arrivals = (limits: Pick<BrokerLimits, 'arriving' | 'waiting' | 'connect'>): Arrivals => {
  const prefixes = new Map<string, { readonly going: Set<string>; readonly waiting: Map<string, Arrival & { readonly timer: NodeJS.Timeout }> }>()
  return {
    add(from, arrival) {
      const prefix = prefixes.get(from) ?? { going: new Set(), waiting: new Map() }
      prefixes.set(from, prefix)
      if (prefix.going.size < limits.arriving) {
        prefix.going.add(arrival.endpoint)
        return arrival.go()
      }
      if (prefix.waiting.size >= limits.waiting) return arrival.giveUp()
      prefix.waiting.set(arrival.endpoint, { ...arrival, timer: setTimeout(() => arrival.giveUp(), limits.connect) })
    },
    done(from, endpoint) {
      const prefix = prefixes.get(from)
      if (prefix === undefined) return
      clearTimeout(prefix.waiting.get(endpoint)?.timer)
      prefix.waiting.delete(endpoint)
      prefix.going.delete(endpoint)
      for (const [other, { go, timer }] of prefix.waiting) {
        if (prefix.going.size >= limits.arriving) break
        clearTimeout(timer)
        prefix.waiting.delete(other)
        prefix.going.add(other)
        go()
      }
      if (prefix.going.size === 0 && prefix.waiting.size === 0) prefixes.delete(from)
    },
  }
}
