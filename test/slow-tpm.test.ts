import { spawn, type ChildProcess } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { examine } from '@fleetkey/device-agent/doctor/examine.ts'
import { inPlainWords } from '@fleetkey/device-agent/tpm-trouble.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { TpmFormatError } from '@fleetkey/tpm2/bytes.ts'
import { command } from '@fleetkey/tpm2/constants.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { TpmError, TpmTransportError } from '@fleetkey/tpm2/errors.ts'
import { reopening } from '@fleetkey/tpm2/reopening.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport } from '@fleetkey/tpm2/transport.ts'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { hasProgram } from './programs.ts'
import { startPeer, type Behaviour, type TpmPeer } from './tpm-peer.ts'
import { openWorld, random, until, using } from './world.ts'

const now = (): number => Date.now()
const long = process.env['FLEETKEY_LONG'] === '1'
/** Milliseconds of a slow chip: for a primary key, for everything else. */
const chip = long ? { primary: 3_000, other: 100 } : { primary: 1_500, other: 30 }
const slow: Behaviour = { delay: (code) => (code === command.createPrimary ? chip.primary : chip.other) }
/** Milliseconds: below the slowest command, so that whoever waits for one on the event loop is seen; above what a busy machine does to an event loop. */
const bearable = 1_000

let folder: string
let peer: TpmPeer
let board: ReturnType<typeof createSoftwareTpm>
const children: ChildProcess[] = []

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'fk-slow-'))
  board = createSoftwareTpm({ random, now })
  peer = await startPeer(join(folder, 'tpm'), (bytes) => board.execute(bytes))
})
afterEach(async () => {
  for (const child of children.splice(0)) child.kill()
  await peer.stop()
  rmSync(folder, { recursive: true, force: true })
})

/** The peer as a character device: a terminal without any editing, which socat relays. */
const asDevice = async (): Promise<string> => {
  const path = join(folder, 'tty')
  children.push(spawn('socat', [`PTY,link=${path},raw,echo=0`, `UNIX-CONNECT:${join(folder, 'tpm')}`], { stdio: 'ignore' }))
  await until('socat made its terminal', () => existsSync(path))
  return `device:${path}`
}

/** Longest time in which the event loop did nothing else, in milliseconds, while `work` ran. */
const stall = async (work: () => Promise<unknown>): Promise<number> => {
  const delay = monitorEventLoopDelay({ resolution: 10 })
  delay.enable()
  await work()
  delay.disable()
  return delay.max / 1e6
}

const useKeys = async (spec: string): Promise<void> => {
  const transport = await openTransport(spec)
  const tpm = new Tpm(transport, { random })
  const keys = await openDeviceKeys(tpm, await provision(tpm))
  expect(await keys.sign(random(10))).toHaveLength(64)
  await keys.close()
  await transport.close()
}

describe('a slow TPM does not hold up the event loop', () => {
  test('over a socket', async () => {
    peer.behave(slow)
    expect(await stall(async () => await useKeys(peer.spec))).toBeLessThan(bearable)
  })

  test.skipIf(!hasProgram('socat'))('as a character device', async () => {
    peer.behave(slow)
    const device = await asDevice()
    expect(await stall(async () => await useKeys(device))).toBeLessThan(bearable)
    expect(peer.codes.filter((code) => code === command.createPrimary).length).toBeGreaterThan(2)
  })

  test('a board enrols and gets its keys all the same', async () => {
    const world = await openWorld()
    try {
      const machine = await world.simulated('SLOW-1')
      await world.enlist([machine], 'plant')
      const inner = await machine.openTpm()
      const module = await startPeer(join(folder, 'chip'), async (bytes) => await inner.send(bytes))
      module.behave(slow)
      await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
      await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
      const agent = world.agent({ ...machine, openTpm: async () => await openTransport(module.spec) })
      const worst = await stall(async () => await until('the key is in use', () => using([agent], 'telemetry', 1), 90_000))
      expect(worst).toBeLessThan(bearable)
      expect(module.codes.length).toBeGreaterThan(30)
      await agent.stop()
      await module.stop()
    } finally {
      await world.stop()
    }
  }, 120_000)
})

