import { readFileSync } from 'node:fs'
import { runServer } from '@fleetkey/server/main.ts'
import { killAt } from './kill-at.ts'

/** `FLEETKEY_CLOCK`: a file with the milliseconds by which this server's clock is ahead, read at every look. */
const file = process.env['FLEETKEY_CLOCK']
const now = (): number => Date.now() + (file === undefined ? 0 : Number(readFileSync(file, 'utf8')))

let kms = process.pid
const kmsStarted = (pid: number): void => {
  kms = pid
  // Whoever ends it counts its starts.
  process.stdout.write(`${JSON.stringify({ kms })}\n`)
}
// Attached: a test run that is killed leaves no server behind.
await runServer([...process.argv.slice(2), '--attached'], { step: killAt(() => kms), kmsStarted, now })
