import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { openDocument } from '@fleetkey/device-agent/files.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { openWorld, until, using, type World } from './world.ts'

type Simulated = Awaited<ReturnType<World['simulated']>>
const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

/** Durable steps of a device that goes over to keys of a new generation, in their order. */
const steps = [
  'approvals.written',
  'approvals.renamed',
  'approvals.durable',
  'firmware.learned',
  'tpm-keys.written',
  'tpm-keys.renamed',
  'tpm-keys.durable',
  'firmware.made',
  'keyring.written',
  'keyring.renamed',
  'keyring.durable',
  'keyring.rekeyed',
  'identity.written',
  'identity.renamed',
  'identity.durable',
  'firmware.rekeyed',
  'tpm-keys.written#3',
  'tpm-keys.renamed#3',
  'tpm-keys.renamed#4',
  'firmware.settled',
  'attested',
] as const

/** The power of a board goes at each step of the change to a new generation. One server; a board, and a withdrawal, for every step. */
let world: World
const boards = new Map<string, Simulated>()
const agents = new Map<string, Agent>()

beforeAll(async () => {
  world = await openWorld()
  for (const [at, step] of steps.entries()) boards.set(step, await world.simulated(`GW-${at}`))
  await world.importRelease(world.build('0.9.0', 0))
  await world.enlist([...boards.values()], 'plant')
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await world.client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
  for (const key of ['telemetry', 'command-auth']) await world.client.call('key.grant', { params: { id: key }, body: { group: 'plant' } })
}, 60_000)
afterAll(async () => await world.stop(), 60_000)

const folderOf = (machine: Simulated): string => join(world.folder, 'agents', machine.serial)
const stored = async (machine: Simulated): Promise<{ pairs: { storage: { private: Uint8Array } }[] }> => {
  const found = await openDocument({ files: nodeFileSystem, folder: folderOf(machine), name: 'tpm-keys', step: () => undefined }).load()
  return decode(found ?? new Uint8Array()) as { pairs: { storage: { private: Uint8Array } }[] }
}

describe('a board that loses its power while it goes over to a new generation', () => {
  const killed = new Map<string, string>()
  const oldBlobs = new Map<string, Uint8Array>()

  test('at each step, all at once: every one comes back with all its keys, nothing of the old pair is left', { timeout: 240_000 }, async () => {
    for (const [step, machine] of boards) agents.set(step, world.agent(machine))
    await until('all use both keys', () => using([...agents.values()], 'telemetry', 1) && using([...agents.values()], 'command-auth', 1), 120_000)
    const sealed = (await agents.get('attested')?.encrypt('telemetry', bytes('before')))?.ciphertext ?? new Uint8Array()
    // Everybody starts anew, now with a trap.
    for (const [step, machine] of boards) {
      oldBlobs.set(step, (await stored(machine)).pairs[0]?.storage.private ?? new Uint8Array())
      await agents.get(step)?.stop()
      machine.board.boot()
      const [name = step, count = '1'] = step.split('#')
      let left = Number(count)
      let armed = false
      const agent = world.agent(machine, {
        step: (reached) => {
          if (!armed || reached !== name || --left > 0) return
          agents.get(step)?.kill()
          killed.set(step, reached)
        },
      })
      agents.set(step, agent)
      await until(`${step} is connected`, () => agent.status().connected, 60_000)
      armed = true
    }
    await world.client.call('release.withdraw', { params: { model: 'gateway', name: '0.9.0' }, body: { reason: 'test' } })
    await until('every board has lost its power', () => killed.size === steps.length, 60_000)
    for (const [step, machine] of boards) {
      machine.board.boot()
      agents.set(step, world.agent(machine))
    }
    await until('all use the next epochs', () => using([...agents.values()], 'telemetry', 2) && using([...agents.values()], 'command-auth', 2), 120_000)
    for (const [step, agent] of agents) {
      expect(Buffer.from(agent.decrypt('telemetry', sealed).plaintext).toString(), step).toBe('before')
      const { mac, epoch } = await agent.mac('command-auth', bytes(step))
      expect(await agent.verify('command-auth', epoch, bytes(step), mac), step).toBe(true)
    }
    for (const [step, machine] of boards) {
      await until(`${step} has one pair`, async () => (await stored(machine)).pairs.length === 1)
      await agents.get(step)?.stop()
      const old = oldBlobs.get(step) ?? bytes('none')
      for (const name of readdirSync(folderOf(machine)).filter((one) => !one.endsWith('.new')))
        expect(readFileSync(join(folderOf(machine), name)).includes(old), `${step}: ${name}`).toBe(false)
    }
  })

  test('and opens its keys without the server afterwards', { timeout: 120_000 }, async () => {
    for (const [step, machine] of boards) {
      machine.board.boot()
      agents.set(step, world.agent(machine, { offline: true }))
    }
    await until('all have their keys', () => using([...agents.values()], 'telemetry', 2) && using([...agents.values()], 'command-auth', 2), 60_000)
    expect([...agents.values()].map((agent) => agent.status().locked)).toEqual(steps.map(() => false))
  })
})
