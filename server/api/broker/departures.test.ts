import { expect, test } from 'vitest'
import { departures } from './departures.ts'

/** An event loop in which every departure takes a millisecond. */
const scene = (turn: number) => {
  let at = 0
  const next: (() => void)[] = []
  const left: number[] = []
  const { add } = departures(turn, { now: () => at, next: (run) => void next.push(run) })
  return {
    left,
    add: (one: number): void =>
      add(() => {
        at++
        left.push(one)
      }),
    /** Runs one turn; false when nothing waited for it. */
    turn: (): boolean => {
      const run = next.shift()
      run?.()
      return run !== undefined
    },
  }
}

test('many leave at once: some in each turn, in order, nobody twice', () => {
  const { left, add, turn } = scene(2)
  for (let one = 0; one < 5; one++) add(one)
  expect(left).toEqual([])
  turn()
  expect(left).toEqual([0, 1])
  add(5)
  turn()
  expect(left).toEqual([0, 1, 2, 3])
  turn()
  expect(left).toEqual([0, 1, 2, 3, 4, 5])
  expect(turn()).toBe(false)
  add(6)
  turn()
  expect(left.at(-1)).toBe(6)
  expect(turn()).toBe(false)
})

test('a turn that is over before it began still lets one leave', () => {
  const { left, add, turn } = scene(0)
  for (let one = 0; one < 3; one++) add(one)
  for (let turns = 0; turns < 3; turns++) turn()
  expect(left).toEqual([0, 1, 2])
})
