import { createHash, createHmac, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { chunkFrameMax, split } from '@fleetkey/protocol/chunks.ts'
import { DeviceId, Epoch, KeyId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body, BodyOf, Envelope } from '@fleetkey/protocol/messages.ts'
import { keyId, readMessage, signMessage, type Signer } from '@fleetkey/protocol/signed.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { hasIdentity, type EnrolledDevice } from '@fleetkey/server/fleet/device.ts'
import type { DeviceRef } from '@fleetkey/server/flows/context.ts'
import { anEntry } from './conformance/store.ts'
import { storeContacts } from '@fleetkey/server/flows/contacts.ts'
import { firmwareOf } from '@fleetkey/server/flows/approvals.ts'
import { underPolicy } from '@fleetkey/tpm2/firmware.ts'
import { marshalPublic } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { testContext, type TestContext } from './harness.ts'

const max = 4 << 20
const signerOf = () => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const signer: Signer = { kid: keyId(spki), sign: async (tbs) => new Uint8Array(sign('sha256', tbs, { key: privateKey, dsaEncoding: 'ieee-p1363' })) }
  return { spki, signer }
}

const enrolled = (id: string, ldevidSpki: Uint8Array, authPolicy: Uint8Array): EnrolledDevice => ({
  id: DeviceId.parse(id),
  version: 0,
  state: 'enrolled',
  serial: id.toUpperCase(),
  model: 'gateway',
  batch: 'b1',
  registeredAt: 1,
  lastRefusal: null,
  keys: {
    ekHash: createHash('sha256').update(id).digest('hex'),
    ak: randomBytes(8),
    srk: randomBytes(8),
    ldevid: randomBytes(8),
    recipient: marshalPublic(underPolicy({ ...templates.recipient, x: randomBytes(32), y: randomBytes(32) }, authPolicy)),
    ldevidSpki,
  },
  enrolledAt: 1,
  ldevidSerial: '01',
  tlsSerial: '02',
  previousTlsSerial: null,
  resetCount: 1,
  reportedResetCount: 1,
  release: 'gateway/1.0.0',
  floor: 1,
  assurance: 'simulated',
  verdict: { verdict: 'affirming', reason: 'release.current', detail: '', release: 'gateway/1.0.0', at: Date.UTC(2027, 0, 1), claims: [] },
  attestOrderedAt: null,
  lastSeenAt: 1,
  agent: 'test',
})

const own = signerOf()
const stranger = signerOf()
let ctx: TestContext
let handle: (from: DeviceRef, bytes: Uint8Array) => Promise<void>
let from: DeviceRef
let session: Uint8Array
let sequence: number

beforeEach(async () => {
  ctx = await testContext()
  handle = deviceHandler(ctx, { policy: { requireEkCertificate: false }, reportEvery: 300 })
  const { authPolicy } = await firmwareOf(ctx, 'gateway')
  const rows = [enrolled('gw-1', own.spki, authPolicy), enrolled('gw-2', stranger.spki, authPolicy)]
  await ctx.store.commit({ writes: rows.map((row) => ({ table: 'device', do: 'insert', row })), entries: [anEntry()] })
  from = ctx.bus.connect({ client: 'gw-1', device: 'gw-1' })
  await expect.poll(() => ctx.bus.sent.length).toBe(2)
  const [welcome, approvals] = ctx.bus.take('gw-1')
  expect(readMessage(approvals ?? new Uint8Array(), { max }).envelope.body.type).toBe('approvals')
  session = (readMessage(welcome ?? new Uint8Array(), { max }).envelope.body as BodyOf<'welcome'>).session
  sequence = 0
})
afterEach(async () => await ctx.close())

const envelope = (body: unknown, of: Partial<Envelope> = {}): Envelope =>
  ({ v: 1, tenant: TenantId.parse('plant'), device: DeviceId.parse('gw-1'), from: 'device', id: randomBytes(16), seq: 1, body, ...of }) as Envelope
const report = (of: Partial<BodyOf<'report'>> = {}): Body => ({
  type: 'report',
  session,
  sequence: ++sequence,
  holdings: [],
  usage: [],
  resetCount: 1,
  tlsNotAfter: 1,
  places: [],
  trust: null,
  agent: 'test',
  ...of,
})
const acknowledgement = (of: Partial<BodyOf<'acknowledge'>> = {}): Body =>
  ({
    type: 'acknowledge',
    key: KeyId.parse('telemetry'),
    epoch: Epoch.parse(1),
    stage: 'installed',
    nonce: new Uint8Array(16),
    campaign: null,
    proof: null,
    reason: null,
    ...of,
  }) as Body

/** Public codes of the refusals that the device was sent. */
const answered = (client = 'gw-1'): string[] =>
  ctx.bus.take(client).flatMap((bytes) => {
    const { body } = readMessage(bytes, { max }).envelope
    return body.type === 'refusal' ? [body.code] : []
  })
const lastEntry = async (): Promise<{ outcome: string; code: string | null; detail: string } | undefined> => (await ctx.entries()).at(-1)