describe('a TPM that hangs', () => {
  test('over a socket: a plain error after the time that a command may take', async () => {
    peer.behave({ answer: () => null })
    const transport = await openTransport(peer.spec, { patience: 200 })
    await expect(new Tpm(transport, { random }).startup()).rejects.toThrow(/^TPM unix:\S+: no response within 0\.2 s$/)
    await expect(new Tpm(transport, { random }).startup()).rejects.toThrow(TpmTransportError)
    await transport.close()
  })

  test.skipIf(!hasProgram('socat'))(
    'as a device: it holds one thread of the pool, is not opened again before it has let go, and works afterwards',
    async () => {
      const device = await asDevice()
      let release: (value: Uint8Array) => void = () => undefined
      const held = new Promise<Uint8Array>((resolve) => {
        release = resolve
      })
      const stuck = await startPeer(join(folder, 'stuck'), async () => await held)
      const path = join(folder, 'tty2')
      children.push(spawn('socat', [`PTY,link=${path},raw,echo=0`, `UNIX-CONNECT:${join(folder, 'stuck')}`], { stdio: 'ignore' }))
      await until('socat made its terminal', () => existsSync(path))
      const transport = await openTransport(`device:${path}`, { patience: 300 })
      await expect(new Tpm(transport, { random }).startup()).rejects.toThrow(/^TPM device \S+: no response within 0\.3 s$/)
      await transport.close()
      // As often as an agent would try in a quarter of an hour: none of them takes a thread.
      for (let attempt = 0; attempt < 50; attempt++)
        await expect(openTransport(`device:${path}`)).rejects.toThrow(/it hangs: the kernel still waits for a command/)
      const files = await Promise.all(Array.from({ length: 16 }, async () => await readFile(new URL(import.meta.url))))
      expect(new Set(files.map((content) => content.length))).toEqual(new Set([readFileSync(new URL(import.meta.url)).length]))
      // Another device is not concerned.
      await useKeys(device)
      release(Uint8Array.of(0x80, 0x01, 0, 0, 0, 10, 0, 0, 0, 0))
      await until('the device can be opened again', async () => {
        const again = await openTransport(`device:${path}`).catch(() => undefined)
        await again?.close()
        return again !== undefined
      })
      await stuck.stop()
    },
  )
})

const header = (tag: number, size: number, code: number): Uint8Array => {
  const bytes = Buffer.alloc(10)
  bytes.writeUInt16BE(tag, 0)
  bytes.writeUInt32BE(size, 2)
  bytes.writeUInt32BE(code, 6)
  return new Uint8Array(bytes)
}

describe('a TPM that talks nonsense', () => {
  const cases: readonly (readonly [string, Behaviour])[] = [
    ['random bytes', { answer: () => random(40) }],
    ['nothing but a header that says success', { answer: () => header(0x8002, 10, 0) }],
    ['a size below the header', { answer: () => header(0x8001, 9, 0) }],
    ['a size without end', { answer: () => header(0x8001, 0xffff_ffff, 0) }],
    ['less than the size says, then the end', { answer: (response) => response.subarray(0, response.length - 1), close: true }],
    ['more than the size says', { answer: (response) => Uint8Array.from([...response, 0]) }],
    ['two answers', { answer: (response) => Uint8Array.from([...response, ...response]) }],
    ['the end before the answer', { answer: () => new Uint8Array(0), close: true }],
    ['the end in the middle', { answer: (response) => response.subarray(0, 7), close: true }],
    ['an unknown tag', { answer: (response) => Uint8Array.from([0x12, 0x34, ...response.subarray(2)]) }],
    ['a changed last byte', { answer: (response) => Uint8Array.from([...response.subarray(0, -1), (response.at(-1) ?? 0) ^ 1]) }],
    ['failure mode', { answer: () => header(0x8001, 10, 0x101) }],
    ['an unknown code', { answer: () => header(0x8001, 10, 0xdead_beef) }],
    ['a TPM 1.2', { answer: () => header(0x00c4, 10, 0x1e) }],
  ]

  test.each(cases)('%s: a typed error, and it works again afterwards', async (_name, manners) => {
    const open = async () => await openTransport(peer.spec, { patience: 300 })
    const transport = reopening(open, await open())
    const tpm = new Tpm(transport, { random })
    const keys = await openDeviceKeys(tpm, await provision(tpm))
    peer.behave(manners)
    for (let attempt = 0; attempt < 3; attempt++) {
      const error = await keys.sign(random(10)).then(
        () => undefined,
        (thrown: unknown) => thrown,
      )
      expect(
        [TpmError, TpmTransportError, TpmFormatError].some((kind) => error instanceof kind),
        String(error),
      ).toBe(true)
    }
    peer.behave({})
    expect(await keys.sign(random(10))).toHaveLength(64)
    await keys.close()
    await transport.close()
  })

  test('it asks for patience without end: an error after a bounded time', async () => {
    for (const code of [0x922, 0x908, 0x90a, 0x920]) {
      peer.behave({ answer: () => header(0x8001, 10, code) })
      const transport = await openTransport(peer.spec)
      await expect(new Tpm(transport, { random, retryFor: 100 }).startup()).rejects.toMatchObject({ code })
      await transport.close()
    }
    expect(peer.codes.length).toBeLessThan(40)
  })

  test('it asks for patience twice: done', async () => {
    let times = 0
    peer.behave({ answer: (response) => (times++ < 2 ? header(0x8001, 10, 0x922) : response) })
    const transport = await openTransport(peer.spec)
    expect(await new Tpm(transport, { random }).getRandom(16)).toHaveLength(16)
    expect(times).toBe(3)
    await transport.close()
  })
})

