import { appendFileSync } from 'node:fs'

/**
 * Ends this process as a power cut would at a durable step: `FLEETKEY_KILL_AT` is `NAME` or `NAME#COUNT` of its occurrences. With `FLEETKEY_STEPS`
 * every step reached is written to that file.
 */
export const killAt = (): ((name: string) => void) => {
  const [wanted, count = '1'] = (process.env['FLEETKEY_KILL_AT'] ?? '').split('#')
  const steps = process.env['FLEETKEY_STEPS']
  let left = Number(count)
  return (name) => {
    if (steps !== undefined) appendFileSync(steps, `${name}\n`)
    if (name === wanted && --left === 0) process.kill(process.pid, 'SIGKILL')
  }
}
