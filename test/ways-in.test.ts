import { randomBytes } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { idevidAttester } from '@fleetkey/device-agent/attesters/idevid.ts'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import { softwareSecureElement } from '@fleetkey/device-agent/secure-element.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { createBoard, install } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeEkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { buildRelease, referenceValues, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { DeviceId, EnrolmentId, TenantId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { readMessage, signMessage } from '@fleetkey/protocol/signed.ts'
import { tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { inside, readUnsigned, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { methods } from '@fleetkey/server/attestation/methods.ts'
import { hasIdentity } from '@fleetkey/server/fleet/device.ts'
import type { Kms, Store } from '@fleetkey/server/flows/context.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { createTokens } from '@fleetkey/server/flows/enrolment-token.ts'
import { estEnrol, estReenrol, type EstRequest } from '@fleetkey/server/flows/est.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { sweepIntents } from '@fleetkey/server/flows/issue.ts'
import { liveSessions } from '@fleetkey/server/flows/sessions.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { attemptAt, byToken, softwareKeys, type ServerSide } from './enrolling.ts'
import { fakeBus, operator, station, testContext, type TestContext } from './harness.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const max = 1 << 20
const firmware = buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('gateway/1.0.0', new TextEncoder().encode('agent')))

let ctx: TestContext
let side: ServerSide
/** Serials that the issuing CA signed, and whether each had its open intent when it did. */
let signed: { readonly serial: string; readonly intended: boolean }[]
let boards: Readonly<Record<'tpm2' | 'idevid' | 'token', { readonly serial: string; readonly attester: Attester; readonly eventLog?: Uint8Array }>>

/** Devices without an agent: what they show the first time, and the certificate they have. */
let overHttp: Readonly<
  Record<
    'token' | 'idevid',
    { readonly id: string; readonly key: ReturnType<typeof newTlsKey>; readonly presented: Pick<EstRequest, 'chain' | 'basic'>; issued: Uint8Array }
  >
>

/** Serial number of a TBSCertificate; undefined for anything else that is signed. */
const serialOf = (tbs: Uint8Array): string | undefined => {
  try {
    const fields = inside(whole(tbs, tags.sequence))
    return fields.optional(0xa0) === undefined ? undefined : Buffer.from(readUnsigned(fields.next(tags.integer))).toString('hex')
  } catch {
    return undefined
  }
}

beforeEach(async () => {
  const plain = await testContext()
  signed = []
  const kms: Kms = {
    ...plain.kms,
    async sign(batch) {
      for (const { purpose, data } of batch) {
        const serial = serialOf(data)
        if (purpose !== 'issuing-ca' && purpose !== 'root-ca') expect(serial).toBeUndefined()
        else if (serial !== undefined) signed.push({ serial, intended: (await plain.store.get('intent', serial))?.state === 'open' })
      }
      return await plain.kms.sign(batch)
    },
  }
  ctx = { ...plain, kms }
  side = { ctx, handle: deviceHandler(ctx, { policy: { requireEkCertificate: true }, reportEvery: 300 }) }
  const [factory, ekCa, idevidCa] = [station(), makeEkCa(ctx.clock.now), makeIdevidCa(ctx.clock.now)]
  await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ekCa.certificate), test: true })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', idevidCa.certificate), test: true, for: 'idevid' })
  await importRelease(ctx, operator(), factory.signed(referenceValues(firmware.manifest)))
  const tpm = createSoftwareTpm({ random, now: () => ctx.clock.now })
  const ek = await personalise(tpm, ekCa, { random, now: ctx.clock.now })
  const board = createBoard({ serial: 'GW-1', tpm, flash: new Flash() })
  install(board, firmware)
  board.boot()
  const client = new Tpm(board.transport(), { random })
  const made = makeElement(idevidCa, 'SE-1', ctx.clock.now)
  const est = makeElement(idevidCa, 'SE-2', ctx.clock.now)
  const rows = [{ serial: 'GW-1', ek }, { serial: 'SE-1', idevid: made.spki }, { serial: 'PL-1' }, { serial: 'SE-2', idevid: est.spki }, { serial: 'PL-2' }]
  await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch: 'b1', model: 'gateway', station: factory.id }, rows)), format: 'json' })
  const [token, second] = await createTokens(ctx, operator(), { batch: 'b1', count: 2, life: 7 * 86_400_000 })
  const secret = new TextDecoder().decode(second?.text.bytes())
  overHttp = {
    token: { id: 'pl-2', key: newTlsKey(), presented: { chain: [], basic: { user: 'pl-2', password: secret } }, issued: new Uint8Array() },
    idevid: { id: 'se-2', key: newTlsKey(), presented: { chain: [est.certificate], basic: null }, issued: new Uint8Array() },
  }
  boards = {
    tpm2: { serial: 'GW-1', attester: tpm2Attester(await openDeviceKeys(client, await provision(client))), eventLog: board.eventLog() },
    idevid: { serial: 'SE-1', attester: idevidAttester(await softwareKeys(), softwareSecureElement(made.key, [made.certificate])) },
    token: { serial: 'PL-1', attester: await byToken(new TextDecoder().decode(token?.text.bytes())) },
  }
})
afterEach(async () => await ctx.close())

