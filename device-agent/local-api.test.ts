import { once } from 'node:events'
import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { KeyId } from '@fleetkey/protocol/ids.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { applicationPrefix, proofPrefix, tpmProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { openDocument } from './files.ts'
import { openKeyring, type Keyring } from './keyring.ts'
import { openLocalApi, type LocalApi } from './local-api.ts'
import { openConsumers, type Consumers } from './consumers.ts'
import { localKeys, type LocalKeys } from './local-keys.ts'
import { memoryFileSystem } from './memory-filesystem.ts'
import { random, testDevice } from './test-keys.ts'
import { openUsage, type UsageCounters } from './usage.ts'

const home = testDevice()
const secrets = { one: random(32), two: random(32), mac: random(32) }
const nonce = random(16)
const status = () => ({ device: 'd-1', state: 'online' })
const base64 = (bytes: Uint8Array | string): string => Buffer.from(bytes).toString('base64')

let folder: string
let path: string
let ring: Keyring
let api: LocalApi
let usage: UsageCounters
let consumers: Consumers = openConsumers({ required: [], within: 300 })
const keysOf = (keyring: () => Keyring): LocalKeys => localKeys({ keyring, usage: () => usage, random })
const clients: Socket[] = []

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-api-'))
  path = join(folder, 'agent.sock')
  const step = (): void => undefined
  ring = await openKeyring({
    document: openDocument({ files: memoryFileSystem(), folder: '/', name: 'keyring', step }),
    storage: new Secret(random(32)),
    tpm: home.tpm,
    tenant: home.tenant,
    device: home.device,
    random,
    step,
    onLoss: (why) => {
      throw new Error(why)
    },
  })
  await ring.install(home.delivery(1, { secret: secrets.one }))
  await ring.install(home.delivery(2, { secret: secrets.two }))
  await ring.install(home.delivery(5, { secret: secrets.mac, protection: 'tpm', key: KeyId.parse('meter') }))
  await ring.install(home.delivery(1, { key: KeyId.parse('waiting') }))
  await ring.use({ key: 'site', epoch: 2, nonce, campaign: null })
  await ring.use({ key: 'meter', epoch: 5, nonce, campaign: null })
  usage = await openUsage({ document: openDocument({ files: memoryFileSystem(), folder: '/', name: 'usage', step }), step, onLoss: () => undefined })
  api = await openLocalApi({ path, owner: { mode: 0o660 }, keys: keysOf(() => ring), consumers, status })
})
afterEach(async () => {
  for (const socket of clients.splice(0)) socket.destroy()
  await api.close()
  rmSync(folder, { recursive: true, force: true })
})

interface Client {
  readonly socket: Socket
  readonly next: () => Promise<Record<string, unknown>>
  readonly ask: (request: unknown) => Promise<Record<string, unknown>>
  /** Everything until the agent closes. */
  readonly rest: () => Promise<readonly string[]>
}
const open = async (of: { readonly allowHalfOpen?: boolean } = {}): Promise<Client> => {
  const socket = connect({ path, ...of })
  clients.push(socket)
  await once(socket, 'connect')
  socket.on('error', () => undefined)
  const lines = createInterface({ input: socket })[Symbol.asyncIterator]()
  const next = async () => {
    const { value, done } = await lines.next()
    return done === true ? { closed: true } : (JSON.parse(value) as Record<string, unknown>)
  }
  return {
    socket,
    next,
    async ask(request) {
      socket.write(`${typeof request === 'string' ? request : JSON.stringify(request)}\n`)
      return await next()
    },
    async rest() {
      const found: string[] = []
      for (let line = await lines.next(); line.done !== true; line = await lines.next()) found.push(line.value)
      return found
    },
  }
}

/** Both directions are closed: writing fails. */
const expectClosed = async (socket: Socket): Promise<void> => {
  const write = async (): Promise<boolean> => await new Promise((resolve) => socket.write('\n', (error) => resolve(error instanceof Error)))
  await expect.poll(write, { timeout: 5_000 }).toBe(true)
}

