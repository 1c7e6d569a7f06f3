import { expect, test } from 'vitest'
import { habitNames, habitOf, parseMix, type Act, type Mix } from './habits.ts'

const first = (mix: Mix, seed: number, serial: string): { name: string; acts: readonly Act[] } => {
  const habit = habitOf(mix, seed, serial)
  const acts: Act[] = []
  for (const act of habit.acts()) if (acts.push(act) === 6) break
  return { name: habit.name, acts }
}

test('a mix is read as it is written, or not at all', () => {
  expect(parseMix('flaky=0.1,dead=.02')).toEqual({ flaky: 0.1, dead: 0.02 })
  expect(parseMix('steady=1')).toEqual({ steady: 1 })
  for (const text of [
    '',
    'flaky',
    'flaky=',
    'flaky=-0.1',
    'flaky=1e-1',
    'lazy=0.1',
    'flaky=0.1,flaky=0.1',
    'flaky=0.6,dead=0.5',
    'flaky=0.1=2',
    '__proto__=0.1',
  ])
    expect(parseMix(text), text).toBe(undefined)
})

test('seed and serial decide what a board does, and nothing else', () => {
  const mix: Mix = { 'power-cuts': 1 }
  expect(first(mix, 7, 'A-1')).toEqual(first(mix, 7, 'A-1'))
  expect(first(mix, 7, 'A-1')).not.toEqual(first(mix, 8, 'A-1'))
  expect(first(mix, 7, 'A-1')).not.toEqual(first(mix, 7, 'A-2'))
})

test('a mix holds over a fleet, and what is left is steady', () => {
  const mix: Mix = { 'duty-cycled': 0.2, flaky: 0.1, dead: 0.05, 'slow-tpm': 0.1, 'wrong-clock': 0.1, 'power-cuts': 0.05 }
  const fleet = Array.from({ length: 4_000 }, (_, at) => habitOf(mix, 1, `GATEWAY-${at}`))
  for (const name of habitNames) {
    const share = fleet.filter((habit) => habit.name === name).length / fleet.length
    expect(Math.abs(share - (name === 'steady' ? 0.4 : (mix[name] ?? 0))), name).toBeLessThan(0.03)
  }
  expect(fleet.every(({ name, tpmDelay }) => name === 'slow-tpm' || tpmDelay === 0)).toBe(true)
  expect(fleet.every(({ name, clockOff }) => name === 'wrong-clock' || clockOff === 0)).toBe(true)
})

test('what sleeps or loses its power wakes again, but for the dead', () => {
  for (const name of ['duty-cycled', 'power-cuts'] as const)
    expect(first({ [name]: 1 }, 3, 'B').acts.map((act) => act.do === 'wake')).toEqual([false, true, false, true, false, true])
  expect(first({ dead: 1 }, 3, 'B').acts.map((act) => act.do)).toEqual(['cut'])
})
