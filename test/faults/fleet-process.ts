import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { trustOfBundle } from '@fleetkey/device-agent/config.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { openFactory } from '@fleetkey/firmware-sim/factory/factory.ts'
import { serveControl } from '@fleetkey/firmware-sim/fleet/control.ts'
import { openFleet } from '@fleetkey/firmware-sim/fleet/fleet.ts'
import { habitOf } from '@fleetkey/firmware-sim/fleet/habits.ts'
import { livingAs } from '@fleetkey/firmware-sim/fleet/life.ts'
import { Bundle } from '@fleetkey/protocol/admin.ts'
import { killAt } from './kill-at.ts'

// FACTORY BUNDLE DATA: the boards of a batch in this process, which may be killed at any durable step of their agents.
const [factory = '', bundle = '', data = ''] = process.argv.slice(2)
const print = (value: object): void => void process.stdout.write(`${JSON.stringify(value)}\n`)
const fleet = openFleet(
  {
    factory: await openFactory(factory),
    trust: trustOfBundle(Bundle.parse(JSON.parse(readFileSync(bundle, 'utf8')))),
    data,
    files: nodeFileSystem,
    random: (length) => new Uint8Array(randomBytes(length)),
    now: () => Date.now(),
    log: (line) => void process.stderr.write(`${line}\n`),
    tampered: new Map(),
    claims: new Map(),
    starting: 16,
    step: killAt(),
  },
  (serial, status) => print({ event: 'status', serial, ...status }),
)
print({ event: 'ready' })
const habitFor = (serial: string) => habitOf({}, 1, serial)
await serveControl({ fleet, life: livingAs(fleet, habitFor), habitFor, connections: () => 0 }, process.stdin, print)
process.exit(0)