describe('requests', () => {
  const data = base64('reading 42')
  const cases: readonly (readonly [string, unknown, object])[] = [
    ['status', { op: 'status' }, status()],
    ['an id comes back', { id: 'a', op: 'status' }, { id: 'a', ...status() }],
    ['a number as id', { id: 0, op: 'status' }, { id: 0, ...status() }],
    [
      'list',
      { op: 'list' },
      {
        keys: [
          { key: 'site', algorithm: 'A256GCM', protection: 'sealed', current: 2, epochs: [1, 2] },
          { key: 'meter', algorithm: 'HS256', protection: 'tpm', current: 5, epochs: [5] },
          { key: 'waiting', algorithm: 'A256GCM', protection: 'sealed', current: null, epochs: [1] },
        ],
      },
    ],
    ['get', { op: 'get', key: 'site' }, { key: 'site', epoch: 2, algorithm: 'A256GCM', material: base64(secrets.two) }],
    ['get of an older epoch', { op: 'get', key: 'site', epoch: 1 }, { key: 'site', epoch: 1, algorithm: 'A256GCM', material: base64(secrets.one) }],
    ['get of a key inside the TPM', { op: 'get', key: 'meter' }, { error: { code: 'forbidden', detail: 'meter never leaves the TPM' } }],
    ['get of no key', { op: 'get', key: 'none' }, { error: { code: 'not-found', detail: 'no key none on this device' } }],
    ['get of no epoch', { op: 'get', key: 'site', epoch: 9 }, { error: { code: 'not-found', detail: 'no epoch 9 of site on this device' } }],
    ['get before an epoch is in use', { op: 'get', key: 'waiting' }, { error: { code: 'unavailable', detail: 'no epoch of waiting is in use yet' } }],
    [
      'encrypt under a MAC key',
      { op: 'encrypt', key: 'meter', plaintext: data },
      { error: { code: 'unsupported', detail: expect.stringContaining('HMAC-SHA256 with it and nothing else') } },
    ],
    ['mac under an encryption key', { op: 'mac', key: 'site', data }, { error: { code: 'unsupported', detail: 'site is an encryption key' } }],
    ['verify of another length', { op: 'verify', key: 'meter', epoch: 5, data, mac: base64('short') }, { valid: false }],
    ['decrypt of no ciphertext', { op: 'decrypt', key: 'site', ciphertext: data }, { error: { code: 'malformed', detail: 'not a COSE_Encrypt0' } }],
    ['not JSON', '{"op":', { error: { code: 'malformed', detail: 'not a line of JSON' } }],
    ['not an object', '7', { error: expect.objectContaining({ code: 'malformed' }) }],
    ['an unknown operation, with its id', { id: 3, op: 'export' }, { id: 3, error: expect.objectContaining({ code: 'malformed' }) }],
    ['an unknown field', { op: 'list', all: true }, { error: expect.objectContaining({ code: 'malformed' }) }],
    ['a key name that is none', { op: 'get', key: '../site' }, { error: expect.objectContaining({ code: 'malformed' }) }],
    ['not base64', { op: 'mac', key: 'meter', data: 'a b' }, { error: { code: 'malformed', detail: 'data: expected base64' } }],
    ['an epoch below 1', { op: 'get', key: 'site', epoch: 0 }, { error: expect.objectContaining({ code: 'malformed' }) }],
    [
      'more data than fits',
      { op: 'mac', key: 'meter', data: base64(new Uint8Array((16 << 10) + 3)) },
      { error: expect.objectContaining({ code: 'malformed' }) },
    ],
  ]
  test.each(cases)('%s', async (_name, request, want) => {
    const client = await open()
    expect(await client.ask(request)).toEqual(want)
    expect(await client.ask({ op: 'status' })).toEqual(status())
  })

  test('encrypt and decrypt: with the same associated data, under any epoch that is held', async () => {
    const client = await open()
    const plaintext = base64(random(1_000))
    const sealed = await client.ask({ op: 'encrypt', key: 'site', plaintext, aad: base64('pump 1') })
    expect(sealed).toEqual({ epoch: 2, ciphertext: expect.any(String) })
    const ciphertext = String(sealed['ciphertext'])
    const opened = async (of: object) => await client.ask({ op: 'decrypt', key: 'site', ciphertext, aad: base64('pump 1'), ...of })
    expect(await opened({})).toEqual({ epoch: 2, run: expect.any(String), counter: 0, plaintext })
    const forged = { error: { code: 'unauthenticated', detail: 'the ciphertext does not authenticate' } }
    expect(await opened({ aad: base64('pump 2') })).toEqual(forged)
    expect(await opened({ key: 'waiting' })).toEqual({ error: { code: 'not-found', detail: 'encrypted under another key than waiting' } })
    const bytes = Buffer.from(ciphertext, 'base64')
    for (let at = 0; at < bytes.length; at += 37) {
      const flipped = Buffer.from(bytes)
      flipped[at] = (flipped[at] ?? 0) ^ 1
      expect(await opened({ ciphertext: base64(flipped) })).toHaveProperty('error')
    }
    await ring.install(home.delivery(3))
    await ring.use({ key: 'site', epoch: 3, nonce, campaign: null })
    expect(await client.ask({ op: 'encrypt', key: 'site', plaintext })).toMatchObject({ epoch: 3 })
    expect(await opened({})).toEqual({ epoch: 2, run: expect.any(String), counter: 0, plaintext })
    expect(await client.ask({ op: 'encrypt', key: 'site', plaintext: base64(new Uint8Array(64 << 10)) })).toMatchObject({ epoch: 3 })
  })

  test('mac and verify', async () => {
    const client = await open()
    const data = base64(random(16 << 10))
    const { epoch, mac } = await client.ask({ op: 'mac', key: 'meter', data })
    expect(epoch).toBe(5)
    const verify = async (of: object) => await client.ask({ op: 'verify', key: 'meter', epoch: 5, data, mac, ...of })
    expect(await verify({})).toEqual({ valid: true })
    expect(await verify({ data: base64('other') })).toEqual({ valid: false })
    expect(await verify({ mac: base64(new Uint8Array(32)) })).toEqual({ valid: false })
    expect(await verify({ epoch: 4 })).toMatchObject({ error: { code: 'not-found' } })
  })

  test('watch: one key, more keys, every key', async () => {
    const [none, site, both, all] = [await open(), await open(), await open(), await open()]
    expect(await site.ask({ op: 'watch', key: 'site' })).toMatchObject({ watching: true, keys: expect.any(Array) })
    await both.ask({ op: 'watch', key: 'site' })
    await both.ask({ op: 'watch', key: 'meter' })
    await all.ask({ op: 'watch' })
    await all.ask({ op: 'watch', key: 'site' })
    api.notify({ key: 'meter', epoch: 6 })
    api.notify({ key: 'site', epoch: null })
    const [meter, withdrawn] = [
      { event: 'changed', key: 'meter', epoch: 6 },
      { event: 'changed', key: 'site', epoch: null },
    ]
    expect(await site.next()).toEqual(withdrawn)
    expect([await both.next(), await both.next()]).toEqual([meter, withdrawn])
    expect([await all.next(), await all.next()]).toEqual([meter, withdrawn])
    expect(await none.ask({ op: 'status' })).toEqual(status())
  })

  test('an agent that has no keys yet says why', async () => {
    const other = join(folder, 'new.sock')
    const notReady = (): never => {
      throw new Error('with a stack that is nobody’s business')
    }
    const fresh = await openLocalApi({ path: other, owner: { mode: 0o600 }, keys: keysOf(notReady), consumers, status })
    const socket = connect(other)
    socket.write('{"op":"list"}\n')
    const [answer] = (await once(socket, 'data')) as [Buffer]
    expect(JSON.parse(answer.toString())).toEqual({ error: { code: 'internal', detail: 'the agent failed' } })
    socket.destroy()
    await fresh.close()
  })
})

