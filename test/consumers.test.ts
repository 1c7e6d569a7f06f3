import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { connectAsync } from 'mqtt'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { startPlant, type Plant } from '@fleetkey/demo/plant.ts'
import { connectAgent, replayGuard, type AgentClient } from '@fleetkey/device-agent/client'
import { serveSoftwareTpm } from '@fleetkey/firmware-sim/tpm/serve.ts'
import { openWorld, until, type World } from './world.ts'

/** Two devices as they are installed, agent processes with their sockets, and the applications beside them. */
const program = fileURLToPath(new URL('../device-agent/main.ts', import.meta.url))
const telemetry = fileURLToPath(new URL('../demo/telemetry.ts', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'fk-consumers-'))
const devices = ['gw-1', 'gw-2'] as const
type Device = (typeof devices)[number]
const at = (device: Device, name: string): string => join(folder, device, name)
const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

let world: World
let plant: Plant
const agents = new Map<Device, ChildProcess>()
const stops: (() => Promise<void>)[] = []
const said = new Map<Device, string>()

const start = (device: Device): void => {
  const agent = spawn(process.execPath, [program, 'run', '--config', at(device, 'agent.json')], { stdio: ['ignore', 'ignore', 'pipe'] })
  agent.stderr.on('data', (chunk: Buffer) => said.set(device, (said.get(device) ?? '') + chunk.toString()))
  agents.set(device, agent)
}
const kill = async (device: Device): Promise<void> => {
  const agent = agents.get(device)
  if (agent === undefined) return
  const gone = once(agent, 'exit')
  agent.kill('SIGKILL')
  await gone
}
const run = async (args: readonly string[], input: Uint8Array = new Uint8Array(0)): Promise<{ code: number | null; out: Buffer; words: string }> => {
  const child = spawn(process.execPath, args, { stdio: ['pipe', 'pipe', 'pipe'] })
  const out: Buffer[] = []
  let words = ''
  child.stdout.on('data', (chunk: Buffer) => out.push(chunk))
  child.stderr.on('data', (chunk: Buffer) => (words += chunk.toString()))
  child.stdin.on('error', () => undefined)
  child.stdin.end(input)
  const [code] = (await once(child, 'close')) as [number | null]
  return { code, out: Buffer.concat(out), words }
}
const stage = async (device: Device, epoch: number): Promise<string | undefined> =>
  (await world.client.call('device.show', { params: { id: device } })).holdings.find((one) => one.key === 'telemetry' && one.epoch === epoch)?.stage
const rotate = async (): Promise<{ campaign: string; epoch: number }> =>
  await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: { deadline: 60_000, errorThreshold: 1 } })

beforeAll(async () => {
  ;[world, plant] = await Promise.all([openWorld(), startPlant()])
  const machines = await Promise.all(devices.map(async (device) => await world.simulated(device.toUpperCase())))
  await world.enlist(machines, 'plant')
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await world.client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
  for (const key of ['telemetry', 'command-auth']) await world.client.call('key.grant', { params: { id: key }, body: { group: 'plant' } })
  for (const [index, device] of devices.entries()) {
    const machine = machines[index]
    if (machine === undefined) throw new Error('no machine')
    mkdirSync(join(folder, device))
    stops.push((await serveSoftwareTpm(machine.board.tpm, { path: at(device, 'tpm') })).stop)
    writeFileSync(at(device, 'event.log'), machine.eventLog())
    writeFileSync(at(device, 'bundle.json'), JSON.stringify({ ...world.bundle, server: `mqtts://127.0.0.1:${world.server.mqttPort}` }))
    const consumers = device === 'gw-1' ? { readyWithin: 0.5 } : {}
    const config = {
      bundle: 'bundle.json',
      data: 'data',
      tpm: `unix:${at(device, 'tpm')}`,
      serial: device.toUpperCase(),
      eventLog: 'event.log',
      imaList: null,
      socket: 's',
      ...consumers,
    }
    writeFileSync(at(device, 'agent.json'), JSON.stringify(config))
    start(device)
  }
  await until('both use it', async () => (await stage('gw-1', 1)) === 'active' && (await stage('gw-2', 1)) === 'active', 90_000)
}, 120_000)
afterAll(async () => {
  for (const device of devices) await kill(device)
  for (const stop of stops) await stop()
  await plant.stop()
  await world.stop()
  rmSync(folder, { recursive: true, force: true })
}, 60_000)

