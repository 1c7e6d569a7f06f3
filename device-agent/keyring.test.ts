import { createHmac } from 'node:crypto'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { sealedProof, tpmProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import { describe, expect, test } from 'vitest'
import { openAtRest } from './at-rest.ts'
import type { HeldKey } from './core.ts'
import { openDocument } from './files.ts'
import { openKeyring, type Keyring } from './keyring.ts'
import { filePowerFailingAt, FilePowerLost, memoryFileSystem, type MemoryFileSystem } from './memory-filesystem.ts'
import { random, testDevice } from './test-keys.ts'

const storage = random(32)
const home = testDevice()
const folder = '/data'
const nonce = new Uint8Array(16).fill(3)
const take = (epoch: number) => ({ key: 'site', epoch, nonce, campaign: 'c-1' })

interface Opened {
  readonly ring: Keyring
  readonly losses: readonly string[]
  readonly steps: readonly string[]
}
const open = async (files: MemoryFileSystem, of: { readonly storage?: Uint8Array; readonly device?: string } = {}): Promise<Opened> => {
  const losses: string[] = []
  const steps: string[] = []
  const step = (name: string): void => void steps.push(name)
  const onLoss = (why: string): void => void losses.push(why)
  const ring = await openKeyring({
    document: openDocument({ files, folder, name: 'keyring', step, onDamage: onLoss }),
    storage: new Secret(of.storage ?? storage),
    tpm: home.tpm,
    tenant: home.tenant,
    device: of.device ?? home.device,
    random,
    step,
    onLoss,
  })
  return { ring, losses, steps }
}

/** All that a keyring would answer. */
const stateOf = async (ring: Keyring) => ({
  time: ring.time,
  held: ring.held(),
  owed: ring.owed(),
  keys: await Promise.all(
    ring.held().flatMap(({ key, protection, epochs }) =>
      epochs.map(async ({ epoch }) => ({
        key,
        epoch,
        bytes: Buffer.from(protection === 'sealed' ? ring.material(key, epoch).secret.bytes() : (await ring.mac(key, nonce, epoch)).mac).toString('hex'),
      })),
    ),
  ),
})

const problemOf = async (running: Promise<unknown>): Promise<string> =>
  await running.then(
    () => 'nothing thrown',
    (thrown: unknown) => (thrown instanceof Problem ? `${thrown.code} ${thrown.reason ?? ''}` : String(thrown)),
  )

const secrets = { one: random(32), two: random(32), mac: random(32) }
const one = home.delivery(1, { secret: secrets.one })
const two = home.delivery(2, { secret: secrets.two })
const mac = home.delivery(1, { secret: secrets.mac, protection: 'tpm', key: KeyId.parse('meter') })

/** Epoch 1 in use, epoch 2 installed, a MAC key in use. */
const furnish = async (ring: Keyring): Promise<void> => {
  await ring.install(one)
  await ring.use(take(1))
  await ring.settle('site', 1)
  await ring.install(two)
  await ring.install(mac)
  await ring.use({ ...take(1), key: 'meter' })
  await ring.settle('meter', 1)
}

interface Change {
  readonly name: string
  readonly before?: (ring: Keyring) => Promise<unknown>
  readonly change: (ring: Keyring) => Promise<unknown>
}
const changes: readonly Change[] = [
  { name: 'install of another epoch', change: async (ring) => await ring.install(home.delivery(3, { secret: secrets.one })) },
  { name: 'install of the first epoch of a key', change: async (ring) => await ring.install(home.delivery(1, { key: KeyId.parse('new') })) },
  { name: 'install of a MAC key', change: async (ring) => await ring.install(home.delivery(2, { protection: 'tpm', key: KeyId.parse('meter') })) },
  { name: 'use', change: async (ring) => await ring.use(take(2)) },
  { name: 'settle', before: async (ring) => await ring.use(take(2)), change: async (ring) => await ring.settle('site', 2) },
  { name: 'erase of older epochs', before: async (ring) => await ring.use(take(2)), change: async (ring) => await ring.erase('site', 2, nonce) },
  { name: 'erase of all epochs', change: async (ring) => await ring.erase('site', null, nonce) },
  { name: 'time', change: async (ring) => await ring.setTime(1_800_000_000_000) },
]

/** Every sealed key in every copy of the keyring that is on the medium, as KEY/EPOCH. */
const onMedium = (files: MemoryFileSystem): readonly string[] => {
  const head = 4 + 8 + 32
  return [...files.contents().values()].flatMap((file) => {
    try {
      const plain = openAtRest(new Secret(storage), file.subarray(head), { tenant: home.tenant, device: home.device, key: '', epoch: 0, kind: 'keyring' })
      const { keys } = decode(plain.bytes()) as { keys: readonly HeldKey[] }
      return keys.flatMap(({ key, epochs }) => epochs.map(({ epoch }) => `${key}/${epoch}`))
    } catch {
      // Half a file, cut while it was written: it opens for nobody.
      return []
    }
  })
}
const expectNoPlainKeys = (files: MemoryFileSystem): void => {
  for (const [path, bytes] of files.contents())
    for (const [name, secret] of Object.entries(secrets))
      for (const form of [Buffer.from(secret), Buffer.from(secret.toHex()), Buffer.from(secret.toBase64())])
        expect([path, name, Buffer.from(bytes).includes(form)]).toEqual([path, name, false])
}

describe('a power cut at every change of the medium', () => {
  const cases = changes.flatMap((change) => [false, true].map((keep) => ({ ...change, keep })))
  test.each(cases)('$name (what was not synced is kept: $keep)', async ({ before, change, keep }) => {
    let cuts = 0
    for (let at = 0; ; at += 1) {
      const files = memoryFileSystem()
      const { ring } = await open(files)
      await furnish(ring)
      await before?.(ring)
      const old = await stateOf(ring)

      files.powerCycle({ power: filePowerFailingAt(at) })
      const { ring: running } = await open(files)
      expect(await stateOf(running)).toEqual(old)
      const cut = await change(running).then(
        () => false,
        (thrown: unknown) => thrown instanceof FilePowerLost,
      )
      // Memory never runs ahead of the medium.
      if (cut) expect(await stateOf(running)).toEqual(old)
      const made = await stateOf(running)
      files.powerCycle({ keep })
      const { ring: reopened, losses } = await open(files)
      expect(losses).toEqual([])
      expectNoPlainKeys(files)
      const found = await stateOf(reopened)
      if (!cut) {
        expect(found).toEqual(made)
        break
      }
      cuts += 1

      // The change again, now to its end: what there is after the cut is what was before it, or this.
      await change(reopened)
      const after = await stateOf(reopened)
      expect([old, after]).toContainEqual(found)
      const highest = (state: typeof old): number => Math.max(0, ...state.held.map(({ floor }) => floor))
      expect(highest(found)).toBeGreaterThanOrEqual(highest(old))
      expect(await stateOf((await open(files)).ring)).toEqual(after)
    }
    expect(cuts).toBeGreaterThanOrEqual(3)
  })

  test('what was erased is in no copy, even when a cut came between the two', async () => {
    for (let at = 0; at < 12; at += 1) {
      const files = memoryFileSystem()
      const { ring } = await open(files)
      await furnish(ring)
      await ring.use(take(2))
      files.powerCycle({ power: filePowerFailingAt(at) })
      await (await open(files)).ring.erase('site', 2, nonce).catch(() => undefined)
      files.powerCycle()
      const { ring: reopened } = await open(files)
      await reopened.erase('site', 2, nonce)
      expect(onMedium(files).filter((name) => name.startsWith('site/'))).toEqual(['site/2', 'site/2'])
      await reopened.erase('site', null, nonce)
      expect(onMedium(files).filter((name) => name.startsWith('site/'))).toEqual([])
      expect(onMedium(files)).toEqual(['meter/1', 'meter/1'])
    }
  })
})

describe('damage of the medium', () => {
  const slots = ['/data/keyring.a', '/data/keyring.b'] as const
  const damages: readonly (readonly [string, (bytes: Uint8Array) => Uint8Array])[] = [
    ['the mark', (bytes) => bytes.with(0, (bytes[0] ?? 0) ^ 1)],
    ['the sequence', (bytes) => bytes.with(5, 0x7f)],
    ['the checksum', (bytes) => bytes.with(20, (bytes[20] ?? 0) ^ 1)],
    ['one bit of the content', (bytes) => bytes.with(bytes.length - 1, (bytes.at(-1) ?? 0) ^ 1)],
    ['the end', (bytes) => bytes.subarray(0, -1)],
    ['nearly all', (bytes) => bytes.subarray(0, 10)],
    ['all', () => new Uint8Array(0)],
    ['zeros', (bytes) => new Uint8Array(bytes.length)],
    ['more than fits', () => new Uint8Array((8 << 20) + 1)],
  ]
  /** The state before the last change, the one after it, and the medium with both. */
  const prepared = async () => {
    const files = memoryFileSystem()
    const { ring } = await open(files)
    await furnish(ring)
    const older = await stateOf(ring)
    await ring.use(take(2))
    return { files, older, newest: await stateOf(ring) }
  }

  test.each(damages)('%s of one copy: the other one serves', async (_name, damage) => {
    const found: number[] = []
    for (const slot of slots) {
      const { files, older, newest } = await prepared()
      await files.write(slot, damage((await files.read(slot)) ?? new Uint8Array(0)), { mode: 0o600 })
      const { ring, losses } = await open(files)
      expect(losses).toEqual([])
      const state = await stateOf(ring)
      expect([older, newest]).toContainEqual(state)
      found.push(state.held.find(({ key }) => key === 'site')?.current ?? 0)
      // The next change mends the damaged copy, and is there after a restart.
      await ring.use(take(2))
      expect((await open(files)).ring.heldOf('site')?.current).toBe(2)
    }
    expect(found.toSorted((one, other) => (one ?? 0) - (other ?? 0))).toEqual([1, 2])
  })

  test.each(damages)('%s of both copies: said aloud, and the keys can be delivered anew', async (_name, damage) => {
    const { files } = await prepared()
    for (const slot of slots) await files.write(slot, damage((await files.read(slot)) ?? new Uint8Array(0)), { mode: 0o600 })
    const { ring, losses } = await open(files)
    expect([ring.held(), losses]).toEqual([[], ['no copy of /data/keyring is whole']])
    await ring.install(two)
    expect((await open(files)).ring.heldOf('site')?.epochs).toEqual([{ epoch: 2, stage: 'installed', readOnly: false }])
  })

  test('a new device has nothing, and nothing is said', async () => {
    const { ring, losses } = await open(memoryFileSystem())
    expect([ring.held(), losses]).toEqual([[], []])
  })

  test.each([
    ['another storage key', { storage: random(32) }],
    ['another device', { device: 'd-2' }],
  ])('the keyring of %s does not open', async (_name, other) => {
    const { files } = await prepared()
    const { ring, losses } = await open(files, other)
    expect([ring.held(), losses]).toEqual([[], ['keyring at rest does not open']])
  })

  test('a full medium: the change fails, nothing has changed, and it works once there is room', async () => {
    const files = memoryFileSystem()
    const { ring: furnished } = await open(files)
    await furnish(furnished)
    let full = true
    const cramped: MemoryFileSystem = {
      ...files,
      write: async (...args) => {
        if (full) throw Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' })
        await files.write(...args)
      },
    }
    const { ring } = await open(cramped)
    const before = await stateOf(ring)
    for (const { change, before: first } of changes) if (first === undefined) await expect(change(ring)).rejects.toThrow('ENOSPC')
    expect(await stateOf(ring)).toEqual(before)
    full = false
    await ring.use(take(2))
    expect((await open(files)).ring.heldOf('site')?.current).toBe(2)
  })
})

describe('deliveries', () => {
  const refused: readonly (readonly [string, BodyOf<'delivery'>, string])[] = [
    ['wrapped for another device', home.delivery(3, { context: { device: 'd-2' } }), 'unauthenticated wrap.open'],
    ['wrapped for another tenant', home.delivery(3, { context: { tenant: 'other' } }), 'unauthenticated wrap.open'],
    ['wrapped as another key', home.delivery(3, { context: { key: 'other' } }), 'unauthenticated wrap.open'],
    ['wrapped as another epoch', home.delivery(3, { context: { epoch: 2 } }), 'unauthenticated wrap.open'],
    ['wrapped as an inner wrapper', home.delivery(3, { context: { purpose: 'inner' } }), 'unauthenticated wrap.open'],
    ['wrapped to another recipient key', testDevice().delivery(3), 'unauthenticated wrap.open'],
    ['a key that is too short', home.delivery(3, { secret: random(16) }), 'malformed key.length'],
    ['not wrapped at all', home.delivery(3, { wrapped: { protection: 'sealed', sealed: random(64) } }), 'malformed wrap.tag'],
    ['an older epoch for writing', home.delivery(1, { key: KeyId.parse('late') }), 'conflict epoch.lower'],
  ]
  test.each(refused)('%s: refused, and nothing has changed', async (_name, delivery, want) => {
    const files = memoryFileSystem()
    const { ring } = await open(files)
    await furnish(ring)
    await ring.install(home.delivery(7, { key: KeyId.parse('late') }))
    await ring.use({ ...take(7), key: 'late' })
    const [before, medium] = [await stateOf(ring), [...files.contents()]]
    const problem = await problemOf(ring.install(delivery))
    // Random bytes may begin like a COSE_Encrypt0.
    expect(delivery.wrapped.sealed.length === 64 ? problem.slice(0, 9) : problem).toBe(delivery.wrapped.sealed.length === 64 ? 'malformed' : want)
    expect([await stateOf(ring), [...files.contents()]]).toEqual([before, medium])
  })

  test('the same delivery twice is one epoch, changes at the same time come one after the other', async () => {
    const files = memoryFileSystem()
    const { ring } = await open(files)
    await Promise.all([ring.install(one), ring.install(one), ring.install(two), ring.install(mac), ring.use(take(1)), ring.use(take(2))])
    expect(ring.heldOf('site')).toMatchObject({
      current: 2,
      floor: 2,
      epochs: [
        { epoch: 1, readOnly: true },
        { epoch: 2, readOnly: false },
      ],
    })
    expect(await stateOf((await open(files)).ring)).toEqual(await stateOf(ring))
  })

  test('acknowledged only when durable: the step comes after the last sync', async () => {
    const { ring, steps } = await open(memoryFileSystem())
    await ring.install(one)
    expect(steps).toEqual(['keyring.written', 'keyring.renamed', 'keyring.durable', 'key.installed'])
  })
})

describe('use', () => {
  test('never goes back, not even after a withdrawal', async () => {
    const { ring } = await open(memoryFileSystem())
    await furnish(ring)
    await ring.use(take(2))
    expect(await problemOf(ring.use(take(1)))).toBe('conflict epoch.lower')
    expect(await problemOf(ring.use(take(9)))).toBe('not-found epoch.not-held')
    expect(await problemOf(ring.use({ ...take(1), key: 'none' }))).toBe('not-found key.not-held')
    await ring.erase('site', null, nonce)
    expect(await problemOf(ring.install(one))).toBe('conflict epoch.lower')
    await ring.install({ ...one, readOnly: true })
    expect(await problemOf(ring.use(take(1)))).toBe('conflict epoch.lower')
    expect(() => ring.material('site')).toThrow('no epoch of site is in use yet')
  })

  test('the epoch in use is never erased from under its consumers', async () => {
    const { ring } = await open(memoryFileSystem())
    await furnish(ring)
    expect(await problemOf(ring.erase('site', 2, nonce))).toBe('conflict epoch.in-use')
    expect(await ring.erase('none', 2, nonce)).toBeUndefined()
  })

  test('what the consumers have not confirmed is owed, also after a restart', async () => {
    const files = memoryFileSystem()
    const { ring } = await open(files)
    await furnish(ring)
    await ring.use(take(2))
    expect((await open(files)).ring.owed()).toEqual([{ type: 'take', key: 'site', epoch: 2, nonce, campaign: 'c-1' }])
    await ring.settle('site', 2)
    expect((await open(files)).ring.owed()).toEqual([])
  })

  test('erased key bytes are gone from memory, all of them after close', async () => {
    const { ring } = await open(memoryFileSystem())
    await furnish(ring)
    await ring.use(take(2))
    const [erased, live] = [ring.material('site', 1).secret, ring.material('site', 2).secret]
    await ring.erase('site', 2, nonce)
    expect([erased.bytes(), live.bytes()]).toEqual([new Uint8Array(32), secrets.two])
    ring.close()
    expect([live.bytes(), ring.held()]).toEqual([new Uint8Array(32), []])
  })

  test('withdrawals are remembered once each, the last eight of them', async () => {
    const { ring } = await open(memoryFileSystem())
    await furnish(ring)
    for (const value of [1, 2, 3, 3, 3, 4, 5, 6, 7, 8, 9]) await ring.erase('site', null, new Uint8Array(16).fill(value))
    expect(ring.heldOf('site')?.withdrawals.map((hex) => Number.parseInt(hex.slice(0, 2), 16))).toEqual([2, 3, 4, 5, 6, 7, 8, 9])
  })

  test('the time only grows', async () => {
    const files = memoryFileSystem()
    const { ring } = await open(files)
    for (const at of [5_000, 4_000, 6_000, 0]) await ring.setTime(at)
    expect((await open(files)).ring.time).toBe(6_000)
  })
})

describe('proofs', () => {
  test('are those that the server computes from its copy', async () => {
    const { ring } = await open(memoryFileSystem())
    await furnish(ring)
    const transcript = (key: string, epoch: number) => useTranscript({ tenant: home.tenant, device: home.device, key, epoch, nonce })
    expect(await ring.proof('site', 2, nonce)).toEqual(sealedProof(new Secret(secrets.two), transcript('site', 2)))
    expect(Buffer.from(await ring.proof('meter', 1, nonce))).toEqual(tpmProof(new Secret(secrets.mac), transcript('meter', 1)))
    expect(await ring.proof('site', 2, nonce)).not.toEqual(await ring.proof('site', 1, nonce))
  })

  test('a MAC for applications is over their own prefix; encryption keys make none, MAC keys are not given out', async () => {
    const { ring } = await open(memoryFileSystem())
    await furnish(ring)
    const want = new Uint8Array(createHmac('sha256', secrets.mac).update('fleetkey/1 app\0').update(nonce).digest())
    expect(await ring.mac('meter', nonce)).toEqual({ epoch: 1, mac: want })
    const of = { key: 'meter', epoch: 1, data: nonce, mac: want }
    expect(await ring.verify(of)).toBe(true)
    for (const wrong of [want.with(0, (want[0] ?? 0) ^ 1), want.subarray(1), new Uint8Array(0)]) expect(await ring.verify({ ...of, mac: wrong })).toBe(false)
    expect(await problemOf(ring.mac('site', nonce))).toBe('unsupported key.algorithm')
    expect(() => ring.material('meter')).toThrow('meter never leaves the TPM')
  })
})
