import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { trustOfBundle } from '@fleetkey/device-agent/config.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { makeBatch, openFactory, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { openFleet, type Fleet } from '@fleetkey/firmware-sim/fleet/fleet.ts'
import { openWorld, random, until } from './world.ts'

const devices = 200
const day = 86_400_000

/** A plant that was without power for longer than its certificates live, switched on at once; half of its clocks have stopped. */
test(`${devices} boards whose certificates have all expired come back`, { timeout: 600_000 }, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-storm-'))
  const server = { ahead: 0 }
  const world = await openWorld({ now: () => Date.now() + server.ahead })
  const fleets: Fleet[] = []
  try {
    const line = join(folder, 'line-2')
    const order = { batch: 'plant', model: 'sensor', station: 'line-2', devices, release: { name: '1.0.0', number: 1 } }
    await writeBatch(line, await makeBatch(order, { random, now: () => Date.now() }))
    const text = (name: string): string => readFileSync(join(line, name), 'utf8')
    const signed = (name: string) => ({ content: Buffer.from(text(name)).toString('base64'), signature: text(`${name}.sig`).trim(), station: 'line-2' })
    const { client } = world
    await client.call('station.add', { body: { id: 'line-2', publicKey: text('station.pem') } })
    await client.call('endorsement.import', { body: { certificate: text('ek-ca.pem'), test: true } })
    await client.call('release.import', { body: signed('release.json') })
    await client.call('batch.import', { body: { ...signed('batch.json'), format: 'json' } })
    const factory = await openFactory(line)
    const trust = trustOfBundle({ ...world.bundle, server: `mqtts://127.0.0.1:${world.server.mqttPort}` })
    const open = (starting: number, now: () => number): Fleet => {
      const common = { factory, trust, data: join(folder, 'boards'), files: nodeFileSystem, random, log: () => undefined }
      const fleet = openFleet({ ...common, now, tampered: new Map(), claims: new Map(), starting }, () => undefined)
      fleets.push(fleet)
      return fleet
    }
    const connected = (fleet: Fleet): number => [...fleet.status().values()].filter((status) => status?.connected === true).length

    const before = open(16, () => Date.now())
    await before.on(before.serials)
    await until('all are enrolled', () => connected(before) === devices, 180_000)
    await before.stop()

    server.ahead = 7 * day
    // Every other clock stands at 1970: that certificate is tried first, and refused.
    const after = open(devices, () => Date.now() + server.ahead)
    const stopped = open(devices, () => 0)
    const half = after.serials.filter((_, at) => at % 2 === 0)
    const rest = after.serials.filter((_, at) => at % 2 === 1)
    const began = performance.now()
    const times: number[] = []
    const watch = setInterval(() => {
      const now = connected(after) + connected(stopped)
      while (times.length < now) times.push(performance.now() - began)
    }, 50)
    void after.on(half)
    void stopped.on(rest)
    try {
      await until('all are back', () => connected(after) + connected(stopped) === devices, 300_000)
    } finally {
      clearInterval(watch)
    }
    while (times.length < devices) times.push(performance.now() - began)
    const seconds = (share: number): string => ((times[Math.ceil(devices * share) - 1] ?? 0) / 1000).toFixed(1)
    process.stdout.write(`${devices} expired boards back: half after ${seconds(0.5)} s, 95 % after ${seconds(0.95)} s, all after ${seconds(1)} s\n`)

    const views = await Promise.all(after.serials.map(async (serial) => await client.call('device.show', { params: { id: serial.toLowerCase() } })))
    expect(views.filter(({ state, online }) => state !== 'enrolled' || !online)).toEqual([])
    // One recovery each, whatever was lost and repeated on the way; nobody is held.
    expect(views.filter(({ recovery }) => recovery?.begun.length !== 1 || recovery.attempts !== 0 || recovery.heldAt !== null)).toEqual([])
  } finally {
    await Promise.all(fleets.map(async (fleet) => await fleet.stop()))
    await world.stop()
    rmSync(folder, { recursive: true, force: true })
  }
})