test('telemetry from one device to the other: the broker between them sees ciphertext, a replay and a change are refused', { timeout: 120_000 }, async () => {
  const args = (device: Device) => ['--socket', at(device, 's'), '--key', 'telemetry', '--broker', `mqtt://127.0.0.1:${plant.port}`, '--topic', 'plant/line-1']
  const receiver = spawn(process.execPath, [telemetry, 'receive', ...args('gw-2')], { stdio: ['ignore', 'pipe', 'inherit'] })
  let heard = ''
  receiver.stdout.on('data', (chunk: Buffer) => (heard += chunk.toString()))
  const lines = (): unknown[] =>
    heard
      .split('\n')
      .filter((line) => line !== '')
      .map((line) => JSON.parse(line) as unknown)
  try {
    await until('it listens', () => heard.includes('listening'), 30_000)
    const sent = await run([telemetry, 'send', ...args('gw-1')], bytes('pressure 4.2 bar\npressure 4.3 bar\n'))
    expect(sent.code, sent.words).toBe(0)
    await until('both readings are there', () => lines().length === 3)
    expect(lines().slice(1)).toEqual([
      { epoch: 1, text: 'pressure 4.2 bar' },
      { epoch: 1, text: 'pressure 4.3 bar' },
    ])
    const [first = Buffer.alloc(0)] = plant.seen
    expect(plant.seen).toHaveLength(2)
    expect(Buffer.concat([...plant.seen]).toString('latin1')).not.toMatch(/pressure|4\.[23] bar/)
    // The broker is hostile now.
    const client = await connectAsync(`mqtt://127.0.0.1:${plant.port}`)
    await client.publishAsync('plant/line-1', first, { qos: 1 })
    await client.publishAsync('plant/line-1', Buffer.from(first.map((byte, index) => (index === first.length - 1 ? byte ^ 1 : byte))), { qos: 1 })
    await client.endAsync()
    await until('both are refused', () => lines().length === 5)
    expect(lines().slice(3)).toEqual([{ refused: 'this message was opened before' }, { refused: 'the ciphertext does not authenticate' }])
  } finally {
    receiver.kill('SIGKILL')
  }
})

test(
  'an epoch is proven only when its consumer is ready; one that never is, is named to the server; older epochs stay readable',
  { timeout: 120_000 },
  async () => {
    const agent: AgentClient = connectAgent(at('gw-1', 's'))
    try {
      const before = await agent.encrypt('telemetry', bytes('before'))
      const asked: number[] = []
      let ready = false
      await agent.consume('telemetry', 'collector', async (epoch) => {
        asked.push(epoch)
        if (!ready && epoch > 1) await new Promise(() => undefined)
      })
      expect(asked).toEqual([1])
      const { campaign, epoch } = await rotate()
      await until('it is asked', () => asked.includes(epoch), 30_000)
      const target = async () => (await world.client.call('campaign.targets', { params: { id: campaign } })).items.find(({ device }) => device === 'gw-1')
      await until('the server hears why', async () => (await target())?.reason === 'consumer.not-ready: collector', 60_000)
      expect(await stage('gw-1', epoch)).toBe('installed')
      const { items } = await world.client.call('key.unproven', { params: { id: 'telemetry' } })
      expect(items.find(({ device }) => device === 'gw-1')).toMatchObject({ stage: 'installed', reason: 'consumer.not-ready: collector', online: true })
      ready = true
      await until('it is proven', async () => (await stage('gw-1', epoch)) === 'active', 60_000)
      // Both epochs are readable, the newer one is written with.
      expect(new TextDecoder().decode((await agent.decrypt('telemetry', before)).plaintext)).toBe('before')
      const after = await agent.encrypt('telemetry', bytes('after'))
      expect(await agent.decrypt('telemetry', after, { once: true })).toMatchObject({ epoch })
      await expect(agent.decrypt('telemetry', after, { once: true })).rejects.toMatchObject({ code: 'conflict', reason: 'ciphertext.replayed' })
      const { items: none } = await world.client.call('key.unproven', { params: { id: 'telemetry' } })
      expect(none.filter(({ device }) => device === 'gw-1')).toEqual([])
    } finally {
      agent.close()
    }
  },
)