describe('rotation proofs', () => {
  test('no data that an application may choose gives the MAC of a proof', async () => {
    const client = await open()
    const transcript = useTranscript({ tenant: home.tenant, device: home.device, key: 'meter', epoch: 5, nonce })
    const proof = await ring.proof('meter', 5, nonce)
    expect(Buffer.from(proof)).toEqual(Buffer.from(tpmProof(new Secret(secrets.mac), transcript)))
    const tail = proofPrefix.subarray(applicationPrefix.length)
    const attempts = [
      transcript,
      Buffer.concat([proofPrefix, transcript]),
      Buffer.concat([tail, transcript]),
      transcript.subarray(1),
      new Uint8Array(0),
      nonce,
      proof,
    ]
    for (const data of attempts) {
      const { mac } = await client.ask({ op: 'mac', key: 'meter', data: base64(data) })
      expect(mac).not.toBe(base64(proof))
      expect(await client.ask({ op: 'verify', key: 'meter', epoch: 5, data: base64(data), mac: base64(proof) })).toEqual({ valid: false })
    }
  })

  test('because neither prefix begins the other: what is MACed for applications never equals what is MACed for a proof', () => {
    fc.assert(
      fc.property(
        fc.uint8Array(),
        fc.uint8Array({ minLength: 32, maxLength: 32 }),
        (data, transcript) => Buffer.compare(Buffer.concat([applicationPrefix, data]), Buffer.concat([proofPrefix, transcript])) !== 0,
      ),
    )
    const common = Math.min(applicationPrefix.length, proofPrefix.length)
    expect(applicationPrefix.subarray(0, common)).not.toEqual(proofPrefix.subarray(0, common))
  })
})

