import { randomInt } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { courseNames, runHostileSchedule } from './faults/hostile-schedule.ts'

// The whole number is run by the long tests; otherwise a share, from a seed that is printed: one of each course, hostile from the first message on and later.
// FLEETKEY_SCHEDULES: another number of them.
const long = process.env['FLEETKEY_LONG'] === '1'
const schedules = Number(process.env['FLEETKEY_SCHEDULES'] ?? (long ? 1_000 : 3 * courseNames.length))
const first = Number(process.env['FLEETKEY_SEED'] ?? randomInt(1_000_000_000))
process.stdout.write(`hostile broker: ${schedules} of 1000 schedules from seed ${first} (FLEETKEY_SEED=${first} runs them again)\n`)

const treated = new Map<string, number>()
const ran = new Map<string, number>()
const count = (in_: Map<string, number>, name: string, by = 1): void => void in_.set(name, (in_.get(name) ?? 0) + by)

// Beside each other in this process: they wait more than they compute.
describe.concurrent('a hostile broker changes liveness only', { timeout: 600_000 }, () => {
  test.for(Array.from({ length: schedules }, (_, at) => first + at))('schedule %d', async (seed) => {
    const { course, treated: done } = await runHostileSchedule(seed)
    expect(courseNames).toContain(course)
    count(ran, course)
    for (const [treatment, times] of Object.entries(done)) count(treated, treatment, times)
  })
})

test('every course was run, and every treatment was given', () => {
  const list = (of: Map<string, number>): string => [...of].map(([name, times]) => `${name} ${times}`).join(', ')
  process.stdout.write(`hostile broker: ${list(ran)}; messages: ${list(treated)}\n`)
  expect([...ran.keys()].toSorted()).toEqual(courseNames.toSorted())
  expect([...treated.values()].every((times) => times > 0)).toBe(true)
})