type Name = keyof typeof boards

const enrol = async (method: Name, purpose: 'enrol' | 'return' = 'enrol'): Promise<void> =>
  expect(await attemptAt(side, { ...boards[method], purpose })).toBe('admitted')

/** A new TLS key over the device's own connection. */
const renew = async (method: Name): Promise<void> => {
  const { serial, attester } = boards[method]
  const id = DeviceId.parse(serial.toLowerCase())
  const from = side.ctx.bus.connect({ client: id, device: id })
  for (let turns = 0; side.ctx.bus.sent.every(({ client }) => client !== id); turns++) {
    expect(turns).toBeLessThan(1000)
    await new Promise((resolve) => void setTimeout(resolve, 5))
  }
  const welcome = side.ctx.bus
    .take(id)
    .map((bytes) => readMessage(bytes, { max }).envelope.body)
    .find((body) => body.type === 'welcome')
  if (welcome?.type !== 'welcome') throw new Error('no welcome')
  const key = newTlsKey()
  const body = {
    type: 'renew' as const,
    session: welcome.session,
    csr: await tlsCsr(key, id),
    binding: await attester.sign(tlsBinding('plant', welcome.session, key.spki)),
  }
  await side.handle(
    from,
    await signMessage({ v: 1, tenant: TenantId.parse('plant'), device: id, from: 'device', id: random(16), seq: 1, body }, attester.signer),
  )
  expect(side.ctx.bus.take(id).map((bytes) => readMessage(bytes, { max }).envelope.body.type)).toContain('identity')
  side.ctx.bus.disconnect(from)
}

type Way = readonly [string, (() => Promise<void>)[], () => Promise<void>, number]

const enrolOverEst = async (by: keyof typeof overHttp): Promise<void> => {
  const one = overHttp[by]
  one.issued = await estEnrol(side.ctx, { ...one.presented, csr: await tlsCsr(one.key, one.id), from: '192.0.2.0/24' })
}
/** Each time for a new key. */
const renewOverEst = async (by: keyof typeof overHttp): Promise<void> => {
  const one = overHttp[by]
  one.issued = await estReenrol(side.ctx, { chain: [one.issued], basic: null, csr: await tlsCsr(newTlsKey(), one.id), from: '192.0.2.0/24' })
}
const est = (['token', 'idevid'] as const).flatMap((by): Way[] => [
  [`EST by ${by}: enrolment`, [], async () => await enrolOverEst(by), 1],
  [`EST by ${by}: enrolled again`, [async () => await enrolOverEst(by)], async () => await enrolOverEst(by), 1],
  [`EST by ${by}: renewal`, [async () => await enrolOverEst(by)], async () => await renewOverEst(by), 1],
])