describe('the socket', () => {
  test.each([0o660, 0o600, 0o666])('has the mode that was asked for: %o', async (mode) => {
    const other = join(folder, `m-${mode}.sock`)
    const before = process.umask()
    const opened = await openLocalApi({ path: other, owner: { mode }, keys: keysOf(() => ring), consumers, status })
    expect([statSync(other).mode & 0o777, process.umask()]).toEqual([mode, before])
    await opened.close()
  })

  test('is 0660 here, and serves', async () => {
    expect(statSync(path).mode & 0o777).toBe(0o660)
    expect(await (await open()).ask({ op: 'status' })).toEqual(status())
  })

  test('a second agent on the same path is refused; one after a crash takes the dead socket over', async () => {
    const again = async () => await openLocalApi({ path, owner: { mode: 0o660 }, keys: keysOf(() => ring), consumers, status })
    await expect(again()).rejects.toThrow(`another agent serves ${path}`)
    await api.close()
    writeFileSync(path, '')
    api = await again()
    expect(await (await open()).ask({ op: 'status' })).toEqual(status())
  })

  test('a path that is too long for a socket', async () => {
    const long = join(folder, 'x'.repeat(108))
    await expect(openLocalApi({ path: long, owner: { mode: 0o660 }, keys: keysOf(() => ring), consumers, status })).rejects.toThrow('more than 107 bytes')
  })
})