test(
  'the agent is killed when its consumer has just said ready: after the restart the consumer is asked again, and the epoch is proven',
  { timeout: 120_000 },
  async () => {
    const agent: AgentClient = connectAgent(at('gw-1', 's'))
    try {
      const asked: number[] = []
      let killed = false
      const { current } = (await agent.list()).find(({ key }) => key === 'telemetry') ?? { current: 0 }
      await agent.consume('telemetry', 'collector', (epoch) => {
        asked.push(epoch)
        if (epoch === current || killed) return
        killed = true
        agents.get('gw-1')?.kill('SIGKILL')
      })
      const { epoch } = await rotate()
      await until('it is killed', () => killed, 30_000)
      start('gw-1')
      await until('it is proven', async () => (await stage('gw-1', epoch)) === 'active', 60_000)
      expect(asked.filter((one) => one === epoch).length).toBeGreaterThanOrEqual(2)
      expect((await agent.get('telemetry')).epoch).toBe(epoch)
    } finally {
      agent.close()
    }
  },
)

test('crypt: files of any length, whole or refused; a key in the TPM encrypts nothing', { timeout: 120_000 }, async () => {
  const crypt = async (what: 'encrypt' | 'decrypt', more: readonly string[], input?: Uint8Array) =>
    await run([program, 'crypt', what, '--config', at('gw-2', 'agent.json'), ...more], input)
  const plain = Buffer.from(Array.from({ length: 150_000 }, (_, index) => index % 251))
  for (const text of [Buffer.from('4.2 bar'), plain]) {
    const sealed = await crypt('encrypt', ['--key', 'telemetry', '--aad', 'backup'], text)
    expect(sealed.code, sealed.words).toBe(0)
    const opened = await crypt('decrypt', ['--key', 'telemetry', '--aad', 'backup'], sealed.out)
    expect([opened.code, opened.out.equals(text)]).toEqual([0, true])
  }
  const [file, sealed, opened] = ['plain', 'sealed', 'opened'].map((name) => at('gw-2', name)) as [string, string, string]
  writeFileSync(file, plain)
  expect((await crypt('encrypt', ['--key', 'telemetry', '--in', file, '--out', sealed])).code).toBe(0)
  const whole = readFileSync(sealed)
  const pieces: Buffer[] = []
  for (let from = 20; from < whole.length;) {
    const end = from + 4 + whole.readUInt32BE(from)
    pieces.push(whole.subarray(from, end))
    from = end
  }
  expect(pieces).toHaveLength(4)
  const [one, two, three, four] = pieces as [Buffer, Buffer, Buffer, Buffer]
  const head = whole.subarray(0, 20)
  const wrong: readonly (readonly [string, readonly Buffer[]])[] = [
    ['the last piece missing', [head, one, two, three]],
    ['cut within a piece', [whole.subarray(0, -1)]],
    ['two pieces swapped', [head, one, three, two, four]],
    ['other data', [Buffer.from('FKC1'), Buffer.alloc(16), one, two, three, four]],
  ]
  for (const [what, parts] of wrong) {
    writeFileSync(sealed, Buffer.concat([...parts]))
    expect((await crypt('decrypt', ['--key', 'telemetry', '--in', sealed, '--out', opened])).code, what).toBe(3)
    expect([existsSync(opened), existsSync(`${opened}.part`)], what).toEqual([false, false])
  }
  writeFileSync(sealed, whole)
  expect((await crypt('decrypt', ['--key', 'telemetry', '--in', sealed, '--out', opened])).code).toBe(0)
  expect(readFileSync(opened).equals(plain)).toBe(true)
  expect(await crypt('encrypt', ['--key', 'command-auth'], bytes('x'))).toMatchObject({
    code: 3,
    words: expect.stringContaining('HMAC-SHA256 with it and nothing else'),
  })
  expect((await crypt('encrypt', ['--key', 'none'], bytes('x'))).code).toBe(3)
  expect((await run([program, 'crypt', 'encrypt', '--key', 'telemetry', '--socket', at('gw-2', 'nobody')], bytes('x'))).code).toBe(5)
  expect((await run([program, 'crypt', 'encrypt', '--socket', at('gw-2', 's')])).code).toBe(1)
})

test('a window of replays per writer: in any order once, never twice, and never what is too old to be known', () => {
  const guard = replayGuard()
  for (const counter of [0, 5, 3, 2_000, 1_999]) expect(guard.accept('run', counter)).toBe(true)
  for (const counter of [0, 5, 3, 4, 976, 2_000, 1_999]) expect(guard.accept('run', counter)).toBe(false)
  expect([guard.accept('run', 977), guard.accept('other', 0)]).toEqual([true, true])
})