type Case = readonly [string, () => Promise<Uint8Array>, string, string]
const cases: readonly Case[] = [
  ['nothing', async () => new Uint8Array(0), 'malformed', 'cose.tag'],
  ['random bytes', async () => randomBytes(300), 'malformed', 'cose.tag'],
  ['a message that ends early', async () => (await signMessage(envelope(report()), own.signer)).subarray(0, 60), 'malformed', 'cbor.invalid'],
  ['bytes after the message', async () => Buffer.concat([await signMessage(envelope(report()), own.signer), Buffer.from([0])]), 'malformed', 'cbor.invalid'],
  ['more than one frame without frames', async () => new Uint8Array(chunkFrameMax + 1).fill(0xd2), 'malformed', 'message.size'],
  [
    'CBOR that is not deterministic',
    async () => {
      const message = Buffer.from(await signMessage(envelope(report()), own.signer))
      // The array of four, with its length in two bytes.
      return Buffer.concat([message.subarray(0, 1), Buffer.from([0x98, 4]), message.subarray(2)])
    },
    'malformed',
    'cbor',
  ],
  ['signed by another device', async () => await signMessage(envelope(report()), stranger.signer), 'unauthenticated', 'message.kid'],
  [
    'a signature that does not verify',
    async () => await signMessage(envelope(report()), { kid: own.signer.kid, sign: stranger.signer.sign }),
    'unauthenticated',
    'message.signature',
  ],
  ...([7, 5, -8, 0] as const).map((alg): Case => [
    // The algorithm was taken from the message, and a public key for the secret of an HMAC.
    `node-jws GHSA-869p-cjfg-cm3x: under the algorithm ${alg}, keyed with its own public key`,
    async () => {
      const protectedHeader = encode(
        new Map<number, unknown>([
          [1, alg],
          [4, own.signer.kid],
        ]),
      )
      const payload = encode(envelope(report()))
      const tag = createHmac('sha512', own.spki)
        .update(encode(['Signature1', protectedHeader, new Uint8Array(0), payload]))
        .digest()
      return Buffer.concat([Uint8Array.of(0xd2), encode([protectedHeader, {}, payload, new Uint8Array(tag)])])
    },
    'unsupported',
    'cose.algorithm',
  ]),
  [
    'in the name of another device',
    async () => await signMessage(envelope(report(), { device: DeviceId.parse('gw-2') }), own.signer),
    'forbidden',
    'message.device',
  ],
  ['of another tenant', async () => await signMessage(envelope(report(), { tenant: TenantId.parse('other') }), own.signer), 'forbidden', 'message.tenant'],
  ['of an unknown type', async () => await signMessage(envelope({ type: 'dance' }), own.signer), 'unsupported', 'message.type'],
  ['of another version', async () => await signMessage(envelope(report(), { v: 2 as never }), own.signer), 'unsupported', 'message.version'],
  [
    "a server's message",
    async () => await signMessage(envelope({ type: 'welcome', session: new Uint8Array(16), time: 1, reportEvery: 1 }, { from: 'server' }), own.signer),
    'unsupported',
    'message.direction',
  ],
  ['with an unknown field', async () => await signMessage(envelope({ ...report(), more: true }), own.signer), 'malformed', 'message.schema'],
  ['a report of another session', async () => await signMessage(envelope(report({ session: new Uint8Array(16) })), own.signer), 'conflict', 'session.nonce'],
  ['a frame without a manifest', async () => encode([new Uint8Array(16), 0, new Uint8Array(10)]), 'malformed', 'transfer.no-manifest'],
  [
    'a transfer of 5 MiB',
    async () =>
      await signMessage(envelope({ type: 'manifest', transfer: new Uint8Array(16), hash: new Uint8Array(32), length: 5 << 20, count: 107 }), own.signer),
    'malformed',
    '',
  ],
  ['a statement about a key that was never sent', async () => await signMessage(envelope(acknowledgement()), own.signer), 'not-found', 'acknowledge.unknown'],
]

describe('a message that is', () => {
  test.each(cases)('%s: its public code, and an audit entry with the reason', async (_, make, code, reason) => {
    await handle(from, await make())
    expect(answered()).toEqual([code])
    const entry = await lastEntry()
    expect(entry).toMatchObject({ outcome: 'refused', code })
    expect(entry?.detail).toContain(reason)
    // The connection goes on.
    await handle(from, await signMessage(envelope(report()), own.signer))
    expect(answered()).toEqual([])
  })

  test('a report that was said before', async () => {
    const message = await signMessage(envelope(report()), own.signer)
    await handle(from, message)
    expect(answered()).toEqual([])
    await handle(from, message)
    expect(answered()).toEqual(['conflict'])
  })

  test('a report of an earlier connection', async () => {
    const message = await signMessage(envelope(report()), own.signer)
    ctx.bus.disconnect(from)
    from = ctx.bus.connect({ client: 'gw-1', device: 'gw-1' })
    await handle(from, message)
    expect(answered()).toEqual(['conflict'])
  })

  test('in frames: put together, then judged', async () => {
    const large = await signMessage(envelope({ ...report(), agent: 'x'.repeat(65) }), own.signer)
    const { manifest, frames } = split(Buffer.concat([large, new Uint8Array(60_000)]), randomBytes(16))
    await handle(from, await signMessage(envelope(manifest), own.signer))
    for (const frame of frames) await handle(from, frame)
    expect(answered()).toEqual(['malformed'])
  })
})

