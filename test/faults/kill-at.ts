import { appendFileSync } from 'node:fs'

/**
 * Ends this process as a power cut would at a durable step: `FLEETKEY_KILL_AT` is `NAME` or `NAME#COUNT` of its occurrences. With `FLEETKEY_STEPS`
 * every step reached is written to that file. With `FLEETKEY_KILL_KMS` the process that `victim` names is ended in its place.
 */
export const killAt = (victim: () => number = () => process.pid): ((name: string) => void) => {
  const [wanted, count = '1'] = (process.env['FLEETKEY_KILL_AT'] ?? '').split('#')
  const steps = process.env['FLEETKEY_STEPS']
  let left = Number(count)
  return (name) => {
    if (steps !== undefined) appendFileSync(steps, `${name}\n`)
    if (name === wanted && --left === 0) process.kill(process.env['FLEETKEY_KILL_KMS'] === undefined ? process.pid : victim(), 'SIGKILL')
  }
}
