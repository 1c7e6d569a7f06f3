import { randomBytes } from 'node:crypto'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import type { BodyIn, ResponseOf } from '@fleetkey/protocol/admin.ts'
import { isFrame } from '@fleetkey/protocol/chunks.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import type { EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'
import { imaEntry, imaLimits, marshalIma, parseIma, type ImaEntry } from '@fleetkey/tpm2/ima.ts'
import { openWorld, until, using, type Machine, type World } from './world.ts'

/** The real server and the real agent on boards whose kernel measures files: Linux IMA in continuous attestation. */
type Board = Awaited<ReturnType<World['simulated']>>

let world: World
/** What the server asked, by device. */
const asked: { readonly device: string; readonly attest: BodyOf<'attest'> }[] = []
let number = 0

beforeAll(async () => {
  world = await openWorld({
    bus: (bus) =>
      Object.create(bus, {
        send: {
          value: async (client: string, bytes: Uint8Array) => {
            const body = isFrame(bytes) ? undefined : readMessage(bytes, { max: 1 << 20 }).envelope.body
            if (body?.type === 'attest') asked.push({ device: client, attest: body })
            return await bus.send(client, bytes)
          },
        },
      }) as EmbeddedBus,
  })
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
}, 60_000)
afterAll(async () => await world.stop())

/** What the board's agent reads: the kernel's list, or what a test puts in its place. */
let lie: (list: readonly ImaEntry[]) => readonly ImaEntry[]
let missing: boolean
let board: Board
let machine: Machine
let agent: Agent
let id: string
let group: string

/** A new device in a group of its own, with its key. */
beforeEach(async () => {
  lie = (list) => list
  missing = false
  number++
  id = `gw-${number}`
  group = `plant-${number}`
  board = await world.simulated(`GW-${number}`)
  const { board: hardware, ...rest } = board
  machine = {
    ...rest,
    imaList() {
      if (missing) throw new Error('EACCES: permission denied')
      return marshalIma(lie(parseIma(hardware.imaList(), { maxBytes: 64 << 20, maxEntries: 1_000_000 })))
    },
  }
  await world.enlist([machine], group)
  await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group } })
  agent = world.agent(machine)
  await until('it uses the key', () => using([agent], 'telemetry', 1))
}, 60_000)

const show = async (): Promise<ResponseOf<'device.show'>> => await world.client.call('device.show', { params: { id } })
const policy = async (body: BodyIn<'group.policy.set'>) => await world.client.call('group.policy.set', { params: { id: group }, body })
const attest = async (): Promise<void> => void (await world.client.call('device.attest', { params: { id } }))
const questions = () => asked.filter(({ device }) => device === id).map(({ attest: { ima } }) => ima)
const measuresFiles = async (entries: number): Promise<void> => await until(`${entries} entries`, async () => (await show()).ima?.entries === entries)
const isQuarantined = async (reason: string): Promise<void> =>
  await until(`quarantined for ${reason}`, async () => {
    const { state, verdictReason } = await show()
    return state === 'quarantined' && verdictReason === reason
  })
const isBack = async (): Promise<void> => await until('it is back', async () => (await show()).state === 'enrolled')
/** What was said of its evidence. */
const answered = async (): Promise<readonly string[]> =>
  (await world.client.call('audit.list', { query: { device: id } })).items.filter(({ action }) => action === 'device.evidence').map(({ detail }) => detail)
/** boot_aggregate, /init and the agent. */
const first = 3
const file = (): Uint8Array => new Uint8Array(randomBytes(40))
const tool = (): void => board.board.measureFile('/usr/bin/tool', file())