/** Every way to a certificate: what was done before, the way itself, and how many certificates it gives (a return keeps the LDevID's). */
const ways: readonly Way[] = (Object.keys(methods) as Name[]).flatMap((method): Way[] => [
  [`${method}: enrolment`, [], async () => await enrol(method), 2],
  [`${method}: enrolled again`, [async () => await enrol(method)], async () => await enrol(method), 2],
  [`${method}: return with known keys`, [async () => await enrol(method)], async () => await enrol(method, 'return'), 1],
  [`${method}: renewal`, [async () => await enrol(method)], async () => await renew(method), 1],
])
const everyWay: readonly Way[] = [...ways, ...est]

// A constant nonce was hidden by the comment that silenced its linter: one quote was good for ever.
describe('Keylime CVE-2026-6420: what a device proves itself over is new each time, and good once', () => {
  const many = process.env['FLEETKEY_LONG'] === '1' ? 10_000 : 200

  test.each(['tpm2', 'idevid', 'token'] as const)(`%s, ${many} challenges`, { timeout: 300_000 }, async (method) => {
    const { attester, serial } = boards[method]
    const hello = await attester.hello({ serial, purpose: 'enrol', random: random(32), agent: 'test' })
    const parts: Uint8Array[] = []
    for (let at = 0; at < many; at++) {
      const client = EnrolmentId.parse(`e-${randomBytes(16).toString('hex')}`)
      const from = ctx.bus.connect({ client })
      const envelope = { v: 1 as const, tenant: TenantId.parse('plant'), device: client, from: 'device' as const, id: random(16), seq: 1, body: hello }
      await side.handle(from, await signMessage(envelope, attester.signer))
      const [bytes] = ctx.bus.take(client)
      const { body } = readMessage(bytes ?? new Uint8Array(), { max }).envelope
      if (body.type !== 'challenge') throw new Error(`answered by ${body.type}`)
      expect([body.random.length, body.challenge.length]).toEqual([32, 16])
      parts.push(body.random, body.challenge)
      if (body.demanded.method === 'tpm2') parts.push(body.demanded.credential.blob, body.demanded.credential.secret)
      ctx.bus.disconnect(from)
    }
    expect(new Set(parts.map((part) => Buffer.from(part).toString('hex'))).size).toBe(parts.length)
    // Not one bit of them stands still: each is set in about half.
    const randoms = parts.filter((part) => part.length === 32)
    for (let bit = 0; bit < 256; bit++) {
      const set = randoms.filter((part) => (((part[bit >> 3] ?? 0) >> (bit & 7)) & 1) === 1).length
      expect(set).toBeGreaterThan(randoms.length * 0.2)
      expect(set).toBeLessThan(randoms.length * 0.8)
    }
  })

  test.each(['tpm2', 'idevid', 'token'] as const)('%s, answered twice', async (method) => {
    const { serial } = boards[method]
    let again: (() => Promise<void>) | undefined
    const heard: string[] = []
    const handle: ServerSide['handle'] = async (from, bytes) => {
      await side.handle(from, bytes)
      again = async () => {
        await side.handle(from, bytes)
        heard.push(...ctx.bus.take(from.client).map((answer) => readMessage(answer, { max }).envelope.body.type))
      }
    }
    expect(await attemptAt({ ctx, handle }, boards[method])).toBe('admitted')
    const before = await ctx.store.count('certificate')
    const fresh = signed.length
    for (let times = 0; times < 3; times++) await again?.()
    // The same answer, or none: nothing is proven by it a second time, and nothing issued.
    expect(heard.every((type) => type === 'refusal' || type === 'identity')).toBe(true)
    expect([await ctx.store.count('certificate'), signed.length]).toEqual([before, fresh])
    expect((await ctx.store.get('device', DeviceId.parse(serial.toLowerCase())))?.state).toBe('enrolled')
  })
})

