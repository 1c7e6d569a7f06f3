import { expect, test } from 'vitest'
import { everyKillPoint } from './faults/kill-tables.ts'

// Each matrix fails for a point that its run does not come to: a kill, or a cut, is counted there.
test('at least 120 kill points over server, agent and the connection to the broker, none of them twice', () => {
  const counts = Object.entries(everyKillPoint).map(([of, points]) => [of, points.length] as const)
  const total = counts.reduce((sum, [, count]) => sum + count, 0)
  process.stdout.write(`kill points: ${total}; ${counts.map(([of, count]) => `${of} ${count}`).join('; ')}\n`)
  for (const [of, points] of Object.entries(everyKillPoint)) expect(new Set(points).size, of).toBe(points.length)
  const over = (what: string): number => counts.reduce((sum, [of, count]) => sum + (of.startsWith(what) ? count : 0), 0)
  expect(Math.min(over('server'), over('agent'), over('connection'))).toBeGreaterThan(0)
  expect(total).toBeGreaterThanOrEqual(120)
})
