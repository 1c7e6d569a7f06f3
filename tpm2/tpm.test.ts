import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createServer, type AddressInfo, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, describe, expect, test, vi } from 'vitest'
import { concat, TpmFormatError, u16, u32 } from './bytes.ts'
import { alg } from './constants.ts'
import { rc, TpmError, TpmTransportError } from './errors.ts'
import { Ledger } from './ledger.ts'
import { Tpm, type LoadedKey } from './tpm.ts'
import { openTransport, type Transport } from './transport.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const response = (code: number, body: Uint8Array = new Uint8Array()): Uint8Array => concat(u16(0x8001), u32(10 + body.length), u32(code), body)
const randomResponse = response(0, concat(u16(4), Uint8Array.of(1, 2, 3, 4)))

/** A TPM that says what it is told to, one answer after the other; the last one for ever. */
const scripted = (...answers: readonly Uint8Array[]): Transport & { readonly commands: Uint8Array[] } => {
  const commands: Uint8Array[] = []
  return {
    commands,
    async send(command) {
      commands.push(command)
      return answers[Math.min(commands.length, answers.length) - 1] ?? new Uint8Array()
    },
    close: async () => undefined,
  }
}

test('no PCRs at all: no values, and no command', async () => {
  const transport = scripted()
  expect(await new Tpm(transport, { random }).pcrRead(alg.sha256, [])).toEqual(new Map())
  expect(transport.commands).toHaveLength(0)
})

describe('a TPM that asks for patience', () => {
  test.each([
    ['RETRY', rc.retry],
    ['YIELDED', rc.yielded],
    ['TESTING', rc.testing],
  ])('%s: the same command again', async (_, code) => {
    const transport = scripted(response(code), response(code), randomResponse)
    expect(await new Tpm(transport, { random }).getRandom(4)).toEqual(Uint8Array.of(1, 2, 3, 4))
    expect(transport.commands).toHaveLength(3)
    expect(transport.commands[2]).toEqual(transport.commands[0])
  })

  test('for ever: an error with its name, after half a minute', async () => {
    vi.useFakeTimers()
    try {
      const transport = scripted(response(rc.retry))
      const asked = new Tpm(transport, { random }).getRandom(4).catch((error: unknown) => error)
      await vi.advanceTimersByTimeAsync(60_000)
      expect(await asked).toMatchObject({ name: 'TpmError', message: expect.stringMatching(/getRandom: RETRY \(0x922\)/) })
      expect(transport.commands.length).toBeGreaterThan(10)
    } finally {
      vi.useRealTimers()
    }
  })

  test('any other refusal is not repeated', async () => {
    const transport = scripted(response(0x100))
    await expect(new Tpm(transport, { random }).getRandom(4)).rejects.toThrow(TpmError)
    expect(transport.commands).toHaveLength(1)
  })
})

describe('a response that is none', () => {
  test.each([
    ['empty', new Uint8Array()],
    ['cut off in its header', randomResponse.subarray(0, 7)],
    ['cut off in its body', randomResponse.subarray(0, -1)],
    ['with bytes after it', concat(randomResponse, Uint8Array.of(0))],
    ['that says another length', concat(u16(0x8001), u32(99), u32(0), u16(0))],
    ['with a count longer than itself', response(0, concat(u16(500), Uint8Array.of(1)))],
  ])('%s', async (_, bytes) => await expect(new Tpm(scripted(bytes), { random }).getRandom(4)).rejects.toThrow(TpmFormatError))

  test('whatever comes: a typed error or a result', async () => {
    for (let round = 0; round < 500; round++) {
      const bytes =
        round % 2 === 0 ? random(round % 64) : randomResponse.map((byte, at) => (at === round % randomResponse.length ? byte ^ (1 << (round % 8)) : byte))
      const got: unknown = await new Tpm(scripted(bytes, response(0x100)), { random }).getRandom(4).catch((error: unknown) => error)
      expect(got instanceof Uint8Array || got instanceof TpmFormatError || got instanceof TpmError || got instanceof TpmTransportError, String(got)).toBe(true)
    }
  })
})

