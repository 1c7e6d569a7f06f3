import { readFileSync } from 'node:fs'
import { afterEach, expect, test } from 'vitest'
import { createClient, type Client } from '@fleetkey/cli/client.ts'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import type { EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'
import { openWorld, until, type Machine, type World } from './world.ts'
import { rolloverHolds } from './rollover-evidence.ts'

let world: World | undefined
afterEach(async () => {
  const ended = world
  world = undefined
  await ended?.stop()
})

const group = 'gateways'

/** Boards of the simulator, enrolled and connected. */
const fleet = async (of: World, count: number): Promise<{ readonly machines: readonly Machine[]; readonly agents: Agent[] }> => {
  const machines = await Promise.all(Array.from({ length: count }, async (_, at) => await of.simulated(`RB-${at + 1}`)))
  await of.enlist(machines, group)
  const agents = machines.map((machine) => of.agent(machine))
  await until('every board is connected', () => agents.every((agent) => agent.status().connected))
  return { machines, agents }
}

const status = async (of: World) => await of.client.call('ca.status')
const acknowledged = async (of: World, count: number): Promise<void> =>
  await until(`${count} boards have acknowledged`, async () => (await status(of)).readiness.acknowledged === count)
const states = async (of: World): Promise<string> => (await status(of)).generations.map(({ state }) => state).join(' ')

/** The first operator's token opens every door but one: nobody approves their own. */
const secondOperator = async (of: World): Promise<Client> => {
  const { token } = await of.client.call('operator.add', { body: { id: 'bob', roles: ['owner'] } })
  return createClient({ ...(JSON.parse(readFileSync(of.server.cliFile, 'utf8')) as { server: string; ca: string }), token })
}

const refusal = async (act: Promise<unknown>): Promise<string> =>
  await act.then(
    () => 'done',
    (thrown: unknown) => (thrown as { code?: string }).code ?? String(thrown),
  )

/** The whole path of one rollover, with the boards that are connected. */
const rollOver = async (of: World, connected: number, root: boolean): Promise<void> => {
  await of.client.call('ca.prepare', { body: { root } })
  await of.client.call('ca.distribute')
  await acknowledged(of, connected)
  await of.client.call('ca.activate', { body: {} })
  await acknowledged(of, connected)
}

test(
  'the issuing CA is rolled over: out of order refused, acknowledged, a board that slept through it comes back, the key is gone',
  { timeout: 180_000 },
  async () => {
    world = await openWorld()
    const now = world
    const { machines, agents } = await fleet(now, 3)
    const [sleeper] = agents
    await sleeper?.stop()
    for (const name of ['ca.distribute', 'ca.activate'] as const) expect(await refusal(now.client.call(name, { body: {} } as never))).toBe('conflict')
    expect(await refusal(now.client.call('ca.taint', { body: {} }))).toBe('conflict')
    expect(await refusal(now.client.call('ca.retire', { body: {} }))).toBe('conflict')
    await rollOver(now, 2, false)
    expect((await status(now)).readiness).toMatchObject({ devices: 3, acknowledged: 2, waiting: 0, away: 1, stranded: 0 })
    expect(await states(now)).toBe('superseded active')
    expect((await now.client.call('ca.activate', { body: {} })).already).toBe(true)
    expect(await refusal(now.client.call('ca.retire', { body: {} }))).toBe('conflict')
    await now.client.call('ca.taint', { body: { within: 1 } })
    await until('connected boards have renewed', async () => (await status(now)).generations[0]?.devices === 1, 60_000)
    expect(await refusal(now.client.call('ca.retire', { body: {} }))).toBe('conflict')
    // It trusts what its configuration says, and its certificate is of the CA that is tainted by now.
    const back = now.agent(machines[0] as Machine)
    await until('the board that slept is back and renewed', async () => (await status(now)).generations[0]?.devices === 0, 60_000)
    expect(back.status().lastRefusal).toBeNull()
    await now.client.call('ca.retire', { body: {} })
    await acknowledged(now, 3)
    expect(await states(now)).toBe('retired active')
    expect((await now.client.call('ca.retire', { body: {} })).already).toBe(true)
    await until('all are connected', () => [back, agents[1], agents[2]].every((agent) => agent?.status().connected))
    await now.restart()
    await until('all are connected after a restart', () => [back, agents[1], agents[2]].every((agent) => agent?.status().connected), 60_000)
    await rolloverHolds(now)
  },
)

test(
  'a new root, with boards that sleep through it: they come back by the certificates of one root by the other; forced only with a second person',
  { timeout: 240_000 },
  async () => {
    world = await openWorld()
    const now = world
    const { machines, agents } = await fleet(now, 3)
    const [once, twice, stays] = agents
    await once?.stop()
    await twice?.stop()
    await rollOver(now, 1, true)
    const after = await status(now)
    expect(after.roots).toEqual([
      { number: 1, state: 'trusted' },
      { number: 2, state: 'trusted' },
    ])
    expect(after.readiness).toMatchObject({ away: 2, stranded: 0 })
    expect(after.readiness.until).toBeGreaterThan(Date.now())
    // The old root alone, and the server's certificate is under the new one.
    const back = now.agent(machines[0] as Machine)
    await until('it is back', () => back.status().connected)
    expect(back.status().lastRefusal).toBeNull()
    await acknowledged(now, 2)
    await now.client.call('ca.taint', { body: { within: 1 } })
    await until('two have renewed', async () => (await status(now)).generations[0]?.devices === 1, 60_000)

    // The third sleeps on: its certificates are of the CA that goes.
    expect(await refusal(now.client.call('ca.retire', { body: {} }))).toBe('conflict')
    const force = { body: { force: { reason: 'the key was seen elsewhere' } } }
    const { approval } = await now.client.call('ca.retire', force)
    expect(approval).not.toBeNull()
    expect((await now.client.call('ca.retire', force)).approval).toBe(approval)
    expect(await states(now)).toBe('tainted active')
    expect(await refusal(now.client.call('approval.grant', { params: { id: approval ?? '' } }))).toBe('forbidden')
    const bob = await secondOperator(now)
    await bob.call('approval.grant', { params: { id: approval ?? '' } })
    bob.close()
    expect(await now.client.call('ca.retire', force)).toMatchObject({ approval: null })
    expect((await now.client.call('approval.list')).items).toMatchObject([{ state: 'spent', askedBy: 'owner', grantedBy: 'bob' }])
    expect((await status(now)).roots).toEqual([
      { number: 1, state: 'retired' },
      { number: 2, state: 'trusted' },
    ])

    // And on: through a second change of the root. Two certificates lead from what it trusts to the third root; what was issued to it counts no more.
    await rollOver(now, 2, true)
    expect((await status(now)).readiness).toMatchObject({ devices: 3, acknowledged: 2, away: 1, stranded: 0 })
    const sleeper = now.agent(machines[1] as Machine)
    await until('it has proven itself anew', () => sleeper.status().connected, 90_000)
    let log = ''
    await now.client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    expect(log).toContain('certificate.ca-retired')
    await acknowledged(now, 3)
    expect([back, stays, sleeper].map((agent) => agent?.status().problem)).toEqual([null, null, null])
    await rolloverHolds(now)
  },
)

test(
  'a hostile broker replays an older bundle: refused; a board that loses its power at every step of taking one has it after all',
  { timeout: 180_000 },
  async () => {
    const seen: { readonly client: string; readonly bytes: Uint8Array }[] = []
    let bus: EmbeddedBus | undefined
    world = await openWorld({
      bus: (inner) => {
        bus = inner
        return new Proxy(inner, {
          get(target, name) {
            if (name !== 'send') return Reflect.get(target, name) as unknown
            return async (client: string, bytes: Uint8Array) => {
              seen.push({ client, bytes })
              return await target.send(client, bytes)
            }
          },
        })
      },
    })
    const now = world
    const { machines, agents } = await fleet(now, 1)
    const [machine] = machines as [Machine]
    await rollOver(now, 1, true)
    const versions = seen.flatMap(({ client, bytes }) => {
      const { body } = readMessage(bytes, { max: 64 << 10 }).envelope
      return body.type === 'trust' ? [{ client, bytes, version: body.version }] : []
    })
    const [older] = versions.filter(({ version }) => version === 2)
    expect(versions.map(({ version }) => version)).toContain(3)
    await bus?.send(older?.client ?? '', older?.bytes ?? new Uint8Array())
    await until('it says what it thinks of it', () => now.lines.some((line) => line.includes('trust bundle 2 after 3')))
    expect((await status(now)).readiness.acknowledged).toBe(1)
    await agents[0]?.stop()
    // Each command makes another bundle, and each bundle loses its board once.
    const commands = [
      ['trust.written', async () => await now.client.call('ca.taint', { body: { within: 1 } })],
      ['trust.renamed', async () => await now.client.call('ca.retire', { body: {} })],
      ['trust.durable', async () => (await now.client.call('ca.prepare', { body: {} }), await now.client.call('ca.distribute'))],
      ['trust.stored', async () => await now.client.call('ca.activate', { body: {} })],
    ] as const
    for (const [at, command] of commands) {
      await command()
      let died = false
      const victim: Agent = now.agent(machine, {
        step: (name) => {
          if (name !== at || died) return
          died = true
          setImmediate(() => victim.kill())
          throw new Error('power lost')
        },
      })
      await until(`it died at ${at}`, () => died)
      const after = now.agent(machine)
      await acknowledged(now, 1)
      if (at === 'trust.written') await until('it has renewed', async () => (await status(now)).generations[0]?.devices === 0, 60_000)
      await until('it is there', () => after.status().connected)
      expect(after.status().problem).toBeNull()
      await after.stop()
    }
    await rolloverHolds(now)
  },
)
