import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { request } from 'node:https'
import { connect, createServer, type AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { parseShare, shareText, type Share } from '@fleetkey/protocol/share.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { readSettings } from '@fleetkey/server/config.ts'
import { startKms, type SupervisedKms } from '@fleetkey/server/kms/supervisor.ts'
import { startServer, type SealedServer } from '@fleetkey/server/main.ts'
import { openSealing } from '@fleetkey/server/sealing.ts'
import { fleetkey, type Outcome } from './command-line.ts'
import { supervise, type Supervised } from './faults/supervised.ts'
import { inMemory } from './memory.ts'
import { freePort } from './ports.ts'
import { sealedTo, shareReader, splitInto } from './safe.ts'
import { random, until } from './world.ts'

const script = './server-process.ts'
/** Milliseconds that the start of a process may take on a busy machine. */
const patience = 60_000
const forged = (text: string): string => {
  const { set, index, value } = parseShare(text)
  return shareText({ set, index, value: new Secret(value.bytes().map((byte) => byte ^ 1)) })
}
const run = async (program: string, words: readonly string[], input = ''): Promise<Outcome> =>
  await new Promise((resolve) => {
    const child = execFile(program, words, { timeout: 50_000 }, (error, stdout, stderr) =>
      resolve({ code: error === null ? 0 : typeof error.code === 'number' ? error.code : 128, stdout, stderr }),
    )
    child.stdin?.end(input)
  })
const cli = fileURLToPath(new URL('../cli/main.ts', import.meta.url))

const refuses = async (port: number): Promise<string> =>
  await new Promise((resolve) => {
    const socket = connect(port, '127.0.0.1', () => {
      socket.destroy()
      resolve('listens')
    })
    socket.on('error', (error: NodeJS.ErrnoException) => resolve(String(error.code)))
  })

describe('a server whose passphrase is missing', { timeout: 180_000 }, () => {
  const place = mkdtempSync(join(tmpdir(), 'fk-sealed-'))
  const at = (name: string): string => join(place, name)
  const [data, passphrase] = [at('data'), at('passphrase')]
  const lines: string[] = []
  const ports = { mqtt: 0, https: 0, http: 0, est: 0 }
  let server: Supervised
  let files: readonly string[] = []
  let shares: readonly string[] = []

  const start = async (): Promise<void> => {
    lines.length = 0
    server = await supervise({
      script,
      args: ['--data', data, '--passphrase-file', passphrase, '--json', ...Object.entries(ports).flatMap(([name, port]) => [`--${name}-port`, String(port)])],
      fault: {},
      isReady: (line) => line.startsWith('{"ready":'),
      onLine(line) {
        // Beside what the server says to everybody.
        if (!line.startsWith('{"kms":')) lines.push(line)
      },
    })
  }
  const here = async (...words: string[]): Promise<Outcome> => await fleetkey([...words, '--data', data])
  const status = async () =>
    JSON.parse((await here('seal', 'status', '--json')).stdout) as { sealed: boolean; wrong: number; sets: { set: string; gathered: number[] }[] }
  const gathered = async () => (await status()).sets[0]?.gathered
  const handIn = async (number: number): Promise<Outcome> => await here('seal', 'unseal', files[number - 1] ?? '')
  const probe = async (path: string, token?: string): Promise<{ status: number; text: string }> =>
    await new Promise((resolve, reject) => {
      const outgoing = request(
        {
          host: '127.0.0.1',
          port: ports.https,
          path,
          agent: false,
          rejectUnauthorized: false,
          headers: token === undefined ? {} : { authorization: `Bearer ${token}` },
        },
        (incoming) => {
          let text = ''
          incoming.on('data', (chunk: Buffer) => (text += chunk.toString()))
          incoming.on('end', () => resolve({ status: incoming.statusCode ?? 0, text }))
        },
      )
      outgoing.on('error', reject)
      outgoing.end()
    })
  const isReady = async (): Promise<boolean> =>
    await probe('/readyz').then(
      ({ status }) => status === 200,
      () => false,
    )

  beforeAll(async () => {
    for (const name of ['mqtt', 'https', 'http', 'est'] as const) ports[name] = await freePort()
    writeFileSync(passphrase, 'correct horse battery\n', { mode: 0o600 })
    await start()
  }, 120_000)
  afterAll(async () => {
    await server.stop()
    rmSync(place, { recursive: true, force: true })
  })

  test('is split while it is open, by two people; the server never reads a share', async () => {
    expect(lines[0]).toMatch(/^\{"ready":true/)
    const words = ['seal', 'split', '--shares', '5', '--threshold', '3', '--reason', 'nobody alone', '--out', at('shares')]
    const asked = await here(...words)
    expect(asked).toMatchObject({ code: 3, stdout: expect.stringContaining('another operator has to approve it') })
    const [, approval = ''] = /approval grant ([0-9a-f]+)/.exec(asked.stdout) ?? []
    writeFileSync(at('bob'), (await here('operator', 'add', 'bob', '--role', 'owner')).stdout, { mode: 0o600 })
    expect(await here('approval', 'grant', approval)).toMatchObject({ code: 3 })
    expect(await here('approval', 'grant', approval, '--token-file', at('bob'))).toMatchObject({ code: 0 })
    expect(await here(...words)).toMatchObject({ code: 0, stderr: expect.stringContaining('any 3 of these 5 shares open the keys') })
    files = readdirSync(at('shares'))
      .toSorted()
      .map((name) => at(`shares/${name}`))
    shares = files.map((file) => readFileSync(file, 'latin1').trim())
    expect(await status()).toMatchObject({ sealed: false, sets: [{ confirmed: true, shares: 5, threshold: 3, gathered: [] }] })
    const secrets = shares.flatMap((share) => {
      const { value } = parseShare(share)
      return [Buffer.from(value.bytes()), Buffer.from(Buffer.from(value.bytes()).toString('hex'))]
    })
    expect(inMemory(server.pid, secrets)).toEqual(secrets.map(() => 0))
    const doctor = JSON.parse((await here('doctor', '--json')).stdout) as { check: string; grade: string; found: string }[]
    expect(doctor.find(({ check }) => check === 'seal')).toMatchObject({ grade: 'ok', found: 'open; 3 of 5 shares open it' })
  })

  test('starts sealed, says so, and serves nothing but being unsealed', async () => {
    await server.stop()
    rmSync(passphrase)
    await start()
    expect(JSON.parse(lines[0] ?? '')).toMatchObject({
      ready: false,
      sealed: true,
      httpsPort: ports.https,
      reason: expect.stringContaining(`${passphrase} is missing`),
    })
    expect(server.errors).toMatch(/SEALED: the passphrase file .* is missing/)
    for (const port of [ports.mqtt, ports.http, ports.est]) expect(await refuses(port)).toBe('ECONNREFUSED')
    const ready = await probe('/readyz')
    expect([ready.status, JSON.parse(ready.text)]).toEqual([
      503,
      { ready: false, sealed: true, reason: `sealed: the passphrase file ${passphrase} is missing` },
    ])
    const { token } = JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { token: string }
    expect(await probe('/api/1/devices', token)).toMatchObject({ status: 503 })
    // Whoever trusts the CA alone does not even get so far as to send a token.
    expect(await here('device', 'list')).toMatchObject({ code: 2, stderr: expect.stringMatching(/self-signed certificate: a sealed server shows one/) })
    expect(await here('seal', 'status')).toMatchObject({ code: 5, stdout: expect.stringMatching(/state: +sealed[\s\S]*any 3 of 5 shares; none handed in/) })
    expect(await here('doctor')).toMatchObject({ code: 5, stdout: expect.stringMatching(/seal +FAILURE/) })
    // The certificate of another sealed server is not this one's, whatever names it bears.
    const other = openSealing(mkdtempSync(join(place, 'other-')), { tenant: 'default', names: [], now: Date.now(), random, log: () => undefined })
    writeFileSync(at('other.crt'), other.cert)
    expect(await here('seal', 'status', '--sealing', at('other.crt'))).toMatchObject({ code: 2, stderr: expect.stringContaining('self-signed certificate') })
    // By its own certificate others find it as well, under its names.
    const curl = await run('curl', ['-sS', '--cacert', join(data, 'sealing.crt'), `https://localhost:${ports.https}/readyz`])
    expect([curl.code, JSON.parse(curl.stdout)]).toMatchObject([0, { ready: false, sealed: true }])
    expect(await run('openssl', ['verify', '-CAfile', join(data, 'sealing.crt'), '-purpose', 'sslserver', join(data, 'sealing.crt')])).toMatchObject({
      code: 0,
    })
    expect(statSync(join(data, 'sealing.pem')).mode & 0o777).toBe(0o600)
  })

  test('takes one share at a time, tells a wrong one and has its sender wait; kill -9 forgets the shares and not the wrong one', async () => {
    expect(await handIn(5)).toMatchObject({ code: 4, stdout: 'share 5 taken: 1 of 3 (5)\n' })
    expect(await handIn(5)).toMatchObject({ code: 4, stdout: 'share 5 taken: 1 of 3 (5)\n' })
    writeFileSync(at('wrong'), forged(shares[1] ?? ''))
    expect(await here('seal', 'unseal', at('wrong'))).toMatchObject({
      code: 3,
      stderr: expect.stringMatching(/share 2 of set [0-9a-f]{16} is not the one that was handed out/),
    })
    expect(await handIn(2)).toMatchObject({ code: 2, stderr: expect.stringContaining('rate-limited: a wrong share came from there') })
    writeFileSync(at('typo'), (shares[1] ?? '').replace(/\.[0-9a-f]{8}$/, '.00000000'))
    expect(await here('seal', 'unseal', at('typo'))).toMatchObject({ code: 1, stderr: expect.stringContaining('does not fit its checksum') })
    expect(await here('seal', 'unseal', shares[1] ?? '')).toMatchObject({ code: 1, stderr: expect.stringContaining('does not belong on the command line') })
    await until('it may try again', async () => (await handIn(2)).code === 4, patience)
    expect(await gathered()).toEqual([2, 5])
    process.kill(server.pid, 'SIGKILL')
    await until('it is back, sealed', async () => server.kills === 1 && lines.length === 2 && (await gathered())?.length === 0, patience)
    expect(await status()).toMatchObject({ sealed: true, wrong: 1 })
  })

  test('opens with the last share, in the same process, and goes on to ready', async () => {
    const { pid } = server
    expect((await handIn(1)).code).toBe(4)
    const [, { code: second }] = await Promise.all([handIn(3), run(process.execPath, [cli, 'seal', 'unseal', '--data', data], shares[1])])
    expect(second).toBeLessThan(5)
    await until('it is ready', isReady, patience)
    expect([server.pid, lines.at(-1)]).toEqual([pid, expect.stringMatching(/^\{"ready":true/)])
    for (const port of [ports.mqtt, ports.http, ports.est]) expect(await refuses(port)).toBe('listens')
    expect(await here('device', 'list')).toMatchObject({ code: 0 })
    expect(await status()).toMatchObject({ sealed: false, wrong: 0 })
    expect(await handIn(1)).toMatchObject({ code: 3, stderr: expect.stringContaining('not sealed') })
    const { stdout } = await here('audit', 'list', '--limit', '1000', '--json')
    const entries = (JSON.parse(stdout) as { action: string; subject: string; detail: string }[]).filter(({ action }) => action === 'seal.unseal')
    const numbers = entries.map(({ subject }) => Number(subject[6]))
    expect([...numbers.slice(0, 2), ...numbers.slice(2).toSorted((one, other) => one - other)]).toEqual([5, 2, 1, 2, 3])
    expect(entries.map(({ detail }) => detail)).toContain('the keys are open')
    expect(server.errors).toMatch(/a wrong share from 127\.0\.0\.0\/24, 1 since/)
  })

  test('is sealed again when the process with the keys dies; the others go on, and shares open it', async () => {
    const children = readFileSync(`/proc/${server.pid}/task/${server.pid}/children`, 'utf8').trim().split(' ').map(Number)
    process.kill(children[0] ?? 0, 'SIGKILL')
    await until('it is sealed', async () => (await probe('/readyz')).text.includes('"sealed":true'), patience)
    expect(await here('ca', 'prepare')).toMatchObject({ code: 5, stderr: expect.stringContaining('sealed') })
    expect(await here('device', 'list')).toMatchObject({ code: 0 })
    for (const number of [4, 5, 1]) await handIn(number)
    await until('it is ready', isReady, patience)
    expect(server.errors).toMatch(/ALARM: the KMS process runs again and is sealed/)
  })

  test('is split anew: printed this once; the old shares open nothing any more', async () => {
    const words = ['seal', 'split', '--shares', '3', '--threshold', '2', '--reason', 'somebody left', '--data', data]
    const [, approval = ''] = /approval grant ([0-9a-f]+)/.exec((await fleetkey(words)).stdout) ?? []
    await here('approval', 'grant', approval, '--token-file', at('bob'))
    const { code, stdout } = await run(process.execPath, [cli, ...words])
    const printed = stdout.trim().split('\n').map(parseShare)
    expect([code, printed.map(({ index }) => index)]).toEqual([0, [1, 2, 3]])
    expect(await status()).toMatchObject({ sets: [{ set: printed[0]?.set, confirmed: true, only: false }] })
    expect(await fleetkey(words)).toMatchObject({ code: 3 })
    expect(await here('seal', 'confirm', printed[0]?.set ?? '')).toMatchObject({ code: 0 })
    expect(await here('seal', 'confirm', '0123456789abcdef')).toMatchObject({ code: 3 })
    await server.stop()
    await start()
    expect(await handIn(1)).toMatchObject({ code: 3, stderr: expect.stringContaining(`these keys are split as set ${printed[0]?.set} (2 of 3)`) })
    await until('it may try again', async () => (await run(process.execPath, [cli, 'seal', 'unseal', '--data', data], stdout.split('\n')[0])).code === 4)
  })

  test('stops in order while it is sealed, and opens by itself when the passphrase is back', async () => {
    await server.stop()
    await start()
    expect(await status()).toMatchObject({ sealed: true })
    await server.stop()
    expect(server.exitCode).toBe(0)
    await start()
    writeFileSync(passphrase, 'correct horse battery\n', { mode: 0o600 })
    await until('it is ready', isReady, patience)
    expect(await refuses(ports.mqtt)).toBe('listens')
  })
})

describe('the process that has the keys, killed', { timeout: 60_000 }, () => {
  let place: string
  let kms: SupervisedKms
  let fatal = ''
  let set: readonly Share[]
  const order = { shares: 3, threshold: 2, only: false }
  const passphrase = (): string => join(place, 'passphrase')
  const sealed = { code: 'unavailable', reason: 'kms.sealed' }

  beforeEach(async () => {
    place = mkdtempSync(join(tmpdir(), 'fk-split-'))
    writeFileSync(passphrase(), 'correct horse battery\n', { mode: 0o600 })
    let pid = 0
    fatal = ''
    kms = await startKms({
      folder: join(place, 'kms'),
      backend: { kind: 'file', passphraseFile: passphrase(), keyFile: null },
      log: () => undefined,
      started: (id) => (pid = id),
      step(name) {
        if (name !== fatal) return
        // What opens the keys goes with it, so that nothing is answered or done again.
        fatal = ''
        rmSync(passphrase(), { force: true })
        process.kill(pid, 'SIGKILL')
      },
    })
    await kms.create('a', 'audit-signing')
    set = await splitInto(kms.seal, order)
  })
  afterEach(async () => {
    await kms.close()
    rmSync(place, { recursive: true, force: true })
  })
  const handIn = async (share: Share | undefined) => (await kms.seal.unseal(await sealedTo(kms.seal, share), false)).status
  const opensWith = async (shares: readonly Share[]): Promise<void> => {
    await handIn(shares[0])
    expect(await handIn(shares[1])).toMatchObject({ sealed: false })
    expect((await kms.list()).map(({ name }) => name)).toEqual(['a'])
  }

  test('in a split: the set in force opens the keys', async () => {
    fatal = 'seal.split'
    await expect(kms.seal.split(order, shareReader().recipient)).rejects.toMatchObject(sealed)
    expect((await kms.seal.status()).sets.map(({ confirmed }) => confirmed)).toEqual([true, false])
    await opensWith(set)
  })

  test('in the confirmation of one: the new set alone does', async () => {
    const { recipient, read } = shareReader()
    const fresh = await kms.seal.split(order, recipient)
    fatal = 'seal.confirmed'
    await expect(kms.seal.confirm(fresh.set)).rejects.toMatchObject(sealed)
    await expect(handIn(set[0])).rejects.toMatchObject({ reason: 'seal.share.set' })
    await opensWith(fresh.shares.map(read))
  })

  test('in unsealing: the shares are handed in again; the wrong one was counted', async () => {
    const share = set[0]
    if (share === undefined) throw new Error('no share')
    fatal = 'seal.split'
    await expect(kms.seal.split(order, shareReader().recipient)).rejects.toMatchObject(sealed)
    fatal = 'seal.wrong'
    await expect(handIn({ ...share, value: new Secret(new Uint8Array(33)) })).rejects.toMatchObject({ reason: 'seal.recipient' })
    expect(await kms.seal.status()).toMatchObject({ sealed: true, wrong: 1 })
    await handIn(set[1])
    fatal = 'seal.opened'
    await expect(handIn(set[2])).rejects.toMatchObject({ reason: 'seal.recipient' })
    expect(await kms.seal.status()).toMatchObject({ sealed: true, wrong: 0, sets: [{ gathered: [] }, { gathered: [] }] })
    await opensWith(set)
  })
})

test('what the server has started is stopped when something after it fails', { timeout: 60_000 }, async () => {
  const place = mkdtempSync(join(tmpdir(), 'fk-fails-'))
  const taken = createServer()
  taken.listen(0, '127.0.0.1')
  await once(taken, 'listening')
  const { port } = taken.address() as AddressInfo
  const pids: number[] = []
  const settings = (https: number) => readSettings(['--data', place, '--mqtt-port', '0', '--https-port', String(https)], {})
  const around = { log: () => undefined, kmsStarted: (pid: number) => void pids.push(pid) }
  try {
    await expect(startServer(settings(port), around)).rejects.toMatchObject({ code: 'EADDRINUSE' })
    expect(pids.map((pid) => existsSync(`/proc/${pid}`))).toEqual([false])
    // Neither the store nor the keys are locked any more.
    await (await startServer(settings(0), around)).stop()
  } finally {
    taken.close()
    rmSync(place, { recursive: true, force: true })
  }
})

test('the very first start waits for its passphrase as well, and makes nothing without it', { timeout: 60_000 }, async () => {
  const place = mkdtempSync(join(tmpdir(), 'fk-first-'))
  const [data, file] = [join(place, 'data'), join(place, 'passphrase')]
  const waits = Promise.withResolvers<SealedServer>()
  const settings = readSettings(['--data', data, '--mqtt-port', '0', '--https-port', '0', '--passphrase-file', file], {})
  const starting = startServer(settings, { log: () => undefined, sealed: waits.resolve })
  try {
    expect(await waits.promise).toMatchObject({ reason: expect.stringContaining(`${file} is missing`) })
    expect(readdirSync(join(data, 'kms'))).toEqual(['lock'])
    writeFileSync(file, 'correct horse battery', { mode: 0o600 })
    expect((await starting).httpsPort).toBe((await waits.promise).httpsPort)
  } finally {
    await (await starting).stop()
    rmSync(place, { recursive: true, force: true })
  }
})

test('a wrong passphrase is no seal: the server ends, and says why', { timeout: 60_000 }, async () => {
  const place = mkdtempSync(join(tmpdir(), 'fk-wrong-'))
  const file = join(place, 'passphrase')
  const settings = () => readSettings(['--data', join(place, 'data'), '--mqtt-port', '0', '--https-port', '0', '--passphrase-file', file], {})
  try {
    writeFileSync(file, 'correct horse battery', { mode: 0o600 })
    await (await startServer(settings(), { log: () => undefined })).stop()
    writeFileSync(file, 'correct horse batterz', { mode: 0o600 })
    await expect(startServer(settings(), { log: () => undefined })).rejects.toMatchObject({ code: 'unauthenticated', message: 'wrong passphrase for this KMS' })
  } finally {
    rmSync(place, { recursive: true, force: true })
  }
})

test('a passphrase that systemd hands over opens the keys; without it they stay closed, and no key file takes its place', { timeout: 60_000 }, async () => {
  const place = mkdtempSync(join(tmpdir(), 'fk-credential-'))
  const [data, credentials] = [join(place, 'data'), join(place, 'credentials')]
  mkdirSync(credentials)
  const settings = (env: NodeJS.ProcessEnv) => readSettings(['--data', data, '--mqtt-port', '0', '--https-port', '0'], env)
  const around = { log: () => undefined }
  try {
    writeFileSync(join(credentials, 'fleetkey-passphrase'), 'correct horse battery', { mode: 0o400 })
    for (let starts = 0; starts < 2; starts++) await (await startServer(settings({ CREDENTIALS_DIRECTORY: credentials }), around)).stop()
    expect(readdirSync(join(data, 'kms'))).not.toContain('master.key')
    for (const env of [{}, { CREDENTIALS_DIRECTORY: place }]) {
      const waits = Promise.withResolvers<SealedServer>()
      const ended = new AbortController()
      const starting = startServer(settings(env), { ...around, sealed: waits.resolve, signal: ended.signal })
      expect((await Promise.race([waits.promise, starting.then(() => ({ reason: 'it serves' }))])).reason).toMatch(/passphrase/)
      ended.abort()
      await expect(starting).rejects.toThrow()
    }
    expect(readdirSync(join(data, 'kms'))).not.toContain('master.key')
  } finally {
    rmSync(place, { recursive: true, force: true })
  }
})
