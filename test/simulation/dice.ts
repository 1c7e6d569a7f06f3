/** Chance that a seed decides. */
export interface Dice {
  /** An integer of 0 … `sides` - 1. */
  roll(sides: number): number
  /** An integer of `from` … `to`. */
  between(from: number, to: number): number
  /** True once in `times`. */
  once(times: number): boolean
  pick<T>(of: readonly T[]): T
  bytes(length: number): Uint8Array
  /** Dice of its own: what is rolled there changes nothing here. */
  fork(): Dice
}

/** SplitMix32: 32 bits a step, every seed another sequence. Chance for schedules, not for secrets. */
export const diceOf = (seed: number): Dice => {
  let state = seed >>> 0
  const next = (): number => {
    state = (state + 0x9e3779b9) >>> 0
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad)
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97)
    return (mixed ^ (mixed >>> 15)) >>> 0
  }
  const roll = (sides: number): number => Math.floor((next() / 2 ** 32) * sides)
  return {
    roll,
    between: (from, to) => from + roll(to - from + 1),
    once: (times) => roll(times) === 0,
    pick(of) {
      const found = of[roll(of.length)]
      if (found === undefined) throw new Error('nothing to pick from')
      return found
    },
    bytes: (length) => Uint8Array.from({ length }, () => roll(256)),
    fork: () => diceOf(next()),
  }
}
