import { spawnSync } from 'node:child_process'
import { createPublicKey, generateKeyPairSync, verify } from 'node:crypto'
import { mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { boolean, der, explicit, number, octetString, sequence, tags } from '@fleetkey/protocol/x509/der.ts'
import type { Backend } from '@fleetkey/server/kms/orders.ts'
import { startKms, type SupervisedKms } from '@fleetkey/server/kms/supervisor.ts'
import { moveFromFiles } from './moving.ts'
import { hasSoftHsm, openMoodyToken, openSoftHsm, pin, serverOptions, type SoftHsm } from './softhsm.ts'
import { openWorld, until, using } from './world.ts'

const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text))

/** A TBSCertificate of a CA, of which only what decides is filled in. */
const caCertificate = ((): Uint8Array => {
  const [empty, oid] = [sequence(), der(tags.oid, Uint8Array.of(0x55, 0x1d, 0x13))]
  const basic = sequence(oid, boolean(true), octetString(sequence(boolean(true))))
  return sequence(explicit(0, number(2)), number(7), empty, empty, empty, empty, empty, explicit(3, sequence(basic)))
})()

describe.skipIf(!hasSoftHsm())('a PKCS#11 token', () => {
  let place = ''
  let lines: string[] = []
  let pids: number[] = []
  const open: SupervisedKms[] = []
  const start = async (backend: Backend, folder = 'kms'): Promise<SupervisedKms> => {
    const kms = await startKms({ folder: join(place, folder), backend, log: (line) => void lines.push(line), started: (pid) => void pids.push(pid) })
    open.push(kms)
    return kms
  }
  const stop = async (): Promise<void> => {
    for (const kms of open.splice(0)) await kms.close()
  }
  const signing = (kms: SupervisedKms, data = 'x') => kms.sign([{ key: 'a', purpose: 'delivery-signing', data: bytes(data) }])
  /** What `softhsm2-util` knows of the objects of a token: nothing but their files. */
  const objectsOf = ({ tokens }: SoftHsm): readonly string[] =>
    readdirSync(tokens, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.object') && !name.endsWith('token.object'))

  beforeEach(() => {
    place = mkdtempSync(join(tmpdir(), 'fk-token-'))
    lines = []
    pids = []
  })
  afterEach(async () => {
    await stop()
    rmSync(place, { recursive: true, force: true })
  })

  test('keys are in the token and nowhere else; destroying takes them out of it', async () => {
    const token = openSoftHsm(place)
    const kms = await start(token.backend)
    const { spki } = await kms.create('a', 'delivery-signing')
    await kms.create('kek', 'kek')
    expect(objectsOf(token)).toHaveLength(3)
    const files = readdirSync(join(place, 'kms')).toSorted()
    expect(files).toEqual(['a.token.cbor', 'kek.token.cbor', 'lock', 'namespace.cbor'])
    const [signature = new Uint8Array()] = await signing(kms)
    expect(verify('sha256', bytes('x'), createPublicKey({ key: Buffer.from(spki ?? []), format: 'der', type: 'spki' }), signature)).toBe(true)
    await kms.destroy('a')
    await kms.destroy('kek')
    expect(objectsOf(token)).toEqual([])
    expect(readdirSync(join(place, 'kms')).toSorted()).toEqual(['lock', 'namespace.cbor'])
  })

  test('what a key may sign is decided before the token is asked', async () => {
    const kms = await start(openSoftHsm(place).backend)
    await kms.create('issuing', 'issuing-ca')
    await expect(kms.sign([{ key: 'issuing', purpose: 'issuing-ca', data: caCertificate }])).rejects.toMatchObject({ reason: 'kms.content' })
    await expect(kms.sign([{ key: 'issuing', purpose: 'root-ca', data: caCertificate }])).rejects.toMatchObject({ reason: 'kms.purpose' })
    expect((await kms.describe('issuing'))?.uses).toBe(0)
  })

  test('a batch over several sessions comes back in its order; uses survive kill -9', { timeout: 60_000 }, async () => {
    const kms = await start(openSoftHsm(place).backend)
    const key = createPublicKey({ key: Buffer.from((await kms.create('a', 'delivery-signing')).spki ?? []), format: 'der', type: 'spki' })
    const sign = async (round: number): Promise<void> => {
      const batch = Array.from({ length: 60 }, (_, at) => bytes(`${round} ${at}`))
      const signatures = await kms.sign(batch.map((data) => ({ key: 'a', purpose: 'delivery-signing' as const, data })))
      for (const [at, data] of batch.entries()) expect(verify('sha256', data, key, signatures[at] ?? new Uint8Array())).toBe(true)
    }
    const working = Array.from({ length: 8 }, async (_, round) => await sign(round))
    process.kill(pids.at(-1) ?? 0, 'SIGKILL')
    await Promise.all(working)
    expect(pids).toHaveLength(2)
    expect((await kms.describe('a'))?.uses).toBeGreaterThanOrEqual(480)
  })

  test.for(['kms.namespace', 'kms.generated', 'kms.key', 'kms.uses', 'kms.ending', 'kms.destroyed'])(
    'the process is killed at %s: one key of each name, and none that was destroyed',
    { timeout: 60_000 },
    async (at) => {
      const token = openSoftHsm(place)
      let killed = false
      const kms = await startKms({
        folder: join(place, 'kms'),
        backend: token.backend,
        log: () => undefined,
        started: (pid) => void pids.push(pid),
        step(name) {
          if (name !== at || killed) return
          killed = true
          process.kill(pids.at(-1) ?? 0, 'SIGKILL')
        },
      })
      open.push(kms)
      const { spki } = await kms.create('a', 'delivery-signing')
      await kms.create('kek', 'kek')
      const [signature = new Uint8Array()] = await signing(kms)
      expect(verify('sha256', bytes('x'), createPublicKey({ key: Buffer.from(spki ?? []), format: 'der', type: 'spki' }), signature)).toBe(true)
      expect(objectsOf(token)).toHaveLength(3)
      // Whether it was done before the kill, or is done when it is asked again.
      await kms.destroy('a').catch((thrown: unknown) => expect(thrown).toMatchObject({ code: 'not-found' }))
      expect(killed).toBe(true)
      expect((await kms.list()).map(({ name }) => name)).toEqual(['kek'])
      expect(objectsOf(token)).toHaveLength(1)
    },
  )

  test('lost and back: told, then as before, without anybody doing anything', { timeout: 60_000 }, async () => {
    const { backend, tokens } = openSoftHsm(place)
    const kms = await start(backend)
    await kms.create('a', 'delivery-signing')
    await kms.create('kek', 'kek')
    const [wrapped = new Uint8Array()] = await kms.wrap([{ key: 'kek', plaintext: new Secret(bytes('s')), context: bytes('c') }])
    renameSync(tokens, `${tokens}-away`)
    const lost = { code: 'unavailable', reason: 'kms.token' }
    await expect(signing(kms)).rejects.toMatchObject(lost)
    // Not taken for a wrap of somebody else.
    await expect(kms.unwrap([{ key: 'kek', wrapped, context: bytes('c') }])).rejects.toMatchObject(lost)
    expect(kms.health()).toMatchObject({ open: false, sealed: false })
    renameSync(`${tokens}-away`, tokens)
    await until('it is back', () => kms.health().open, 30_000)
    expect(await signing(kms)).toHaveLength(1)
    expect((await kms.unwrap([{ key: 'kek', wrapped, context: bytes('c') }]))[0]?.equals(new Secret(bytes('s')))).toBe(true)
    expect(pids).toHaveLength(1)
    expect(lines.at(-1)).toBe('the KMS has its keys again')
  })

  test('lost for a moment: callers notice nothing', { timeout: 60_000 }, async () => {
    const { backend, mood } = openMoodyToken(place)
    const kms = await start(backend)
    await kms.create('a', 'delivery-signing')
    mood('fail')
    const working = Array.from({ length: 20 }, async (_, at) => await signing(kms, String(at)))
    await until('it is lost', () => lines.some((line) => line.includes('CKR_DEVICE_ERROR')))
    mood('')
    await Promise.all(working)
    await until('it is back', () => kms.health().open)
  })

  test('slow: signs as many at a time as it has sessions, and holds up nobody else', { timeout: 60_000 }, async () => {
    const { backend, mood } = openMoodyToken(place, { sessions: 4 })
    const kms = await start(backend)
    await kms.create('a', 'delivery-signing')
    await kms.create('kek', 'kek')
    const delay = 400
    mood(`delay ${delay}`)
    const started = performance.now()
    const working = kms.sign(Array.from({ length: 8 }, (_, at) => ({ key: 'a', purpose: 'delivery-signing' as const, data: bytes(String(at)) })))
    const described = await kms.describe('a')
    // Two rounds of four; and whoever asks for no signature is served at once.
    expect(performance.now() - started).toBeLessThan(delay)
    expect(described?.uses).toBe(8)
    await working
    const took = performance.now() - started
    expect(took).toBeGreaterThan(2 * delay)
    expect(took).toBeLessThan(6 * delay)
  })

  test('slow after it was quick: one signature is waited for, then they are spread again', { timeout: 60_000 }, async () => {
    const { backend, mood } = openMoodyToken(place, { sessions: 4 })
    const kms = await start(backend)
    await kms.create('a', 'delivery-signing')
    const many = async (count: number): Promise<void> =>
      void (await kms.sign(Array.from({ length: count }, (_, at) => ({ key: 'a', purpose: 'delivery-signing' as const, data: bytes(String(at)) }))))
    await many(200)
    const delay = 300
    mood(`delay ${delay}`)
    const started = performance.now()
    await many(12)
    // One alone, three rounds of four; one after the other it would be twelve.
    expect(performance.now() - started).toBeLessThan(8 * delay)
  })

  test('a wrong PIN is tried once, over restarts too; corrected, it opens', { timeout: 60_000 }, async () => {
    const { backend, pinFile, logins } = openMoodyToken(place)
    writeFileSync(pinFile, '000000\n')
    const refused = { code: 'unauthenticated', reason: 'kms.pin' }
    for (let round = 0; round < 3; round++) await expect(start(backend)).rejects.toMatchObject(refused)
    expect(logins()).toBe(1)
    writeFileSync(pinFile, `${pin}\n`)
    const kms = await start(backend)
    expect(logins()).toBe(2)
    expect(kms.health().open).toBe(true)
    expect(readdirSync(join(place, 'kms'))).not.toContain('pin-refused.cbor')
  })

  test('not there at the start: sealed, until it is put in', { timeout: 60_000 }, async () => {
    const { backend, tokens } = openSoftHsm(place)
    renameSync(tokens, `${tokens}-away`)
    const kms = await start(backend)
    expect(kms.health()).toMatchObject({ open: false, sealed: true, reason: expect.stringContaining('fleetkey') })
    await expect(kms.create('a', 'delivery-signing')).rejects.toMatchObject({ reason: 'kms.sealed' })
    renameSync(`${tokens}-away`, tokens)
    await until('it is open', () => kms.health().open, 30_000)
    await kms.create('a', 'delivery-signing')
  })

  test('another token of the same label does not take its place', { timeout: 60_000 }, async () => {
    const { backend, tokens } = openSoftHsm(place)
    await (await start(backend)).create('a', 'delivery-signing')
    await stop()
    renameSync(tokens, `${tokens}-right`)
    openSoftHsm(place)
    const kms = await start(backend)
    expect(kms.health()).toMatchObject({ sealed: true, reason: expect.stringContaining('key a is not in it') })
  })

  test('two servers share a token, each with keys of its own', async () => {
    const { backend } = openSoftHsm(place)
    const [one, other] = [await start(backend, 'one'), await start(backend, 'other')]
    const keys = [await one.create('root-ca', 'root-ca'), await other.create('root-ca', 'root-ca')]
    expect(keys[0]?.spki).not.toEqual(keys[1]?.spki)
    expect(await one.list()).toHaveLength(1)
  })

  test('a key that was brought into the token, and may have copies outside, is refused', async () => {
    const { backend } = openSoftHsm(place)
    await start(backend)
    await stop()
    const { namespace } = decode(readFileSync(join(place, 'kms', 'namespace.cbor'))) as { namespace: string }
    const file = join(place, 'foreign.pem')
    writeFileSync(file, generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey.export({ type: 'pkcs8', format: 'pem' }))
    const args = ['--import', file, '--token', backend.token, '--pin', pin, '--label', `fleetkey/${namespace}/issuing-ca/issuing-ca`, '--id', 'a1b2']
    expect(spawnSync('softhsm2-util', args, { env: { ...process.env, ...backend.variables } }).status).toBe(0)
    await expect(start(backend)).rejects.toMatchObject({ code: 'internal', reason: 'kms.tampered' })
  })

  test('keys in files stay in use beside the token, and new ones are made in it; there is no way back past it', async () => {
    const files: Backend = { kind: 'file', passphraseFile: null, keyFile: null }
    const before = await start(files)
    const old = await before.create('a', 'delivery-signing')
    await before.create('kek', 'kek')
    const [wrapped = new Uint8Array()] = await before.wrap([{ key: 'kek', plaintext: new Secret(bytes('s')), context: bytes('c') }])
    await stop()
    const { backend } = openSoftHsm(place)
    const kms = await start(backend)
    expect(await kms.create('a', 'delivery-signing')).toEqual(old)
    const fresh = await kms.create('b', 'audit-signing')
    const signatures = await kms.sign([
      { key: 'b', purpose: 'audit-signing', data: bytes('one') },
      { key: 'a', purpose: 'delivery-signing', data: bytes('two') },
      { key: 'b', purpose: 'audit-signing', data: bytes('three') },
    ])
    for (const [at, [{ spki }, data]] of (
      [
        [fresh, 'one'],
        [old, 'two'],
        [fresh, 'three'],
      ] as const
    ).entries())
      expect(verify('sha256', bytes(data), createPublicKey({ key: Buffer.from(spki ?? []), format: 'der', type: 'spki' }), signatures[at] ?? bytes(''))).toBe(
        true,
      )
    expect((await kms.unwrap([{ key: 'kek', wrapped, context: bytes('c') }]))[0]?.equals(new Secret(bytes('s')))).toBe(true)
    await stop()
    await expect(start(files)).rejects.toMatchObject({ reason: 'kms.token', message: expect.stringContaining('--kms pkcs11') })
    const again = await start(backend)
    expect((await again.list()).map(({ name, uses }) => [name, uses])).toEqual([
      ['a', 1],
      ['b', 2],
      ['kek', 1],
    ])
  })

  test('a whole server on it: a device enrols and its key is rotated; a restart finds everything there', { timeout: 120_000 }, async () => {
    const token = openSoftHsm(place)
    const world = await openWorld({ args: serverOptions(token.backend) })
    try {
      const machine = await world.simulated('GATEWAY-1')
      await world.enlist([machine], 'plant')
      await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
      await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
      const agent = world.agent(machine)
      await until('it uses its key', () => using([agent], 'telemetry', 1), 60_000)
      await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
      await until('it uses the next', () => using([agent], 'telemetry', 2), 60_000)
      expect(readdirSync(join(world.folder, 'server', 'kms')).filter((name) => name.endsWith('.key.cbor') || name === 'master.key')).toEqual([])
      expect(objectsOf(token).length).toBeGreaterThan(10)
      await world.restart()
      await until('it is back', () => agent.status().connected === true, 60_000)
    } finally {
      await world.stop()
    }
  })
})

describe.skipIf(!hasSoftHsm())('a server moves from files into a token', () => {
  test('CA and KEK, with its fleet connected; the keys in files are gone', { timeout: 240_000 }, async () => {
    const place = mkdtempSync(join(tmpdir(), 'fk-move-'))
    try {
      const options = serverOptions(openSoftHsm(place).backend)
      expect(await moveFromFiles({ options, place: 'pkcs11' })).toMatchObject({ 'root-ca-2': 'pkcs11', 'issuing-ca-2': 'pkcs11', 'kek-2': 'pkcs11' })
    } finally {
      rmSync(place, { recursive: true, force: true })
    }
  })
})