describe('every certificate had its intent before it was signed, by way', () => {
  test.each(everyWay)('%s', async (_name, before, way, certificates) => {
    for (const step of before) await step()
    const [known, steps] = [await ctx.store.find('certificate', { limit: 1000 }), ctx.steps.length]
    signed.length = 0
    await way()
    const issued = (await ctx.store.find('certificate', { limit: 1000 })).filter(({ id }) => known.every((one) => one.id !== id))
    expect(issued).toHaveLength(certificates)
    // I6 while it happens: at each signature the row was there, open; what was signed is what was recorded, nothing else.
    expect(signed.map(({ intended }) => intended)).toEqual(issued.map(() => true))
    expect(signed.map(({ serial }) => serial).toSorted()).toEqual(issued.map(({ id }) => id).toSorted())
    for (const { id } of issued) expect((await ctx.store.get('intent', id))?.state).toBe('issued')
    // The one issuing function announces both of its steps, in this order.
    expect(ctx.steps.slice(steps).filter((step) => step.startsWith('issue.'))).toEqual(['issue.intended', 'issue.signed'])
  })

  test.each(everyWay)('%s: nothing is signed when the intent cannot be written', async (_name, before, way) => {
    for (const step of before) await step()
    signed.length = 0
    const { store } = ctx
    const broken: TestContext = {
      ...ctx,
      store: {
        ...store,
        commit: async (changes, options) => {
          if (changes.writes.some(({ table }) => table === 'intent')) throw new Error('the disk is full')
          return await store.commit(changes, options)
        },
      },
    }
    side = { ctx: broken, handle: deviceHandler(broken, { policy: { requireEkCertificate: true }, reportEvery: 300 }) }
    await expect(way()).rejects.toThrow()
    expect(signed).toEqual([])
  })
})

describe('a disk that fails at each write of a way in: nothing is answered that is not durable, nothing signed is left unrecorded', () => {
  /** A store whose commit of this number fails: before anything was written, or after all of it. */
  const failing = (at: number, when: 'before' | 'after'): { readonly ctx: TestContext; readonly hit: () => boolean } => {
    const { store } = ctx
    let [commits, hit] = [0, false]
    const commit: Store['commit'] = async (changes, options) => {
      const isIt = ++commits === at
      hit ||= isIt
      if (isIt && when === 'before') throw new Problem('unavailable', 'the disk is gone')
      const verdict = await store.commit(changes, options)
      if (isIt) throw new Problem('unavailable', 'the disk is gone')
      return verdict
    }
    // A bus of its own: the handlers of earlier attempts are not among its listeners.
    return { ctx: { ...ctx, store: { ...store, commit }, bus: fakeBus(), sessions: liveSessions() }, hit: () => hit }
  }
  const certificates = async (): Promise<readonly string[]> => (await ctx.store.find('certificate', { limit: 1000 })).map(({ id }) => id)

  /** Tries the way with its first write failing, then its second, …, until all have. How many there were. */
  const eachWrite = async (way: () => Promise<void>, when: 'before' | 'after'): Promise<number> => {
    const whole = side
    for (let at = 1; ; at++) {
      const broken = failing(at, when)
      side = { ctx: broken.ctx, handle: deviceHandler(broken.ctx, { policy: { requireEkCertificate: true }, reportEvery: 300 }) }
      signed.length = 0
      const before = await certificates()
      const done = await way().then(
        () => true,
        () => false,
      )
      side = whole
      const fresh = (await certificates()).filter((id) => before.every((one) => one !== id))
      // Whatever was signed stands as an intent: it can be found, and revoked.
      for (const { serial } of signed) expect(await ctx.store.get('intent', serial)).toBeDefined()
      // Whoever was answered has what is on record.
      if (done) expect(fresh.toSorted()).toEqual(signed.map(({ serial }) => serial).toSorted())
      // A certificate is on record with the device that it is for, or not at all.
      for (const id of fresh) {
        const device = (await ctx.store.get('certificate', id))?.device
        const row = await ctx.store.get('device', device ?? '')
        expect(hasIdentity(row) && [row.tlsSerial, row.ldevidSerial]).toContain(id)
        expect((await ctx.store.get('intent', id))?.state).toBe('issued')
      }
      if (!broken.hit()) {
        expect(done).toBe(true)
        return at - 1
      }
      // Pauses between attempts that gave certificates which were never used.
      ctx.clock.now += 3_600_000
    }
  }
  const modes = process.env['FLEETKEY_LONG'] === '1' ? (['before', 'after'] as const) : (['before'] as const)
  test.each(everyWay.flatMap(([name, before, way]) => modes.map((when) => [name, when, before, way] as const)))('%s, %s', async (_name, when, before, way) => {
    for (const step of before) await step()
    expect(await eachWrite(way, when)).toBeGreaterThanOrEqual(2)
    await sweepIntents(ctx)
    expect(await ctx.store.find('intent', { where: { unissued: 'open' }, limit: 10 })).toEqual([])
  })
})

