import { createHash } from 'node:crypto'

/** What a fleet's devices are like in the field. */
export const habitNames = ['steady', 'duty-cycled', 'flaky', 'dead', 'slow-tpm', 'wrong-clock', 'power-cuts'] as const
export type HabitName = (typeof habitNames)[number]

/** `sleep`: the agent stops in order, the board loses power; `cut`: the power goes in the middle of whatever is done; `unplug`: the network connection breaks. */
export interface Act {
  /** Milliseconds after the act before it; after the board was on its way to the server, for the first one. */
  readonly after: number
  readonly do: 'sleep' | 'cut' | 'unplug' | 'wake'
}

export interface Habit {
  readonly name: HabitName
  /** Milliseconds that each command of its TPM takes. */
  readonly tpmDelay: number
  /** Milliseconds that its wall clock is ahead, or behind. */
  readonly clockOff: number
  acts(): Iterable<Act>
}

/** Share of the fleet by habit; what is left is steady. */
export type Mix = Readonly<Partial<Record<HabitName, number>>>

/** `flaky=0.1,dead=0.02`. Undefined for anything else: an unknown name, one that comes twice, shares above 1 together. */
export const parseMix = (text: string): Mix | undefined => {
  const pairs = text.split(',').map((pair) => pair.split('='))
  const shares = pairs.map(([, share = '']) => (/^(0|1|0?\.\d{1,6}|1\.0+)$/.test(share) ? Number(share) : Number.NaN))
  const known = pairs.every(([name, , ...more]) => habitNames.some((one) => one === name) && more.length === 0)
  if (!known || new Set(pairs.map(([name]) => name)).size !== pairs.length || !(shares.reduce((sum, share) => sum + share, 0) <= 1 + 1e-9)) return undefined
  return Object.fromEntries(pairs.map(([name = ''], at) => [name, shares[at]]))
}

/** Uniform numbers in [0, 1) that seed and name alone decide. */
const chances = (seed: number, name: string): (() => number) => {
  let count = 0
  return () => createHash('sha256').update(`${seed}/${name}/${count++}`).digest().readUIntBE(0, 6) / 2 ** 48
}

const second = 1_000

const actsOf: Readonly<Record<HabitName, (between: (from: number, to: number) => number) => Generator<Act>>> = {
  *steady() {},
  *'slow-tpm'() {},
  *'wrong-clock'() {},
  *'duty-cycled'(between) {
    for (;;) {
      yield { after: between(10, 40), do: 'sleep' }
      yield { after: between(20, 120), do: 'wake' }
    }
  },
  *flaky(between) {
    for (;;) yield { after: between(5, 90), do: 'unplug' }
  },
  *dead(between) {
    yield { after: between(1, 60), do: 'cut' }
  },
  *'power-cuts'(between) {
    for (;;) {
      yield { after: between(1, 90), do: 'cut' }
      yield { after: between(1, 20), do: 'wake' }
    }
  },
}

/** How this board behaves: the same for the same seed, serial and mix, whatever the others do. */
export const habitOf = (mix: Mix, seed: number, serial: string): Habit => {
  const chance = chances(seed, serial)
  const between = (from: number, to: number): number => Math.round((from + chance() * (to - from)) * second)
  let left = chance()
  const name = habitNames.find((one) => (left -= mix[one] ?? 0) < 0) ?? 'steady'
  const day = 86_400 * second
  return {
    name,
    tpmDelay: name === 'slow-tpm' ? Math.round(20 + chance() * 180) : 0,
    // Half of them stand decades back, as a board without a battery; the others are up to a month off.
    clockOff: name !== 'wrong-clock' ? 0 : chance() < 0.5 ? -50 * 365 * day : Math.round((chance() - 0.5) * 60 * day),
    acts: () => actsOf[name](between),
  }
}