test('commands of two callers never mix, and one that fails holds up nobody', async () => {
  const tpm = new Tpm(scripted(randomResponse), { random })
  const order: string[] = []
  const work = (name: string) => async (): Promise<void> => {
    order.push(`${name} begins`)
    await tpm.getRandom(4)
    if (name === 'b') throw new Error('b fails')
    order.push(`${name} ends`)
  }
  const all = await Promise.allSettled(['a', 'b', 'c'].map(async (name) => await tpm.exclusive(work(name))))
  expect(all.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled'])
  expect(order).toEqual(['a begins', 'a ends', 'b begins', 'c begins', 'c ends'])
})

describe('the ledger of handles', () => {
  const openLedger = (full = 0) => {
    const flushed: number[] = []
    let last = 0x8000_0000
    let refusals = full
    const ledger = new Ledger({ flush: async (handle: number) => void flushed.push(handle) } as unknown as Tpm)
    const load = async (): Promise<LoadedKey> => {
      if (refusals-- > 0) throw new TpmError(rc.objectMemory, 'Load')
      return { handle: last++ } as LoadedKey
    }
    return { ledger, load, flushed }
  }

  test('three at a time; what was used longest ago goes; what is there is not loaded twice', async () => {
    const { ledger, load, flushed } = openLedger()
    for (const name of ['a', 'b', 'c', 'a', 'd', 'a']) await ledger.use(name, load)
    expect(flushed).toEqual([0x8000_0001])
    await ledger.clear()
    expect(flushed.toSorted((a, b) => a - b)).toEqual([0x8000_0000, 0x8000_0001, 0x8000_0002, 0x8000_0003])
  })

  test('a TPM with fewer slots: flushed until it fits, else its refusal', async () => {
    const { ledger, load, flushed } = openLedger()
    await ledger.use('a', load)
    const tight = async (): Promise<LoadedKey> => {
      if (flushed.length === 0) throw new TpmError(rc.objectMemory, 'Load')
      return await load()
    }
    expect((await ledger.use('b', tight)).handle).toBe(0x8000_0001)
    await expect(openLedger(9).ledger.use('a', openLedger(9).load)).rejects.toThrow(/OBJECT_MEMORY/)
  })

  test('another refusal evicts nothing', async () => {
    const { ledger, load, flushed } = openLedger()
    await ledger.use('a', load)
    await expect(ledger.use('b', async () => await Promise.reject(new TpmError(0x100, 'Load')))).rejects.toThrow(TpmError)
    expect(flushed).toEqual([])
  })
})

describe('transports', () => {
  let server: Server | undefined
  const folder = mkdtempSync(join(tmpdir(), 'fk-transport-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  afterEach(async () => {
    await new Promise((resolve) => (server === undefined ? resolve(undefined) : server.close(resolve)))
    server = undefined
  })

  /** swtpm's raw protocol: a command in, what `answer` writes out. */
  const serve = async (where: 'unix' | 'tcp', answer: (socket: Socket, command: Buffer) => void): Promise<string> => {
    const listening = createServer((socket) => {
      socket.on('error', () => undefined)
      socket.on('data', (command: Buffer) => answer(socket, command))
    })
    server = listening
    const path = join(folder, `s-${randomBytes(4).toString('hex')}`)
    await new Promise<void>((resolve) => void (where === 'unix' ? listening.listen(path, resolve) : listening.listen(0, '127.0.0.1', resolve)))
    return where === 'unix' ? `unix:${path}` : `tcp:127.0.0.1:${(listening.address() as AddressInfo).port}`
  }

  test.each(['unix', 'tcp'] as const)('%s: one command, its whole response, however it is cut', async (where) => {
    const spec = await serve(where, (socket) => {
      socket.write(randomResponse.subarray(0, 5))
      setTimeout(() => socket.write(randomResponse.subarray(5)), 10)
    })
    const transport = await openTransport(spec)
    const tpm = new Tpm(transport, { random })
    expect(await tpm.getRandom(4)).toEqual(Uint8Array.of(1, 2, 3, 4))
    expect(await tpm.getRandom(4)).toEqual(Uint8Array.of(1, 2, 3, 4))
    await tpm.close()
    await expect(tpm.getRandom(4)).rejects.toThrow(TpmTransportError)
  })

  test.each<readonly [string, (socket: Socket) => void, RegExp]>([
    ['closes', (socket) => void socket.end(), /closed the connection/],
    ['says more than was asked', (socket) => void socket.write(concat(randomResponse, randomResponse)), /nobody asked for/],
    ['declares a gigabyte', (socket) => void socket.write(concat(u16(0x8001), u32(1 << 30), u32(0))), /a response of 1073741824 bytes/],
    ['declares less than a header', (socket) => void socket.write(concat(u16(0x8001), u32(3), u32(0))), /a response of 3 bytes/],
  ])('a TPM that %s', async (_, answer, want) => {
    const transport = await openTransport(await serve('unix', answer))
    await expect(transport.send(new Uint8Array(10))).rejects.toThrow(want)
    // It stays broken: nothing is sent into a stream that is out of step.
    await expect(transport.send(new Uint8Array(10))).rejects.toThrow(TpmTransportError)
    await transport.close()
  })

  test('two commands at a time are refused', async () => {
    const transport = await openTransport(await serve('unix', (socket) => void setTimeout(() => socket.write(randomResponse), 20)))
    const first = transport.send(new Uint8Array(10))
    await expect(transport.send(new Uint8Array(10))).rejects.toThrow(/two commands/)
    expect(await first).toEqual(randomResponse)
    await transport.close()
  })

  test('device: a write is a command, the next read its response', async () => {
    // A file stands for the device: what is read begins where the write has ended.
    const path = join(folder, 'tpmrm0')
    writeFileSync(path, concat(new Uint8Array(12), randomResponse))
    const transport = await openTransport(`device:${path}`)
    expect(await transport.send(new Uint8Array(12))).toEqual(randomResponse)
    await transport.close()
    await expect(transport.send(new Uint8Array(12))).rejects.toThrow(TpmTransportError)
  })

  test.each([
    ['device:/none', /TPM device \/none: ENOENT/],
    ['unix:/none', /TPM unix:\/none: .*ENOENT/],
    ['tcp:127.0.0.1:1', /ECONNREFUSED/],
    ['tcp:127.0.0.1', /expected device:PATH/],
    ['tcp:127.0.0.1:99999', /expected device:PATH/],
    ['unix:', /expected device:PATH/],
    ['/dev/tpm0', /expected device:PATH/],
    ['', /expected device:PATH/],
  ])('"%s" is a TpmTransportError', async (spec, want) => {
    const failed: unknown = await openTransport(spec).catch((error: unknown) => error)
    expect(failed).toBeInstanceOf(TpmTransportError)
    expect(String(failed)).toMatch(want)
  })
})
