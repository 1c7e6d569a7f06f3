import { createPrivateKey, createPublicKey, verify } from 'node:crypto'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { FrameReader, frame } from '@fleetkey/protocol/frames.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { open } from '@fleetkey/server/kms/cell.ts'
import { openMaster } from '@fleetkey/server/kms/master.ts'
import { startKms, type KmsOptions, type SupervisedKms } from '@fleetkey/server/kms/supervisor.ts'
import { supervise } from './faults/supervised.ts'
import { inMemory } from './memory.ts'
import { openWorld, until, using } from './world.ts'

const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text))
const sleep = async (milliseconds: number): Promise<void> => await new Promise((resolve) => void setTimeout(resolve, milliseconds))

describe('the KMS process', () => {
  let [place, runtime] = ['', '']
  let pids: number[] = []
  const lines: string[] = []
  let kms: SupervisedKms | undefined
  const start = async (more: Partial<KmsOptions> = {}): Promise<SupervisedKms> =>
    (kms = await startKms({ ...more, folder: join(place, 'kms'), log: (line) => void lines.push(line), started: (pid) => void pids.push(pid) }))
  const kill = (): void => void process.kill(pids.at(-1) ?? 0, 'SIGKILL')
  const socketPath = (): string => join(runtime, readdirSync(runtime)[0] ?? '', 'kms.sock')
  beforeEach(() => {
    place = mkdtempSync(join(tmpdir(), 'fk-kms-'))
    runtime = mkdtempSync(join(tmpdir(), 'fk-run-'))
    process.env['RUNTIME_DIRECTORY'] = runtime
    pids = []
  })
  afterEach(async () => {
    await kms?.close()
    delete process.env['RUNTIME_DIRECTORY']
    for (const folder of [place, runtime]) rmSync(folder, { recursive: true, force: true })
  })

  test('killed again and again while batches are under way: every caller gets all its signatures, and no use is lost', { timeout: 240_000 }, async () => {
    // On a busy machine a start takes longer than callers wait otherwise.
    const kms = await start({ patience: 60_000 })
    const { spki } = await kms.create('a', 'delivery-signing')
    const key = createPublicKey({ key: Buffer.from(spki ?? []), format: 'der', type: 'spki' })
    await kms.create('kek', 'kek')
    let over = false
    let [signed, wraps] = [0, 0]
    /** Answers that each caller has had. */
    const answers = [0, 0, 0]
    const answered = (caller: number): void => void (answers[caller] = (answers[caller] ?? 0) + 1)
    const sign = async (caller: number): Promise<void> => {
      for (let round = 0; !over; round++) {
        const batch = Array.from({ length: 50 }, (_, at) => bytes(`${caller} ${round} ${at}`))
        const signatures = await kms.sign(batch.map((data) => ({ key: 'a', purpose: 'delivery-signing' as const, data })))
        expect(signatures).toHaveLength(batch.length)
        for (const [at, data] of batch.entries()) expect(verify('sha256', data, key, signatures[at] ?? new Uint8Array())).toBe(true)
        signed += batch.length
        answered(caller)
      }
    }
    const wrap = async (caller: number): Promise<void> => {
      for (let round = 0; !over; round++) {
        const context = bytes(String(round))
        const [wrapped = new Uint8Array()] = await kms.wrap([{ key: 'kek', plaintext: new Secret(context), context }])
        const [opened] = await kms.unwrap([{ key: 'kek', wrapped, context }])
        expect(opened?.equals(new Secret(context))).toBe(true)
        wraps++
        answered(caller)
      }
    }
    /** A request that was under way at three deaths is refused as their cause, rightly: so each process answers everybody before it is killed, however slow its start. */
    const served = async (starts: number): Promise<void> => {
      await until('it runs', () => pids.length === starts && kms.health().open, 60_000)
      const before = [...answers]
      await until('everybody was answered', () => answers.every((count, caller) => count > (before[caller] ?? 0)), 60_000)
    }
    const killing = async (): Promise<void> => {
      try {
        for (const [at, pause] of [300, 900, 1500].entries()) {
          await served(at + 1)
          await sleep(pause)
          kill()
        }
        await served(4)
      } finally {
        over = true
      }
    }
    await Promise.all([sign(0), sign(1), wrap(2), killing()])
    expect(pids).toHaveLength(4)
    const uses = Object.fromEntries((await kms.list()).map((one) => [one.name, one.uses]))
    expect(uses['a']).toBeGreaterThanOrEqual(signed)
    expect(uses['kek']).toBeGreaterThanOrEqual(wraps)
    expect(lines.filter((line) => line.startsWith('ALARM'))).not.toEqual([])
  })

  test('keys made before a kill are there after it; without its key file it waits, sealed, until that is back', { timeout: 60_000 }, async () => {
    const kms = await start()
    const made = await kms.create('a', 'issuing-ca')
    kill()
    expect(await kms.describe('a')).toEqual(made)
    const path = join(place, 'kms', 'master.key')
    const right = readFileSync(path)
    rmSync(path)
    kill()
    await until('it is sealed', () => kms.health().sealed)
    await expect(kms.describe('a')).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.sealed' })
    expect(kms.health()).toMatchObject({ open: false })
    expect(lines.some((line) => line.includes('master.key is missing'))).toBe(true)
    writeFileSync(path, right, { mode: 0o600 })
    await kms.opened()
    expect(kms.health()).toMatchObject({ open: true, sealed: false, reason: null })
    expect(await kms.describe('a')).toEqual(made)
  })

  test('killed once the key is gone and before it can say so: the destruction is done, and only a second one finds nothing', async () => {
    let isDue = true
    const kms = await start({
      step(name) {
        if (isDue && name === 'kms.destroyed') kill()
        if (name === 'kms.destroyed') isDue = false
      },
    })
    await kms.create('a', 'issuing-ca')
    await kms.destroy('a')
    expect(isDue).toBe(false)
    expect(pids).toHaveLength(2)
    expect(await kms.describe('a')).toBeUndefined()
    await expect(kms.destroy('a')).rejects.toMatchObject({ code: 'not-found' })
  })

  test('what keeps it from starting is thrown: the file of another passphrase, one too short', async () => {
    const file = join(place, 'passphrase')
    const options = {
      folder: join(place, 'kms'),
      backend: { kind: 'file', passphraseFile: file, keyFile: null },
      log: () => undefined,
    } as const
    writeFileSync(file, 'short\n', { mode: 0o600 })
    await expect(startKms(options)).rejects.toMatchObject({ code: 'malformed', reason: 'kms.passphrase' })
    writeFileSync(file, 'correct horse battery\r\n', { mode: 0o600 })
    await (await startKms(options)).close()
    writeFileSync(file, 'correct horse battery', { mode: 0o600 })
    await (await startKms(options)).close()
    writeFileSync(file, 'correct horse batterz', { mode: 0o600 })
    await expect(startKms(options)).rejects.toMatchObject({ code: 'unauthenticated', reason: 'kms.passphrase' })
    expect(readdirSync(runtime)).toEqual([])
  })

  test('its socket is its owner’s, and it serves nobody who does not know the secret of this start', async () => {
    const kms = await start()
    await kms.create('a', 'audit-signing')
    const path = socketPath()
    expect(statSync(path).mode & 0o777).toBe(0o600)
    expect(statSync(join(path, '..')).mode & 0o777).toBe(0o700)
    /** Sends, and gives what came back before the other side closed. */
    const tell = async (sent: Uint8Array): Promise<readonly unknown[]> => {
      const socket = connect(path)
      const [reader, values]: [FrameReader, unknown[]] = [new FrameReader(1 << 20), []]
      socket.on('data', (chunk: Buffer) => void values.push(...reader.push(chunk)))
      socket.on('error', () => undefined)
      socket.write(sent)
      await new Promise((resolve) => void socket.once('close', resolve))
      return values
    }
    const refused = [expect.arrayContaining([1, expect.arrayContaining(['unauthenticated']), null])]
    expect(await tell(frame([1, 'sign', [['a', 'audit-signing', bytes('x')]]]))).toEqual(refused)
    expect(await tell(frame([1, 'hello', new Uint8Array(32)]))).toEqual(refused)
    expect(await tell(frame([1, 'hello', new Uint8Array(0)]))).toEqual(refused)
    expect(await tell(frame([1, 'close', null]))).toEqual(refused)
    // Not this language: no answer at all. The first asks for more than a stranger may send.
    for (const sent of [
      Uint8Array.of(0, 0, 32, 0),
      frame([0, 'hello', null]),
      frame([1, 'format-disk', null]),
      Uint8Array.of(0, 0, 0, 2, 0x18, 1),
      bytes('GET / HTTP/1.1\r\n\r\n'),
    ])
      expect(await tell(sent)).toEqual([])
    expect(await kms.list()).toMatchObject([{ name: 'a', uses: 0 }])
  })

  test('a second process cannot have the keys; the socket goes with its server', async () => {
    await start()
    await expect(startKms({ folder: join(place, 'kms'), log: () => undefined })).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.locked' })
    await kms?.close()
    kms = undefined
    expect(readdirSync(runtime)).toEqual([])
  }, 30_000)

  test('large batches are cut and come back in order; what no frame can hold is refused', async () => {
    const kms = await start()
    const { spki } = await kms.create('a', 'release-signing')
    const key = createPublicKey({ key: Buffer.from(spki ?? []), format: 'der', type: 'spki' })
    const batch = Array.from({ length: 2500 }, (_, at) => ({ key: 'a', purpose: 'release-signing' as const, data: bytes(`${at}`.padEnd(600)) }))
    const signatures = await kms.sign(batch)
    expect(signatures).toHaveLength(batch.length)
    for (const at of [0, 1023, 1024, 1800, 2499]) expect(verify('sha256', batch[at]?.data ?? bytes(''), key, signatures[at] ?? new Uint8Array())).toBe(true)
    const large = new Uint8Array(12 << 20)
    const [signature = new Uint8Array()] = await kms.sign([{ key: 'a', purpose: 'release-signing', data: large }])
    expect(verify('sha256', large, key, signature)).toBe(true)
    await expect(kms.sign([{ key: 'a', purpose: 'release-signing', data: new Uint8Array(16 << 20) }])).rejects.toMatchObject({ code: 'malformed' })
    await expect(kms.wrap([{ key: 'a', plaintext: new Secret(new Uint8Array(65_537)), context: bytes('') }])).rejects.toMatchObject({ code: 'malformed' })
  })
})

