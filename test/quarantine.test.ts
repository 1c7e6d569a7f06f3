import { afterAll, beforeAll, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openWorld, random, until, using, type World } from './world.ts'

/** The real server, the real agent, a board that is tampered with while the server runs. */
let world: World
let boards: readonly Awaited<ReturnType<World['simulated']>>[]
let agents: Agent[]
/** Ends the server's process at a step, as far as one process can: it stops answering and starts again on what is durable. */
let onStep: (name: string) => void = () => undefined

beforeAll(async () => {
  world = await openWorld({ step: (name) => onStep(name) })
  boards = await Promise.all(['GW-1', 'GW-2'].map(async (serial) => await world.simulated(serial)))
  await world.enlist(boards, 'plant')
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
  agents = boards.map((board) => world.agent(board))
  await until('both use the key', () => using(agents, 'telemetry', 1))
}, 60_000)
afterAll(async () => await world.stop())

const show = async (id: string): Promise<ResponseOf<'device.show'>> => await world.client.call('device.show', { params: { id } })
const stateOf = async (id: string): Promise<string> => (await show(id)).state

const powerCycle = (at: number): void => {
  const board = boards[at]
  if (board === undefined) throw new Error('no such board')
  agents[at]?.kill()
  board.board.boot()
  agents[at] = world.agent(board)
}
const tamper = (at: number): void => boards[at]?.board.flash.tamper('kernel', (bytes) => bytes.map((byte, index) => (index === 7 ? byte ^ 1 : byte)))

test('a device that boots tampered firmware gets no key any more, and shows up; with its firmware restored it is back', { timeout: 120_000 }, async () => {
  tamper(0)
  powerCycle(0)
  await until('it is quarantined, and connected', async () => (await stateOf('gw-1')) === 'quarantined' && (await show('gw-1')).online)
  const shown = await show('gw-1')
  expect(shown).toMatchObject({ online: true, verdict: 'contraindicated', verdictReason: 'reference.pcr-4', release: 'gateway/1.0.0' })
  expect(shown.quarantinedAt).toBeGreaterThan(0)
  expect(shown.claims.some(({ name }) => name === 'pcr-4')).toBe(true)
  expect((await world.client.call('device.list', { query: { state: 'quarantined' } })).items.map(({ id }) => id)).toEqual(['gw-1'])
  const { campaign } = await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
  await until('the other uses the next epoch', () => using(agents.slice(1), 'telemetry', 2))
  expect((await world.client.call('campaign.show', { params: { id: campaign } })).targets).toBe(1)
  expect((await show('gw-1')).holdings.map(({ epoch }) => epoch)).toEqual([1])
  // What it holds does not open under this firmware either.
  expect(agents[0]?.status()).toMatchObject({ locked: true, current: {} })
  tamper(0)
  powerCycle(0)
  await until('it is back with the newest epoch', () => using(agents, 'telemetry', 2))
  expect(await show('gw-1')).toMatchObject({ state: 'enrolled', verdict: 'affirming', quarantinedAt: null })
})

test('asked by an operator it attests at once', { timeout: 60_000 }, async () => {
  const before = (await show('gw-1')).verdictAt ?? 0
  await until('it is connected', () => agents[0]?.status().connected === true)
  expect(await world.client.call('device.attest', { params: { id: 'gw-1' } })).toEqual({ asked: 'asked' })
  await until('there is a newer verdict', async () => ((await show('gw-1')).verdictAt ?? 0) > before)
})

test('the same on swtpm: a PCR that somebody extended is found, a clean boot is believed', { timeout: 120_000 }, async () => {
  const machine = await world.onSwtpm('GW-3')
  await world.enlist([machine], 'lab')
  await world.client.call('key.create', { body: { id: 'probe', protection: 'sealed' } })
  await world.client.call('key.grant', { params: { id: 'probe' }, body: { group: 'lab' } })
  const agent = world.agent(machine)
  const order = async (): Promise<void> => {
    await until('it is connected', () => agent.status().connected, 60_000)
    expect(await world.client.call('device.attest', { params: { id: 'gw-3' } })).toEqual({ asked: 'asked' })
  }
  await until('it uses the key', () => (agent.status().current['probe'] ?? 0) > 0, 60_000)
  const { verdictAt } = await show('gw-3')
  await order()
  await until('it has attested', async () => ((await show('gw-3')).verdictAt ?? 0) > (verdictAt ?? 0))
  expect((await show('gw-3')).verdict).toBe('affirming')
  await agent.stop()
  const transport = await machine.openTpm()
  const tpm = new Tpm(transport, { random })
  await tpm.pcrExtend(4, [{ hash: alg.sha256, digest: random(32) }])
  await tpm.close()
  await transport.close()
  world.agent(machine)
  // Its storage key does not open any more: it returns by proving itself anew, and cannot.
  await until('it is refused', async () => (await show('gw-3')).lastRefusal?.reason === 'log.replay.mismatch', 60_000)
  expect((await show('gw-3')).online).toBe(false)
})

test('a server that starts anew in the middle of a challenge asks again', { timeout: 90_000 }, async () => {
  const asked = Promise.withResolvers<void>()
  let count = 0
  onStep = (name) => {
    if (name !== 'attest.asked' || ++count > 1) return
    // The question is out, nobody will be there for the answer.
    asked.resolve()
    throw new Error('the process ends here')
  }
  const { verdictAt } = await show('gw-1')
  powerCycle(0)
  await asked.promise
  await world.restart()
  await until('it has attested the new boot', async () => ((await show('gw-1')).verdictAt ?? 0) > (verdictAt ?? 0), 60_000)
  expect(count).toBeGreaterThan(1)
  expect(await stateOf('gw-1')).toBe('enrolled')
  const { campaign } = await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
  await until('both use the next epoch', () => using(agents, 'telemetry', 3), 60_000)
  expect((await world.client.call('campaign.show', { params: { id: campaign } })).targets).toBe(2)
})