test('an agent whose TPM goes away under it says so, and goes on when it is back', async () => {
  const world = await openWorld()
  try {
    const machine = await world.simulated('AWAY-1')
    await world.enlist([machine], 'plant')
    const inner = await machine.openTpm()
    const module = await startPeer(join(folder, 'chip'), async (bytes) => await inner.send(bytes))
    await world.client.call('key.create', { body: { id: 'valve', protection: 'tpm' } })
    await world.client.call('key.grant', { params: { id: 'valve' }, body: { group: 'plant' } })
    const agent = world.agent({ ...machine, openTpm: async () => await openTransport(module.spec, { patience: 300 }) })
    await until('the key is in use', () => using([agent], 'valve', 1))
    const data = new TextEncoder().encode('close')
    const { mac } = await agent.mac('valve', data)
    module.behave({ answer: () => null })
    await expect(agent.mac('valve', data)).rejects.toThrow(/no response within 0\.3 s/)
    module.behave({ close: true, answer: () => random(12) })
    await expect(agent.mac('valve', data)).rejects.toThrow(/TPM/)
    await world.client.call('key.rotate', { params: { id: 'valve' }, body: {} })
    await until('it says what is wrong', () => agent.status().problem !== null)
    expect(agent.status()).toMatchObject({ connected: true, problem: expect.stringMatching(/^TPM: /), current: { valve: 1 } })
    // The board starts anew meanwhile: everything that was loaded is gone, and the server wants new evidence.
    machine.board.boot()
    module.behave({})
    const answered = await agent.mac('valve', data)
    if (answered.epoch === 1) expect(answered.mac).toEqual(mac)
    // The agent would report again by itself within a minute; a new connection makes it do so now.
    await world.restart()
    await until('the next epoch is in use', () => using([agent], 'valve', 2), 90_000)
    expect(agent.status().problem).toBeNull()
    await agent.stop()
    await module.stop()
  } finally {
    await world.stop()
  }
}, 120_000)

describe('a TPM that lacks something', () => {
  /** Takes items out of the list of one capability, and refuses one command. */
  const without = async (of: { which: number; size: number; gone: (item: Buffer) => boolean; refuse?: readonly [number, number] }): Promise<TpmPeer> =>
    await startPeer(join(folder, 'less'), (bytes) => {
      const sent = Buffer.from(bytes)
      const response = Buffer.from(board.execute(bytes))
      if (of.refuse !== undefined && sent.readUInt32BE(6) === of.refuse[0]) return header(0x8001, 10, of.refuse[1])
      if (sent.readUInt32BE(6) !== command.getCapability || sent.readUInt32BE(10) !== of.which) return response
      const items = Array.from({ length: response.readUInt32BE(15) }, (_, at) => response.subarray(19 + at * of.size, 19 + (at + 1) * of.size))
      const left = items.filter((item) => !of.gone(item))
      const list = Buffer.concat([response.subarray(0, 19), ...left])
      list.writeUInt32BE(list.length, 2)
      list.writeUInt32BE(left.length, 15)
      return new Uint8Array(list)
    })

  test('P-256: the agent cannot start, and says so by name', async () => {
    const less = await without({ which: 8, size: 2, gone: (item) => item.readUInt16BE(0) === 3, refuse: [command.createPrimary, 0x2e6] })
    const transport = await openTransport(less.spec)
    const tpm = new Tpm(transport, { random })
    await expect(inPlainWords(tpm, {}, async () => await provision(tpm))).rejects.toThrow(/^this TPM does not have curve P-256 \(for every key\)$/)
    await transport.close()
    await less.stop()
  })

  test('TPM2_Import: the agent runs, and doctor says what it cannot do', async () => {
    const less = await without({ which: 2, size: 4, gone: (item) => (item.readUInt32BE(0) & 0xffff) === command.import })
    await useKeys(less.spec)
    const found = await examine({
      tpm: less.spec,
      tpmAuth: {},
      data: null,
      eventLog: null,
      imaList: null,
      root: folder,
      open: async () => await openTransport(less.spec),
      random,
      now: now(),
    })
    expect(found.ready).toBe(true)
    expect(found.findings).toContainEqual(
      expect.objectContaining({ check: 'missing', grade: 'warn', found: 'TPM2_Import, needed for keys with protection "tpm"' }),
    )
    await less.stop()
  })
})
