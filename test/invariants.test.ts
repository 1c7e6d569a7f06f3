import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import type { Agent, AgentStatus } from '@fleetkey/device-agent/agent.ts'
import type { Store, Tables } from '@fleetkey/server/flows/context.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { evidenceOf } from './invariants/agent-evidence.ts'
import type { DeviceEvidence, Evidence } from './invariants/evidence.ts'
import { invariants } from './invariants/invariants.ts'
import { openWorld, until, using, type World } from './world.ts'

let world: World
let store: Store
let sound: Evidence

beforeAll(async () => {
  world = await openWorld()
  const { client } = world
  const machines = await Promise.all(['GW-1', 'GW-2'].map(async (serial) => await world.simulated(serial)))
  await world.enlist(machines, 'plant')
  const agents: readonly Agent[] = machines.map((machine) => world.agent(machine))
  const history: { device: string; key: string; epoch: number }[] = []
  for (const agent of agents)
    agent.onChange(({ device, current }) => {
      if (device !== null) for (const [key, epoch] of Object.entries(current)) history.push({ device, key, epoch })
    })
  await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
  for (const key of ['telemetry', 'command-auth']) await client.call('key.grant', { params: { id: key }, body: { group: 'plant' } })
  await until('both use both', () => using(agents, 'telemetry', 1) && using(agents, 'command-auth', 1))
  const { campaign } = await client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
  await until('both have proven it', async () => (await client.call('campaign.show', { params: { id: campaign } })).counts['active'] === 2)
  await until('every statement has arrived', async () => {
    const views = await Promise.all(['gw-1', 'gw-2'].map(async (id) => await client.call('device.show', { params: { id } })))
    return views.every(({ holdings }) => holdings.every(({ stage }) => stage === 'active'))
  })
  let log = ''
  await client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
  const auditKey = Buffer.from((await client.call('audit.key')).spki, 'base64')
  const devices = agents.map((agent, at) => evidenceOf(`gw-${at + 1}`, agent))
  await world.server.stop()
  store = await openSqliteStore(join(world.folder, 'server', 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
  sound = { store, devices, history, log, auditKey }
}, 60_000)
afterAll(async () => {
  await store.close()
  await world.stop()
})

/** The store, with rows of one table seen otherwise than they are. */
const seen = <T extends keyof Tables>(table: T, change: (row: Tables[T]) => Tables[T] | undefined): Store => ({
  ...store,
  get: (async (of: keyof Tables, id: string) => {
    const row = await store.get(of, id)
    return of === table && row !== undefined ? change(row as Tables[T]) : row
  }) as Store['get'],
  find: (async (of: keyof Tables, query: never) => {
    const rows: readonly unknown[] = await store.find(of, query)
    return of === table ? rows.flatMap((row) => change(row as Tables[T]) ?? []) : rows
  }) as Store['find'],
})
const first = (change: (status: AgentStatus) => Partial<AgentStatus>, more: Partial<DeviceEvidence> = {}): readonly DeviceEvidence[] =>
  sound.devices.map((device, at) => (at === 0 ? { ...device, status: { ...device.status, ...change(device.status) }, ...more } : device))

/** What each invariant is there to find. */
const broken: readonly (readonly [string, () => Promise<Partial<Evidence>>])[] = [
  ['I1: an acknowledged key that a device does not hold', async () => ({ devices: first(({ holdings }) => ({ holdings: holdings.slice(1) })) })],
  [
    'I2: a device that uses an epoch which the server has destroyed',
    async () => ({ store: seen('epoch', (row) => ({ ...row, state: 'destroyed' }) as never) }),
  ],
  ['I2: a device that uses nothing', async () => ({ devices: first(() => ({ current: {} })) })],
  ['I3: an epoch that fell', async () => ({ history: [...sound.history, { device: 'gw-1', key: 'telemetry', epoch: 1 }] })],
  ['I4: two values of a sealed key', async () => ({ devices: first(() => ({}), { decrypt: async () => 'another' }) })],
  ['I4: two values of a key inside the TPM', async () => ({ devices: first(() => ({}), { verify: async () => false }) })],
  [
    'I5: one LDevID key twice',
    async () => {
      const of = await store.get('device', 'gw-1')
      if (of?.state !== 'enrolled') throw new Error('not enrolled')
      return { store: seen('device', (row) => (row.state === 'enrolled' ? { ...row, keys: { ...row.keys, ldevidSpki: of.keys.ldevidSpki } } : row)) }
    },
  ],
  [
    'I5: a serial number twice',
    async () => {
      const [certificate] = await store.find('certificate', { limit: 1 })
      return { store: seen('certificate', (row) => ({ ...row, der: certificate?.der ?? row.der })) }
    },
  ],
  ['I6: a certificate without intent', async () => ({ store: seen('intent', () => undefined) })],
  ['I6: an intent that stays open', async () => ({ store: seen('intent', (row) => ({ ...row, state: 'open' })) })],
  ['I7: a challenge that was spent twice', async () => ({ log: sound.log.replace(/.*challenge [0-9a-f]{32} spent.*\n/, (line) => line + line) })],
  ['I7: a token that was spent twice', async () => ({ log: `${sound.log}token ${'a'.repeat(32)} spent\ntoken ${'a'.repeat(32)} spent\n` })],
  ['I7: an enrolment without challenge', async () => ({ log: sound.log.replaceAll(/challenge [0-9a-f]{32} spent/g, '') })],
  ['I9: an entry that was edited', async () => ({ log: sound.log.replace('"device.acknowledge"', '"device.acknowledgf"') })],
  ['I9: an entry that is missing', async () => ({ log: sound.log.replace(/.*"device\.acknowledge".*\n/, '') })],
  ['I12: a key that was never sent', async () => ({ store: seen('holding', ({ key, ...row }) => (key === 'telemetry' ? undefined : { key, ...row })) })],
  ['I15: a target that is misplaced', async () => ({ store: seen('target', (row) => ({ ...row, wave: 7 })) })],
  [
    'I23: a delivery to a quarantined device',
    async () => ({
      log: sound.log.replace(/^.*"action":"key\.deliver".*"subject":"gw-1".*\n/m, (line) => {
        const entry = JSON.parse(line) as { detail: string; action: string }
        return `${JSON.stringify({ ...entry, action: 'device.quarantine', detail: 'quarantined: release.withdrawn' })}\n${line}`
      }),
    }),
  ],
  [
    'I24: a delivery to a suspended device',
    async () => ({
      log: sound.log.replace(/^.*"action":"key\.deliver".*"subject":"gw-1".*\n/m, (line) => {
        const entry = JSON.parse(line) as { action: string }
        return `${JSON.stringify({ ...entry, action: 'device.suspend' })}\n${line}`
      }),
    }),
  ],
  [
    'I24: a good certificate of a revoked device',
    async () => ({
      store: seen('device', (row) => (row.state === 'enrolled' ? ({ ...row, state: 'revoked', revokedAt: row.enrolledAt, reason: '' } as never) : row)),
    }),
  ],
  [
    'I25: withdrawn firmware that opens the epoch in use',
    async () => ({ opened: [{ device: 'gw-1', by: 'withdrawn', how: 'gateway/0.9', holdings: [{ key: 'telemetry', epoch: 2, stage: 'active' }] }] }),
  ],
  [
    'I25: withdrawn firmware that stays approved',
    async () => ({ store: seen('release', (row) => ({ ...row, withdrawn: { at: row.importedAt, reason: 'a hole' } })) }),
  ],
  ['I26: the bytes of a key that is bound to the TPM', async () => ({ devices: first(() => ({}), { encrypt: async () => 'ciphertext' }) })],
  [
    'I26: a medium that opens beside another TPM',
    async () => ({ opened: [{ device: 'gw-1', by: 'another TPM', how: 'beside it', holdings: [{ key: 'telemetry', epoch: 1, stage: 'active' }] }] }),
  ],
  [
    'I26: a bound key that was sent to a device without TPM',
    async () => ({
      store: seen('device', (row) => ('keys' in row ? ({ ...row, keys: { recipientSpki: null, ldevidSpki: new Uint8Array(1) } } as never) : row)),
    }),
  ],
  [
    'I27: a rotation that stays owed',
    async () => ({
      store: {
        ...sound.store,
        find: (async (of: keyof Tables, query: never) => [
          ...(await sound.store.find(of, query)),
          ...(of === 'setting' ? [{ id: 'owed-rotation/revoke/gw-1' }] : []),
        ]) as Store['find'],
      },
    }),
  ],
  ['I15: a device twice in a campaign', async () => ({ store: seen('target', (row) => ({ ...row, device: 'gw-1' as never })) })],
]

/** Names of the invariants that do not hold. */
const violated = async (evidence: Evidence): Promise<readonly string[]> => {
  const found: string[] = []
  for (const invariant of invariants)
    try {
      await invariant(evidence)
    } catch (thrown) {
      found.push(thrown instanceof Error ? thrown.message : String(thrown))
    }
  return found
}

test('all of them hold after an undisturbed run', async () => expect(await violated(sound)).toEqual([]))

test.each(broken)('%s is found', async (name, of) => {
  const found = await violated({ ...sound, ...(await of()) })
  expect(found.filter((what) => what.startsWith(name.slice(0, name.indexOf(':') + 1)))).toHaveLength(1)
})

test('I9 finds an effect that the log says of another device', async () => {
  const log = sound.log.replaceAll('"subject":"gw-1"', '"subject":"gw-2"')
  const [verdict] = (await violated({ ...sound, log })).filter((what) => what.startsWith('I9'))
  expect(verdict).toBeDefined()
})