describe('a device of a group that needs its list of measured files', { timeout: 60_000 }, () => {
  test('without that policy nobody asks', async () => {
    await attest()
    await until('it was asked', () => questions().length > 0)
    expect(questions()).toEqual([null])
    expect((await show()).ima).toBeNull()
  })

  test('is asked at once, for all of it; later only for what is new', async () => {
    expect(await policy({ ima: 'required' })).toMatchObject({ ima: 'required', onUnlisted: 'quarantine' })
    await measuresFiles(first)
    expect(await show()).toMatchObject({ state: 'enrolled', verdict: 'affirming', ima: { pending: 0, violations: 0, unlisted: 0 } })
    expect(asked.filter(({ device }) => device === id).map(({ attest: { selection } }) => selection)).toEqual([
      [{ hash: 'sha256', pcrs: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] }],
    ])
    tool()
    tool()
    await attest()
    await measuresFiles(first + 2)
    expect(questions()).toEqual([0, first])
    // Reference values speak of the firmware's PCRs alone.
    const claims = (await show()).claims.map(({ name }) => name)
    expect(claims.filter((name) => name.startsWith('pcr-'))).toEqual(['pcr-0', 'pcr-1', 'pcr-2', 'pcr-3', 'pcr-4', 'pcr-5', 'pcr-7', 'pcr-11'])
    expect(claims).toContain('ima-pcr-10')
  })

  test('after a reboot all of it again, before any key', async () => {
    await policy({ ima: 'required' })
    await measuresFiles(first)
    tool()
    await attest()
    await measuresFiles(first + 1)
    agent.kill()
    board.board.boot()
    agent = world.agent(machine)
    await until('it attested this boot', async () => (await show()).ima?.entries === first && using([agent], 'telemetry', 1))
    expect(questions()).toEqual([0, first, 0])
  })

  test('goes on after a restart of the server where it was', async () => {
    await policy({ ima: 'required' })
    await measuresFiles(first)
    await world.restart()
    tool()
    await until('it is connected', async () => (await show()).online)
    await attest()
    await measuresFiles(first + 1)
    expect(questions().at(-1)).toBe(first)
  })

  test('a list that is longer than what the quote covers: what it covers counts, the rest is asked for once', async () => {
    const later = imaEntry('/usr/bin/later', new Uint8Array(32))
    lie = (list) => [...list, later]
    await policy({ ima: 'required' })
    await until('both were asked', () => questions().length === 2)
    await until('its rest is pending', async () => (await show()).ima?.pending === 1)
    expect(questions()).toEqual([0, first])
    await until('both were answered', async () => (await answered()).length === 2)
    expect(await show()).toMatchObject({ state: 'enrolled', ima: { entries: first, pending: 1 } })
    expect(questions().length).toBe(2)
  })

  test('a board that measures another file whenever its list was read', async () => {
    lie = (list) => {
      tool()
      return list
    }
    await policy({ ima: 'required' })
    await until('some of it is proven', async () => ((await show()).ima?.entries ?? 0) > first)
    lie = (list) => list
    await until('it holds still', async () => (await show()).state === 'enrolled' && using([agent], 'telemetry', 1))
    expect((await answered()).every((detail) => detail.startsWith('affirming'))).toBe(true)
  })

  test('a list of several messages is fetched to its end before anything is decided', { timeout: 240_000 }, async () => {
    const content = file()
    for (let at = 0; at < 20_000; at++) board.board.measureFile(`/usr/lib/some/where/${'x'.repeat(40)}/${at}`, content)
    expect(board.board.imaList().length).toBeGreaterThan(imaLimits.wire.maxBytes)
    await policy({ ima: 'required' })
    await until('all of it is proven', async () => (await show()).ima !== null, 120_000)
    expect(await show()).toMatchObject({ state: 'enrolled', ima: { entries: first + 20_000, pending: 0 } })
    expect(questions().length).toBe(2)
    tool()
    await attest()
    await measuresFiles(first + 20_001)
    expect(questions().at(-1)).toBe(first + 20_000)
  })

  test('a joiner is judged by the list before it gets a key of the group', async () => {
    const other = `vault-${number}`
    await world.client.call('group.create', { body: { id: other } })
    await world.client.call('group.policy.set', { params: { id: other }, body: { ima: 'required' } })
    await world.client.call('key.create', { body: { id: other, protection: 'sealed' } })
    await world.client.call('key.grant', { params: { id: other }, body: { group: other } })
    missing = true
    await world.client.call('group.add', { params: { id: other }, body: { devices: [id] } })
    await isQuarantined('ima.missing')
    expect(agent.status().current).not.toHaveProperty(other)
    missing = false
    await attest()
    await until('it has the key', () => using([agent], other, 1))
  })
})

