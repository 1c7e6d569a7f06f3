import { runServer } from '@fleetkey/server/main.ts'
import { killAt } from './kill-at.ts'

let kms = process.pid
await runServer(process.argv.slice(2), { step: killAt(() => kms), kmsStarted: (pid) => (kms = pid) })
