import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { openDeviceClock } from './device-clock.ts'

const day = 86_400_000
const [y1970, y2038, y2106] = [0, Date.UTC(2038, 0, 19, 3, 14, 8), Date.UTC(2106, 1, 7, 6, 28, 15)]
const today = Date.UTC(2027, 0, 1)
const born = today - 10 * day

/** A clock whose wall and uptime a test moves. */
const open = (wall: number, of: { readonly floor?: number; readonly born?: number } = {}) => {
  const at = { wall, up: 0 }
  const clock = openDeviceClock({ wall: () => at.wall, monotonic: () => at.up, born: of.born ?? born })
  clock.restore(of.floor ?? 0)
  return { clock, at }
}

describe('time of a device', () => {
  test.each([y1970, y2038, y2106])('with its clock at %i: signed time leads, and goes on by itself however the clock jumps', (wall) => {
    const { clock, at } = open(wall)
    expect(clock.belief()).toEqual({ now: Math.max(wall, born), floor: born, signed: false })
    clock.hear(today)
    for (const jump of [y2106, y1970, wall, y2038, today - day]) {
      at.wall = jump
      at.up += 1000
      expect(clock.belief()).toMatchObject({ now: today + at.up, signed: true })
      expect(clock.uptime()).toBe(at.up)
    }
  })

  test('a clock that agrees bears a long absence out: the floor follows at once', () => {
    const { clock } = open(today + 365 * day, { floor: today })
    expect(clock.hear(today + 365 * day + 3_600_000)).toBe(today + 365 * day + 3_600_000)
  })

  test('a clock that does not: seven days at the start and each day, though time itself is the signed one', () => {
    const { clock, at } = open(y1970, { floor: today })
    const back = today + 365 * day
    expect(clock.hear(back)).toBe(today + 7 * day)
    expect(clock.hear(back)).toBe(today + 7 * day)
    expect(clock.now()).toBe(back)
    at.up = day
    expect(clock.hear(back)).toBe(today + day + 14 * day)
    at.up = 60 * day
    expect(clock.hear(back + at.up)).toBe(back + at.up)
  })

  test('a server whose time was years ahead: right again, it is believed; the floor is a week ahead, no more', () => {
    const { clock } = open(today, { floor: today })
    expect(clock.hear(today + 700 * day)).toBe(today + 7 * day)
    clock.hear(today)
    expect(clock.belief()).toEqual({ now: today, floor: today + 7 * day, signed: true })
    expect(clock.now()).toBe(today + 7 * day)
  })

  test('I16: never below the floor, which never falls and never passes what was signed', () => {
    const steps = fc.array(
      fc.record({ wall: fc.integer({ min: 0, max: y2106 }), passes: fc.nat(30 * day), hear: fc.option(fc.integer({ min: 0, max: y2106 })) }),
    )
    fc.assert(
      fc.property(fc.nat(y2106), steps, (stored, moves) => {
        const { clock, at } = open(0, { floor: stored })
        let [floor, highest] = [Math.max(stored, born), Math.max(stored, born)]
        for (const { wall, passes, hear } of moves) {
          at.wall = wall
          at.up += passes
          const next = hear === null ? clock.belief().floor : clock.hear(hear)
          highest = Math.max(highest, hear ?? 0)
          expect(next).toBeGreaterThanOrEqual(floor)
          expect(next).toBeLessThanOrEqual(highest)
          expect(clock.now()).toBeGreaterThanOrEqual(next)
          floor = next
        }
      }),
    )
  })
})
