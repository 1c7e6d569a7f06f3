import { z } from 'zod'
import type { AgentStatus } from '@fleetkey/device-agent/agent.ts'
import { habitNames, type HabitName } from './habits.ts'

const number = z.int().min(0)

/** Boards of one habit, counted. */
const Share = z.strictObject({ boards: number, on: number, enrolled: number, connected: number, refused: number })
export type Share = z.infer<typeof Share>

/** What is to be told of a fleet in one line. Memory in bytes: resident now, and before there was a board. */
export const Counts = z.strictObject({
  habits: z.partialRecord(z.enum(habitNames), Share),
  /** Boards by key and epoch in use. */
  keys: z.record(z.string(), z.record(z.string(), number)),
  /** Connections that were opened so far. */
  connections: number,
  memory: z.strictObject({ now: number, before: number }),
})
export type Counts = z.infer<typeof Counts>

const none: Share = { boards: 0, on: 0, enrolled: 0, connected: 0, refused: 0 }

const added = (one: Share, other: Share): Share => ({
  boards: one.boards + other.boards,
  on: one.on + other.on,
  enrolled: one.enrolled + other.enrolled,
  connected: one.connected + other.connected,
  refused: one.refused + other.refused,
})

const shareOf = (status: AgentStatus | null): Share => ({
  boards: 1,
  on: status === null ? 0 : 1,
  enrolled: (status?.device ?? null) === null ? 0 : 1,
  connected: status?.connected === true ? 1 : 0,
  // A device that got in after a refusal, or is on its way again, is not held for refused.
  refused: status?.connected === false && status.lastRefusal !== null ? 1 : 0,
})

/** Counts the boards of one process. */
export const countBoards = (status: ReadonlyMap<string, AgentStatus | null>, habitFor: (serial: string) => HabitName): Pick<Counts, 'habits' | 'keys'> => {
  const habits: Partial<Record<HabitName, Share>> = {}
  const keys = new Map<string, Map<string, number>>()
  for (const [serial, one] of status) {
    const name = habitFor(serial)
    habits[name] = added(habits[name] ?? none, shareOf(one))
    for (const [key, epoch] of Object.entries(one?.current ?? {})) {
      const epochs = keys.get(key) ?? new Map<string, number>()
      keys.set(key, epochs.set(String(epoch), (epochs.get(String(epoch)) ?? 0) + 1))
    }
  }
  return { habits, keys: Object.fromEntries([...keys].map(([key, epochs]) => [key, Object.fromEntries(epochs)])) }
}

/** Several processes together. */
export const sumOf = (all: readonly Counts[]): Counts => {
  const habits: Partial<Record<HabitName, Share>> = {}
  const keys: Record<string, Record<string, number>> = {}
  for (const counts of all) {
    for (const name of habitNames) {
      const share = counts.habits[name]
      if (share !== undefined) habits[name] = added(habits[name] ?? none, share)
    }
    for (const [key, epochs] of Object.entries(counts.keys)) {
      const sums = (keys[key] ??= {})
      for (const [epoch, boards] of Object.entries(epochs)) sums[epoch] = (sums[epoch] ?? 0) + boards
    }
  }
  const total = (of: (counts: Counts) => number): number => all.reduce((sum, counts) => sum + of(counts), 0)
  return {
    habits,
    keys,
    connections: total(({ connections }) => connections),
    memory: { now: total(({ memory }) => memory.now), before: total(({ memory }) => memory.before) },
  }
}

/** All habits together. */
export const allOf = (counts: Counts): Share => Object.values(counts.habits).reduce(added, none)
