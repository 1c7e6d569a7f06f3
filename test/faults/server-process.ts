import { runServer } from '@fleetkey/server/main.ts'
import { killAt } from './kill-at.ts'

await runServer(process.argv.slice(2), { step: killAt() })
