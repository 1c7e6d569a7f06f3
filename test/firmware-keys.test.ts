import { cpSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { openDocument } from '@fleetkey/device-agent/files.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import type { Release } from '@fleetkey/firmware-sim/release/release.ts'
import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { openWorld, until, using, type World } from './world.ts'

type Simulated = Awaited<ReturnType<World['simulated']>>
const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

let world: World
let board: Simulated
let agent: Agent
let first: Release

beforeAll(async () => {
  world = await openWorld()
  board = await world.simulated('GW-1')
  first = world.build('1.0.0', 1)
  await world.enlist([board], 'plant')
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await world.client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
  for (const key of ['telemetry', 'command-auth']) await world.client.call('key.grant', { params: { id: key }, body: { group: 'plant' } })
  agent = world.agent(board)
  await until('it uses both keys', () => using([agent], 'telemetry', 1) && using([agent], 'command-auth', 1), 60_000)
}, 90_000)
afterAll(async () => {
  await world.stop()
})

const show = async (): Promise<ResponseOf<'device.show'>> => await world.client.call('device.show', { params: { id: 'gw-1' } })
const folder = (): string => join(world.folder, 'agents', 'GW-1')
/** What is on its disk, in the clear: blobs and approvals are no secrets. */
const stored = async (name: string): Promise<unknown> => {
  const found = await openDocument({ files: nodeFileSystem, folder: folder(), name, step: () => undefined }).load()
  return found === undefined ? undefined : decode(found)
}
const approved = async (): Promise<readonly (readonly string[])[]> => {
  const { sets } = ((await stored('approvals')) ?? { sets: [] }) as { sets: { approvals: { release: string }[] }[] }
  return sets.map(({ approvals }) => approvals.map(({ release }) => release))
}
const pairs = async (): Promise<readonly { policy: { ref: Uint8Array } }[]> =>
  ((await stored('tpm-keys')) as { pairs: { policy: { ref: Uint8Array } }[] }).pairs
const deliveries = async (): Promise<number> => {
  let log = ''
  await world.client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
  return log.split('\n').filter((line) => line.includes('"key.deliver"') && line.includes('deliver ')).length
}
/** The power goes; the board comes up with what is in its flash. */
const reboot = (of: Parameters<World['agent']>[1] = {}): void => {
  agent.kill()
  board.board.boot()
  agent = world.agent(board, of)
}
const usable = async (): Promise<boolean> => {
  const { ciphertext } = await agent.encrypt('telemetry', bytes('4.2 bar'))
  const { mac, epoch } = await agent.mac('command-auth', bytes('open'))
  return (
    Buffer.from(agent.decrypt('telemetry', ciphertext).plaintext).toString() === '4.2 bar' && (await agent.verify('command-auth', epoch, bytes('open'), mac))
  )
}

describe('keys under firmware, over the life of a board', () => {
  test('what it holds works, and its disk says under what', { timeout: 60_000 }, async () => {
    expect(await usable()).toBe(true)
    expect(agent.status()).toMatchObject({ locked: false, problem: null })
    expect([await approved(), (await pairs()).length]).toEqual([[['gateway/1.0.0']], 1])
  })

  test('a release is approved before it is installed: after the update its keys open without the server', { timeout: 90_000 }, async () => {
    const second = world.build('2.0.0', 2)
    await world.importRelease(second)
    await until('the device has the approval', async () => (await approved())[0]?.join() === 'gateway/2.0.0,gateway/1.0.0')
    board.board.flash.update(second)
    reboot({ offline: true })
    await until('it has its keys', () => using([agent], 'telemetry', 1) && using([agent], 'command-auth', 1))
    expect(await usable()).toBe(true)
    expect(agent.status()).toMatchObject({ connected: false, locked: false })
    reboot()
    await until('the server knows what it runs', async () => (await show()).release === 'gateway/2.0.0')
    expect(await usable()).toBe(true)
  })

  test('updated before the approval: locked, said in plain words; the approval unlocks it, nothing is delivered again', { timeout: 120_000 }, async () => {
    const third = world.build('3.0.0', 3)
    const before = await deliveries()
    board.board.flash.update(third)
    reboot()
    await until('it is locked and connected', () => agent.status().locked && agent.status().connected, 60_000)
    expect(agent.status()).toMatchObject({ current: {}, holdings: [] })
    expect(agent.status().problem).toMatch(/^locked: the firmware that runs here is not approved/)
    expect(() => agent.get('telemetry')).toThrow(/^locked: /)
    await expect(agent.mac('command-auth', bytes('open'))).rejects.toThrow(/^locked: /)
    await until('it is quarantined', async () => (await show()).state === 'quarantined')
    await world.importRelease(third)
    await until('its keys are back', () => using([agent], 'telemetry', 1) && using([agent], 'command-auth', 1))
    expect(await usable()).toBe(true)
    await until('it is out of quarantine', async () => (await show()).state === 'enrolled')
    expect(await deliveries()).toBe(before)
    // The identity is at rest again: the next start needs nobody.
    reboot({ offline: true })
    await until('it has its keys', () => using([agent], 'telemetry', 1))
    expect(agent.status().device).toBe('gw-1')
    reboot()
    await until('it is back', () => agent.status().connected)
  })

  test('tampered firmware: locked, whatever is on the disk', { timeout: 60_000 }, async () => {
    const flip = (at: number) => (of: Uint8Array) => of.map((byte, index) => (index === at ? byte ^ 1 : byte))
    board.board.flash.tamper('initrd', flip(9))
    reboot({ offline: true })
    await until('it is locked', () => agent.status().locked)
    await expect(agent.encrypt('telemetry', bytes('x'))).rejects.toThrow(/^locked: /)
    board.board.flash.tamper('initrd', flip(9))
    reboot()
    await until('it is back', () => agent.status().connected && !agent.status().locked)
  })

  test('withdrawn: new keys under a new reference, everything rotated, the old blobs gone from the disk', { timeout: 120_000 }, async () => {
    const [old] = await pairs()
    cpSync(folder(), `${folder()}.stolen`, { recursive: true })
    await world.client.call('release.withdraw', { params: { model: 'gateway', name: '1.0.0' }, body: { reason: 'CVE' } })
    await until('it uses the next epochs', () => using([agent], 'telemetry', 2) && using([agent], 'command-auth', 2), 60_000)
    expect(await usable()).toBe(true)
    const now = await pairs()
    expect(now).toHaveLength(1)
    expect(Buffer.from(now[0]?.policy.ref ?? []).equals(Buffer.from(old?.policy.ref ?? []))).toBe(false)
    expect((await approved())[0]?.join()).toBe('gateway/3.0.0,gateway/2.0.0')
    reboot({ offline: true })
    await until('its keys open without the server', () => using([agent], 'telemetry', 2) && using([agent], 'command-auth', 2))
    expect(await usable()).toBe(true)
    reboot()
    await until('it is back', () => agent.status().connected)
  })

  test('back on the withdrawn release: locked', { timeout: 60_000 }, async () => {
    board.board.flash.update(first)
    reboot()
    await until('it is locked', () => agent.status().locked)
    await until('it is quarantined', async () => (await show()).state === 'quarantined', 60_000)
    expect(agent.status().current).toEqual({})
    expect(agent.status().locked).toBe(true)
  })

  test('a disk from before the withdrawal, on the withdrawn release: what was current then, and nothing since', { timeout: 90_000 }, async () => {
    agent.kill()
    rmSync(folder(), { recursive: true })
    cpSync(`${folder()}.stolen`, folder(), { recursive: true })
    board.board.boot()
    agent = world.agent(board)
    // Replaying the old approval opens what was under it: that is why everything was rotated.
    await until('the old epochs open', () => using([agent], 'telemetry', 1))
    expect(agent.list().map(({ key, epochs }) => [key, epochs])).toEqual([
      ['command-auth', [1]],
      ['telemetry', [1]],
    ])
    await until('the server has seen what it runs', async () => (await show()).state === 'quarantined')
    await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
    await new Promise((resolve) => void setTimeout(resolve, 1_000))
    expect(agent.status().current['telemetry']).toBe(1)
  })
})
