import { describe, expect, test } from 'vitest'
import { defaultBudget, firstIssue, recovered, recoveriesLeft, recoveryStep, type Recovery, type RecoveryBudget } from './recovery.ts'

const [minute, hour, day] = [60_000, 3_600_000, 86_400_000]
const budget: RecoveryBudget = { count: 3, window: 30 * day }
const start = Date.UTC(2027, 0, 1)

const go = (known: Recovery | undefined, now: number): Recovery => {
  const step = recoveryStep(known, budget, now)
  if (step.do !== 'go') throw new Error(JSON.stringify(step))
  return step.next
}

describe('a recovery budget', () => {
  test('counts recoveries that were completed, within the window', () => {
    let known: Recovery | undefined
    for (let nth = 0; nth < 3; nth++) {
      known = recovered(go(known, start + nth * day))
      expect(recoveriesLeft(known, budget, start + nth * day)).toBe(2 - nth)
    }
    expect(recoveryStep(known, budget, start + 4 * day)).toEqual({ do: 'hold' })
    // The first has left the window.
    expect(go(known, start + 30 * day).begun).toEqual([start + day, start + 2 * day, start + 30 * day])
  })

  test('is not burnt by certificates that were never used: one recovery, however often it is begun', () => {
    let known = go(undefined, start)
    let now = start
    for (let attempt = 2; attempt <= 100; attempt++) {
      const step = recoveryStep(known, budget, now)
      if (step.do === 'wait') now = step.until
      known = go(known, now)
    }
    expect([known.begun, known.attempts, recoveriesLeft(known, budget, now)]).toEqual([[start], 100, 2])
  })

  test('lets four follow at once, then each waits twice as long, an hour at most', () => {
    let known = go(undefined, start)
    const pauses: number[] = []
    let now = start
    for (let attempt = 2; attempt <= 14; attempt++) {
      const step = recoveryStep(known, budget, now)
      pauses.push(step.do === 'wait' ? step.until - now : 0)
      if (step.do === 'wait') now = step.until
      known = go(known, now)
    }
    expect(pauses).toEqual([0, 0, 0, ...[0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60].map((minutes) => minutes * minute)])
  })

  test('whoever waits is not kept longer by a clock that was set back', () => {
    let known = go(undefined, start)
    for (let attempt = 2; attempt <= 4; attempt++) known = go(known, start)
    expect(recoveryStep(known, budget, start)).toEqual({ do: 'wait', until: start + minute / 2 })
    expect(recoveryStep(known, budget, start - hour).do).toBe('go')
  })

  test('a device that is held stays held, also when the window has passed: a person decides', () => {
    const held: Recovery = { begun: [start], attempts: 0, lastAt: start, heldAt: start }
    expect(recoveryStep(held, budget, start + 365 * day)).toEqual({ do: 'hold' })
    expect(recoveriesLeft(held, budget, start + 365 * day)).toBe(0)
  })

  test('an enrolment that is repeated because its answer got lost is none', () => {
    const known = recovered(go(go(firstIssue(start), start), start))
    expect([known.begun, recoveriesLeft(known, budget, start)]).toEqual([[], 3])
    expect(go(known, start + day).begun).toEqual([start + day])
  })

  test('of a new device is whole', () => expect(recoveriesLeft(undefined, defaultBudget, start)).toBe(8))
})
