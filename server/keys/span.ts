import type { Holding } from './key.ts'

/**
 * An interval of the ledger, written in the commit of what begins or ends it: a device was in a group, a key was granted to a group, a key protected a topic.
 * Closed ones stay. Times are milliseconds since 1970.
 */
export interface Span {
  /** `<of>/<from>/<random>`: spans of one thing stand in the order of their beginning. */
  readonly id: string
  readonly version: number
  /** What it is a span of, and who was in it: `group/<group>` and `device/<device>`, `key/<key>` and `group/<group>`, `topic/<topic>` or `filters` and `key/<key>`. */
  readonly of: string
  readonly by: string
  readonly from: number
  /** Null: not over. */
  readonly until: number | null
  /** `<of> <by>` while it is not over: at most one at a time. */
  readonly open: string | null
  /** Of memberships that are not over: `<group>/<batch of the device>`. */
  readonly lot: string | null
  /** Of topics: the topic, or the filter. */
  readonly topic: string | null
}

/** From a moment until before another; null: without end. */
export interface Window {
  readonly from: number
  readonly until: number | null
}

export const openOf = (of: string, by: string): string => `${of} ${by}`

/** Part of its id: what sorts spans of one thing. */
export const sortedTime = (at: number): string => String(at).padStart(15, '0')

const end = ({ until }: Window): number => until ?? Infinity

export const overlaps = (one: Window, other: Window): boolean => one.from < end(other) && other.from < end(one)

export const covers = (window: Window, at: number): boolean => window.from <= at && at < end(window)

/** What both have in common; undefined: nothing. */
export const common = (one: Window, other: Window): Window | undefined => {
  const until = Math.min(end(one), end(other))
  const from = Math.max(one.from, other.from)
  return from < until ? { from, until: until === Infinity ? null : until } : undefined
}

/** When the device had this epoch, oldest first: from its delivery until it stated that it has erased it. What a revoked device keeps has no end. */
export const tenuresOf = ({ deliveredAt, retiredAt, earlier = [] }: Holding): readonly Window[] => [...earlier, { from: deliveredAt, until: retiredAt }]

/** Whether a device could read what was protected in these windows: it had the epoch at that time, or got it later and could read a recording. Undefined: never. */
export const readingOf = (holding: Holding, windows: readonly Window[]): { readonly when: 'then' | 'later'; readonly held: Window } | undefined => {
  const tenures = tenuresOf(holding)
  const then = tenures.find((tenure) => windows.some((window) => overlaps(tenure, window)))
  if (then !== undefined) return { when: 'then', held: then }
  const later = tenures.find((tenure) => windows.some((window) => tenure.from >= end(window)))
  return later === undefined ? undefined : { when: 'later', held: later }
}

/** Whether an MQTT topic filter (MQTT 3.1.1 §4.7) takes a topic. */
export const filterTakes = (filter: string, topic: string): boolean => {
  const [wanted, levels] = [filter.split('/'), topic.split('/')]
  const rest = wanted.indexOf('#')
  const named = rest < 0 ? wanted : wanted.slice(0, rest)
  if (rest < 0 ? named.length !== levels.length : levels.length < named.length) return false
  return named.every((level, at) => level === '+' || level === levels[at])
}