describe('quarantined, and back with an honest list', { timeout: 60_000 }, () => {
  const lies: readonly [string, string, (list: readonly ImaEntry[]) => readonly ImaEntry[]][] = [
    ['an entry that was exchanged', 'ima.no-prefix', (list) => list.map((entry, at) => (at === 1 ? imaEntry('/init', new Uint8Array(32)) : entry))],
    ['an entry that was removed', 'ima.no-prefix', (list) => list.toSpliced(1, 1)],
    ['a last entry that was kept back', 'ima.no-prefix', (list) => list.slice(0, -1)],
    ['no entries', 'ima.no-prefix', () => []],
    [
      'another file under the measurement',
      'ima.template-hash',
      (list) => list.map((entry, at) => (at === 2 ? { ...entry, templateData: list[1]?.templateData ?? entry.templateData } : entry)),
    ],
    ['the list of another boot', 'ima.boot-aggregate', (list) => [imaEntry('boot_aggregate', new Uint8Array(32)), ...list.slice(1)]],
  ]
  test.each(lies)('%s: %s', async (_name, reason, change) => {
    lie = change
    await policy({ ima: 'required' })
    await isQuarantined(reason)
    lie = (list) => list
    await attest()
    await isBack()
    expect(await show()).toMatchObject({ verdict: 'affirming', ima: { entries: first } })
  })

  test('a list that is required and cannot be read', async () => {
    missing = true
    await policy({ ima: 'required' })
    await isQuarantined('ima.missing')
    expect(world.lines.some((line) => line.includes('list of measured files: EACCES'))).toBe(true)
    missing = false
    await attest()
    await isBack()
  })
})

describe('files that its release lists', { timeout: 60_000 }, () => {
  test('all of them: affirming', async () => {
    await policy({ ima: 'listed' })
    await measuresFiles(first)
    expect(await show()).toMatchObject({ state: 'enrolled', verdict: 'affirming', ima: { unlisted: 0 } })
  })

  test('one more: quarantined until a reboot without it; what it is called does not matter', async () => {
    await policy({ ima: 'listed' })
    await measuresFiles(first)
    board.board.measureFile('/usr/bin/fleetkey-agent', file())
    await attest()
    await isQuarantined('ima.file')
    expect(await show()).toMatchObject({
      verdictDetail: expect.stringContaining('called "/usr/bin/fleetkey-agent"') as string,
      ima: { entries: first + 1, unlisted: 1 },
    })
    // What ran has run: the same boot stays out.
    await attest()
    await until('asked again', () => questions().at(-1) === first + 1)
    await isQuarantined('ima.file')
    agent.kill()
    board.board.boot()
    agent = world.agent(machine)
    await isBack()
    await until('it uses its key', () => using([agent], 'telemetry', 1))
  })

  test('a warning where policy says so, and the preview says whom a stricter one would quarantine', async () => {
    await policy({ ima: 'listed', onUnlisted: 'warn' })
    tool()
    await attest()
    await measuresFiles(first + 1)
    expect(await show()).toMatchObject({ state: 'enrolled', verdict: 'warning', verdictReason: 'ima.file' })
    const impact = await world.client.call('group.policy.preview', { params: { id: group }, body: { onUnlisted: 'quarantine' } })
    expect(impact).toEqual({ judged: 1, quarantines: 1, first: [{ device: id, reason: 'ima.file' }] })
    await policy({ onUnlisted: 'quarantine' })
    await isQuarantined('ima.file')
  })

  test('the release list says how many', async () => {
    const { items } = await world.client.call('release.list')
    expect(items.map(({ id: release, files }) => [release, files])).toEqual([['gateway/1.0.0', 2]])
  })
})