describe('there is one place that signs certificates', () => {
  const root = fileURLToPath(new URL('..', import.meta.url))
  const sources = (folder: string): string[] =>
    readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
      const path = `${folder}/${entry.name}`
      if (entry.isDirectory()) return sources(path)
      return entry.name.endsWith('.ts') && !entry.name.endsWith('.test.ts') ? [path] : []
    })
  const where = (pattern: RegExp): string[] => sources('server').filter((path) => pattern.test(readFileSync(join(root, path), 'utf8')))

  const places: readonly (readonly [string, RegExp, readonly string[]])[] = [
    // Besides the template, the check of the profiles signs what it writes with a key of its own, at every start; a sealed server signs itself, under no CA.
    ['writes a TBSCertificate', /import \{[^}]*\btbsOf\b[^}]*\}/, ['server/ca/check-profiles.ts', 'server/ca/template.ts', 'server/sealing.ts']],
    ['has one written', /import \{[^}]*\bwriteClean\b[^}]*\}/, ['server/flows/issue.ts']],
    [
      'joins it with a signature',
      /import \{[^}]*\bcertificateOf\b[^}]*\} from '[^']*\/tbs\.ts'/,
      ['server/ca/check-profiles.ts', 'server/flows/issue.ts', 'server/sealing.ts'],
    ],
    ['adds a certificate to the store', /insert\('certificate'/, ['server/flows/issue.ts']],
    [
      'asks the KMS to sign',
      /\bkms\.sign\(/,
      [
        'server/api/admin/handlers.ts',
        'server/flows/issue.ts',
        'server/flows/message.ts',
        'server/flows/ocsp.ts',
        'server/flows/status-lists.ts',
        'server/kms/process.ts',
      ],
    ],
    [
      'orders certificates',
      /\bprepareCertificates\(/,
      [
        'server/flows/authority.ts',
        'server/flows/enrol.ts',
        'server/flows/est.ts',
        'server/flows/ocsp.ts',
        'server/flows/own-certificates.ts',
        'server/flows/renew.ts',
        'server/flows/station-certificate.ts',
      ],
    ],
  ]
  test.each(places)('%s', (_what, pattern, expected) => expect(where(pattern).toSorted()).toEqual(expected))

  test('and every method of the table leads through the same enrolment', () => {
    const flows = where(/\bmethods\b.*from '.*attestation\/methods\.ts'|\bmethodOf\b.*from '.*attestation\/methods\.ts'/)
    expect(flows.toSorted()).toEqual(['server/api/device.ts', 'server/flows/enrol.ts'])
  })
})