test('the server has neither the KEK nor a private key in its memory; the KMS process has both', { timeout: 120_000 }, async () => {
  const pids: number[] = []
  const place = mkdtempSync(join(tmpdir(), 'fk-memory-'))
  const server = await supervise({
    script: './server-process.ts',
    args: ['--data', place, '--mqtt-port', '0', '--https-port', '0', '--json'],
    fault: {},
    isReady: (line) => line.startsWith('{"ready":true'),
    onLine: () => undefined,
  })
  try {
    const children = readFileSync(`/proc/${server.pid}/task/${server.pid}/children`, 'utf8').trim().split(' ').map(Number)
    pids.push(server.pid, children[0] ?? 0)
    expect(children).toHaveLength(1)
    // What a thief of the whole folder would do; here to know what to look for.
    const folder = join(place, 'kms')
    const master = openMaster(folder, { random: (length) => new Uint8Array(length), step: () => undefined })
    const material = (name: string): Buffer => {
      const file = decode(readFileSync(join(folder, `${name}.key.cbor`))) as { name: string; purpose: string; createdAt: number; cell: Uint8Array }
      const opened = open(master, file.cell, encode(['fleetkey/kms-key/1', file.name, file.purpose, file.createdAt]))
      if (opened === undefined) throw new Error(`${name} does not open`)
      if (name === 'kek') return Buffer.from(opened)
      const { d = '' } = createPrivateKey({ key: Buffer.from(opened), format: 'der', type: 'pkcs8' }).export({ format: 'jwk' })
      return Buffer.from(d, 'base64url')
    }
    const keys = ['kek', 'root-ca', 'issuing-ca'].map(material)
    // OpenSSL keeps numbers with their lowest byte first.
    const wanted = [...keys, ...keys.map((key) => Buffer.from(key).reverse())]
    expect(inMemory(server.pid, wanted)).toEqual(wanted.map(() => 0))
    const held = inMemory(children[0] ?? 0, wanted)
    for (const at of keys.keys()) expect((held[at] ?? 0) + (held[at + keys.length] ?? 0)).toBeGreaterThan(0)
  } finally {
    await server.stop()
    rmSync(place, { recursive: true, force: true })
  }
  await until('both have ended', () => pids.every((pid) => !existsSync(`/proc/${pid}`)))
})

test('killed during an enrolment: the device is enrolled and has its keys', { timeout: 120_000 }, async () => {
  const pids: number[] = []
  const killed = new Set<number>()
  let enlisted = false
  const world = await openWorld({
    kmsStarted: (pid) => void pids.push(pid),
    step: (name) => {
      // Between the durable intent and the signature, and while a key is on its way.
      const pid = pids.at(-1) ?? 0
      if ((name !== 'enrol.spent' && name !== 'issue.intended' && name !== 'enrol.issued') || !enlisted || killed.has(pid)) return
      killed.add(pid)
      process.kill(pid, 'SIGKILL')
    },
  })
  try {
    const machine = await world.simulated('GATEWAY-1')
    await world.enlist([machine], 'plant')
    await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
    enlisted = true
    const agent = world.agent(machine)
    await until('it uses its key', () => using([agent], 'telemetry', 1), 60_000)
    expect(killed.size).toBeGreaterThanOrEqual(1)
    expect(pids).toHaveLength(killed.size + 1)
  } finally {
    await world.stop()
  }
})
