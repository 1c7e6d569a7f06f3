import { existsSync } from 'node:fs'
import { afterAll, beforeAll, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { expectCut, stepClock } from './cut.ts'
import { openWorld, until, using, type Machine, type PlainMachine, type World } from './world.ts'

/** The real server and the real agent on boards of all three kinds: a TPM, a secure element, nothing but a token. */
let world: World
const steps = stepClock()
const machines: (Machine | PlainMachine)[] = []
const agents: Agent[] = []
const ids = ['gw-1', 'se-1', 'pl-1'] as const
let batch: string
let token: string

beforeAll(async () => {
  world = await openWorld({ step: steps.step })
  machines.push(await world.simulated('GW-1'), await world.withSecureElement('SE-1'), { serial: 'PL-1' })
  batch = await world.enlist(machines, 'plant')
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
  await world.client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
  for (const id of ['telemetry', 'command-auth']) await world.client.call('key.grant', { params: { id }, body: { group: 'plant' } })
  token = await world.token(batch)
  agents.push(...machines.map((machine) => world.agent(machine, { token })))
  await until('all three use the key', () => using(agents, 'telemetry', 1), 60_000)
}, 90_000)
afterAll(async () => await world.stop())

const show = async (id: string): Promise<ResponseOf<'device.show'>> => await world.client.call('device.show', { params: { id } })
const at = (index: number): Agent => agents[index] as Agent
const machine = (index: number): PlainMachine => machines[index] as PlainMachine
const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

test('each has the assurance of its own way in, and says how its firmware is known', async () => {
  const [tpm, element, plain] = await Promise.all(ids.map(show))
  expect(tpm).toMatchObject({ method: 'tpm2', assurance: 'simulated', measured: true, verdict: 'affirming', idevidHash: null })
  // Its CA is one for tests: nothing about hardware is proven.
  expect(element).toMatchObject({ method: 'idevid', assurance: 'simulated', measured: false, verdict: 'warning', verdictReason: 'firmware.unmeasured' })
  expect(element?.idevidHash).toMatch(/^[0-9a-f]{64}$/)
  expect(element?.claims).toEqual([
    { name: 'idevid-serial-number', value: 'SE-1' },
    { name: 'idevid-hardware-module', value: `1.3.6.1.4.1.58888.3.1/${Buffer.from('SE-1').toString('hex')}` },
  ])
  expect(plain).toMatchObject({ method: 'token', assurance: 'token', measured: false, verdict: 'warning', ekHash: null, idevidHash: null })
})

test('a tpm key goes to the board with a TPM alone; what one encrypts the others read', async () => {
  await until('the TPM has it', () => at(0).status().current['command-auth'] === 1)
  expect(
    agents.map((agent) =>
      agent
        .status()
        .holdings.map(({ key }) => key)
        .toSorted(),
    ),
  ).toEqual([['command-auth', 'telemetry'], ['telemetry'], ['telemetry']])
  const { ciphertext } = await at(2).encrypt('telemetry', bytes('hello'))
  for (const agent of agents) expect(Buffer.from(agent.decrypt('telemetry', ciphertext).plaintext).toString()).toBe('hello')
})

test('the token is gone from the device, and known to the server as used', async () => {
  expect(existsSync(world.tokenFile(machine(2)))).toBe(false)
  const { items } = await world.client.call('token.list', { query: { batch } })
  expect(items).toMatchObject([{ state: 'spent', spentBy: 'pl-1', device: null }])
  expect(JSON.stringify(items)).not.toContain(token.slice(5, 30))
})

test('a rotation is proven in use by all three', { timeout: 60_000 }, async () => {
  const { campaign } = await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
  await until('done', async () => (await world.client.call('campaign.show', { params: { id: campaign } })).state === 'done', 40_000)
  expect(using(agents, 'telemetry', 2)).toBe(true)
  expect((await show('pl-1')).holdings).toMatchObject([
    { epoch: 1, stage: 'retired' },
    { epoch: 2, stage: 'active' },
  ])
})

test('started again they open their keys without the server, and come back with no token', { timeout: 60_000 }, async () => {
  for (const index of [1, 2]) {
    await at(index).stop()
    const alone = world.agent(machine(index), { offline: true })
    await until('its keys are there', () => alone.status().current['telemetry'] === 2)
    await alone.stop()
    agents[index] = world.agent(machine(index))
  }
  await until('they are connected', () => agents.every((agent) => agent.status().connected), 30_000)
})

test('a server that starts again has them all back', { timeout: 60_000 }, async () => {
  await world.restart()
  await until('they are connected', () => agents.every((agent) => agent.status().connected), 40_000)
  const { campaign } = await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
  await until('done', async () => (await world.client.call('campaign.show', { params: { id: campaign } })).state === 'done', 40_000)
})

test('attestation on demand is refused in plain words where nothing can quote', async () => {
  for (const id of ['se-1', 'pl-1']) await expect(world.client.call('device.attest', { params: { id } })).rejects.toThrow(/has no TPM/)
})

test('a policy that demands measured firmware quarantines them; one that no longer does has them back', { timeout: 60_000 }, async () => {
  const preview = await world.client.call('group.policy.preview', { params: { id: 'plant' }, body: { minimumRelease: 1 } })
  expect(preview).toMatchObject({ judged: 3, quarantines: 2, first: [{ device: 'pl-1', reason: 'firmware.unmeasured' }, { device: 'se-1' }] })
  await world.client.call('group.policy.set', { params: { id: 'plant' }, body: { minimumRelease: 1 } })
  expect((await Promise.all(ids.map(show))).map(({ state }) => state)).toEqual(['enrolled', 'quarantined', 'quarantined'])
  await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
  await until('the TPM goes on', () => at(0).status().current['telemetry'] === 4, 30_000)
  expect([1, 2].map((index) => at(index).status().current['telemetry'])).toEqual([3, 3])
  await world.client.call('group.policy.set', { params: { id: 'plant' }, body: { minimumRelease: 0 } })
  expect((await Promise.all(ids.map(show))).map(({ state }) => state)).toEqual(['enrolled', 'enrolled', 'enrolled'])
  await until('all have the newest', () => using(agents, 'telemetry', 4), 30_000)
})

test('a group that demands a factory identity keeps its keys from the lower levels', { timeout: 60_000 }, async () => {
  await world.client.call('group.policy.set', { params: { id: 'plant' }, body: { assurance: 'simulated' } })
  await until('the token board has erased it', () => at(2).status().holdings.length === 0, 30_000)
  expect(at(1).status().current['telemetry']).toBe(4)
  await world.client.call('group.policy.set', { params: { id: 'plant' }, body: { assurance: 'token' } })
  await until('it is back', () => using(agents, 'telemetry', 4), 30_000)
})

test('revoked: cut off at once, the key rotated without them, and nothing brings them back', { timeout: 90_000 }, async () => {
  for (const [index, id, left, epoch] of [
    [1, 'se-1', [0, 2], 5],
    [2, 'pl-1', [0], 6],
  ] as const) {
    await expectCut({
      order: async () => await world.client.call('device.revoke', { params: { id }, body: { reason: 'lost' } }),
      isCut: () => !at(index).status().connected,
      durable: () => steps.at('revoke.committed'),
    })
    await until('the others go on without it', () => using(left.map(at), 'telemetry', epoch), 30_000)
    // What its record shows of refusals is bounded: the device itself hears every one.
    await until('it is refused', () => at(index).status().lastRefusal === 'unauthenticated', 60_000)
    expect(at(index).status().current['telemetry']).toBe(epoch - 1)
  }
})