describe('clients that misbehave', () => {
  test('half a line, then the rest; half a line, then nothing', async () => {
    const client = await open()
    client.socket.write('{"op":"sta')
    await new Promise((resolve) => setTimeout(resolve, 20))
    client.socket.write('tus"}\n{"id":1,"op":"status"}\n{"id":2,')
    expect([await client.next(), await client.next()]).toEqual([status(), { id: 1, ...status() }])
    client.socket.end()
    expect(await client.rest()).toEqual([])
    expect(await (await open()).ask({ op: 'status' })).toEqual(status())
  })

  test('a request and the end of the connection at once are answered', async () => {
    const client = await open({ allowHalfOpen: true })
    client.socket.end(`{"op":"mac","key":"meter","data":"AAAA"}\n\n \n{"id":9,"op":"status"}\n`)
    expect((await client.rest()).map((line) => JSON.parse(line) as object)).toEqual([
      { epoch: 5, mac: expect.any(String) },
      { id: 9, ...status() },
    ])
  })

  test('answers come in the order of the requests', async () => {
    const client = await open()
    const ops = Array.from({ length: 50 }, (_, id) => (id % 3 === 0 ? { id, op: 'status' } : { id, op: 'mac', key: 'meter', data: 'AAAA' }))
    client.socket.write(ops.map((op) => `${JSON.stringify(op)}\n`).join(''))
    const ids: unknown[] = []
    for (const _op of ops) ids.push((await client.next())['id'])
    expect(ids).toEqual(ops.map(({ id }) => id))
  })

  test('garbage of every kind is answered or ends the connection, and the agent goes on', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.oneof(
          fc.uint8Array({ maxLength: 300 }),
          fc.json().map((text) => Buffer.from(text)),
        ),
        async (bytes) => {
          const client = await open()
          client.socket.write(bytes)
          const end = '{"id":"end","op":"status"}'
          client.socket.write(`\n${end}\n`)
          for (;;) {
            const answer = await client.next()
            if (answer['id'] === 'end') break
            expect(answer).toHaveProperty('error.code', 'malformed')
          }
          client.socket.destroy()
        },
      ),
      { numRuns: 60 },
    )
  })

  const endless = (bytes: number): string => `{"op":"get","key":"${'x'.repeat(bytes)}`
  test('a line without end is cut off, and the connection with it', async () => {
    const client = await open({ allowHalfOpen: true })
    client.socket.write(endless(400_000))
    expect((await client.rest()).map((line) => JSON.parse(line) as object)).toEqual([
      { error: { code: 'malformed', detail: 'a line of more than 98304 bytes' } },
    ])
    // Closed, not left half open: such connections would pile up beside those that are counted.
    await expectClosed(client.socket)
  })

  test('64 connections are served, the next is told so and closed, a place that is free is taken', async () => {
    const many = await Promise.all(Array.from({ length: 64 }, async () => await open()))
    const answers = await Promise.all(many.map(async (client) => await client.ask({ op: 'get', key: 'site' })))
    expect(answers.every(({ material }) => material === base64(secrets.two))).toBe(true)
    const refused = await open({ allowHalfOpen: true })
    expect(await refused.next()).toEqual({ error: { code: 'rate-limited', detail: 'more than 64 connections' } })
    await expectClosed(refused.socket)
    many[0]?.socket.destroy()
    await expect.poll(async () => await (await open()).ask({ op: 'status' })).toEqual(status())
  })

  test('the agent stops at once, whoever is connected and does not listen', async () => {
    await Promise.all(Array.from({ length: 64 }, async () => await open({ allowHalfOpen: true })))
    const refused = connect({ path, allowHalfOpen: true })
    clients.push(refused)
    refused.on('error', () => undefined)
    refused.write('more than nothing\n')
    await once(refused, 'data')
    await api.close()
    await expect(open()).rejects.toThrow()
  })

  test('a watcher that does not read is dropped; others go on', async () => {
    const deaf = connect(path)
    clients.push(deaf)
    deaf.on('error', () => undefined)
    deaf.write('{"op":"watch"}\n')
    const closed = new Promise<void>((resolve) => deaf.once('close', () => resolve()))
    await once(deaf, 'connect')
    const well = await open()
    await well.ask({ op: 'watch' })
    let seen = 0
    for (let epoch = 1; epoch <= 20_000; epoch += 1) {
      api.notify({ key: 'site', epoch })
      // One that reads is never behind.
      if (epoch % 100 === 0) for (; seen < epoch; seen += 1) expect(await well.next()).toMatchObject({ epoch: seen + 1 })
    }
    deaf.resume()
    await closed
    expect(await well.ask({ op: 'status' })).toEqual(status())
  })

  test('one that asks and does not read the answers is dropped', async () => {
    const client = await open()
    client.socket.pause()
    const closed = new Promise<void>((resolve) => client.socket.once('close', () => resolve()))
    const big = `${JSON.stringify({ op: 'encrypt', key: 'site', plaintext: base64(new Uint8Array(48 << 10)) })}\n`
    for (let count = 0; count < 40; count += 1) client.socket.write(big)
    await new Promise((resolve) => setTimeout(resolve, 300))
    client.socket.resume()
    await closed
    expect(await (await open()).ask({ op: 'status' })).toEqual(status())
  })
})