test('too many refusals close the connection', async () => {
  for (let count = 0; count < 64; count++) await handle(from, new Uint8Array(1))
  expect(ctx.bus.kicked).toEqual(['gw-1'])
})

describe('without identity', () => {
  const peer = (): DeviceRef => ctx.bus.connect({ client: `e-${randomBytes(16).toString('hex')}` })

  test.each(['report', 'acknowledge', 'renew'])('a %s is forbidden', async (type) => {
    const one = peer()
    const body = type === 'report' ? report() : type === 'acknowledge' ? acknowledgement() : { type: 'renew', session, csr: new Uint8Array(64) }
    await handle(one, await signMessage(envelope(body, { device: one.client as never }), own.signer))
    expect(answered(one.client)).toEqual([expect.stringMatching(/forbidden|malformed/)])
  })

  test('an answer without a hello is refused', async () => {
    const one = peer()
    await handle(
      one,
      await signMessage(
        envelope({ type: 'manifest', transfer: new Uint8Array(16), hash: new Uint8Array(32), length: 10, count: 1 }, { device: one.client as never }),
        own.signer,
      ),
    )
    expect(answered(one.client)).toEqual(['unauthenticated'])
  })

  test('a flood of refusals: the audit log stays bounded, memory too, and a commit goes through', { timeout: 60_000 }, async () => {
    const before = (await ctx.entries()).length
    const flood = process.env['FLEETKEY_LONG'] === '1' ? 50_000 : 5_000
    const memory = process.memoryUsage().heapUsed
    for (let count = 0; count < flood / 8; count++) {
      const one = peer()
      for (let more = 0; more < 8; more++) await handle(one, new Uint8Array(100))
      ctx.bus.disconnect(one)
      if (count % 100 === 0) ctx.bus.sent.length = 0
    }
    ctx.bus.sent.length = 0
    expect((await ctx.entries()).length).toBe(before)
    expect(process.memoryUsage().heapUsed - memory).toBeLessThan(100 << 20)
    const summary = ctx.refusals.take() ?? ''
    expect(summary).toContain(`${flood} × device.message cose.tag`)
    expect(summary.length).toBeLessThan(20_000)
    const verdict = await ctx.store.commit({ writes: [], entries: [anEntry('a revocation')] }, { reserved: true })
    expect(verdict.committed).toBe(true)
  })
})

test('a device that comes back while its welcome is being signed hears that of its new connection alone', async () => {
  const older = ctx.bus.connect({ client: 'gw-1', device: 'gw-1' })
  ctx.bus.disconnect(older)
  const newer = ctx.bus.connect({ client: 'gw-1', device: 'gw-1' })
  const bodies = (): readonly Body[] => ctx.bus.sent.map(({ bytes }) => readMessage(bytes, { max }).envelope.body)
  await expect.poll(() => bodies().filter(({ type }) => type === 'approvals').length).toBe(2)
  const welcomes = bodies().filter((body): body is BodyOf<'welcome'> => body.type === 'welcome')
  expect(welcomes.map((body) => body.session)).toEqual([ctx.sessions.of(DeviceId.parse('gw-1'))?.nonce])
  await handle(newer, await signMessage(envelope(report({ session: welcomes[0]?.session ?? new Uint8Array() })), own.signer))
  expect(answered('gw-1')).not.toContain('conflict')
})

test('last contacts are stored together, once in a while, with one audit entry for all', async () => {
  const seen = async (id: string): Promise<number | undefined> => {
    const device = await ctx.store.get('device', id)
    return hasIdentity(device) ? device.lastSeenAt : undefined
  }
  await handle(from, await signMessage(envelope(report()), own.signer))
  ctx.sessions.hear(DeviceId.parse('gw-2'), { at: ctx.now(), agent: 'other' })
  ctx.sessions.hear(DeviceId.parse('gone'), { at: ctx.now(), agent: 'other' })
  expect([await seen('gw-1'), await seen('gw-2')]).toEqual([1, 1])
  const { size } = await ctx.store.checkpoint()
  await storeContacts(ctx)
  expect([await seen('gw-1'), await seen('gw-2')]).toEqual([ctx.now(), ctx.now()])
  const [entry, ...more] = await ctx.store.audit({ after: size, limit: 10 })
  expect([entry?.action, entry?.detail, more]).toEqual(['device.report', 'last contact of 3 devices', []])

  // Heard again soon: its record is fresh enough, and nothing is written.
  await handle(from, await signMessage(envelope(report()), own.signer))
  await storeContacts(ctx)
  expect((await ctx.store.checkpoint()).size).toBe(size + 1)
})
