import { split } from '@fleetkey/protocol/chunks.ts'
import type { Body, BodyOf } from '@fleetkey/protocol/messages.ts'
import { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { openChannel } from './channel.ts'
import { random } from './test-keys.ts'
import { day, keyPair, testServer, today } from './test-server.ts'
import type { Belief } from './device-clock.ts'
import { clockAt, signedAt } from './test-clock.ts'
import { openTrust, readFromServer, type Trust } from './trust.ts'

const server = testServer()
const stranger = testServer()
const client = 'd-1'
const welcome: Body = { type: 'welcome', session: random(16), time: today, reportEvery: 60 }
const retire: BodyOf<'retire'> = { type: 'retire', key: KeyId.parse('site'), below: null, campaign: null, nonce: random(16) }
const refusal: Body = { type: 'refusal', re: random(16), code: 'forbidden', retryAfter: null }

const read = (
  bytes: Uint8Array,
  of: { readonly trust?: Trust; readonly time?: Belief; readonly tenant?: string; readonly client?: string; readonly max?: number } = {},
) => readFromServer(bytes, { trust: server.trust(), tenant: 'plant', client, time: signedAt(today), max: 4096, ...of })
const outcome = (run: () => unknown): string => {
  try {
    run()
    return 'accepted'
  } catch (thrown) {
    return thrown instanceof Problem ? `${thrown.code} ${thrown.reason ?? ''}`.trim() : String(thrown)
  }
}

const judged = (bytes: Uint8Array, limits: Parameters<typeof read>[1] = {}): string => outcome(() => read(bytes, limits))
const of = async (body: Body, how: Parameters<typeof server.message>[2] = {}, limits: Parameters<typeof read>[1] = {}): Promise<string> =>
  judged(await server.message(client, body, how), limits)

describe('a message of the server', () => {
  test('is accepted as it was signed', async () => {
    expect(read(await server.message(client, welcome)).envelope.body).toEqual(welcome)
    expect(outcome(() => openTrust(server.source))).toBe('accepted')
  })

  const cases: readonly (readonly [string, () => Promise<string>, string])[] = [
    ['the delivery key retires', async () => await of(retire), 'accepted'],
    ['the challenge key retires', async () => await of(retire, { role: 'challenge' }), 'unauthenticated server.signer'],
    ['the challenge key welcomes', async () => await of(welcome, { role: 'challenge' }), 'unauthenticated server.signer'],
    ['the challenge key refuses', async () => await of(refusal, { role: 'challenge' }), 'accepted'],
    ['the delivery key refuses', async () => await of(refusal, { role: 'delivery' }), 'accepted'],
    ['a key without a certificate', async () => await of(welcome, { as: keyPair() }), 'unauthenticated server.signer'],
    ['another tenant', async () => await of(welcome, { tenant: 'other' }), 'forbidden message.tenant'],
    ['a message of a device', async () => await of(welcome, { from: 'device' }), 'unsupported message.direction'],
    ['to another device', async () => judged(await server.message('d-2', welcome)), 'forbidden message.device'],
    ['to an enrolment', async () => judged(await server.message(`e-${'0'.repeat(32)}`, welcome)), 'forbidden message.device'],
    ['another server of the same names', async () => judged(await stranger.message(client, welcome)), 'unauthenticated server.signer'],
    ['longer than agreed', async () => await of(retire, {}, { max: 100 }), 'malformed message.size'],
    ['a type that only devices send', async () => await of({ ...retire, type: 'report' } as unknown as Body), 'malformed'],
  ]
  test.each(cases)('%s', async (_name, run, want) => {
    expect(await run()).toMatch(new RegExp(`^${want}`))
  })

  test('one bit changed anywhere: refused', async () => {
    const bytes = await server.message(client, retire)
    for (let at = 0; at < bytes.length; at += 1) expect(judged(bytes.with(at, (bytes[at] ?? 0) ^ 1)), `byte ${at}`).not.toBe('accepted')
  })

  test('garbage is a Problem, nothing else', () => {
    fc.assert(
      fc.property(
        fc.oneof(
          fc.uint8Array({ maxLength: 400 }),
          fc.uint8Array({ maxLength: 400 }).map((bytes) => Uint8Array.of(0xd2, 0x84, ...bytes)),
        ),
        (bytes) => {
          expect(() => read(bytes)).toThrow(Problem)
        },
      ),
      { numRuns: 300 },
    )
  })
})

describe('certificates of the server’s keys', () => {
  const life = { notBefore: today - day, notAfter: today + day }
  const times: readonly (readonly [string, number, string])[] = [
    ['before its time', today - 2 * day, 'unauthenticated server.signer'],
    ['within its time', today, 'accepted'],
    ['at its end', today + day, 'accepted'],
    ['after its time', today + day + 1_000, 'unauthenticated server.signer'],
  ]
  test.each(times)('%s, also when it was believed before', async (_name, now, want) => {
    const short = testServer({ role: life })
    const trust = short.trust()
    const bytes = await short.message(client, retire)
    expect(outcome(() => read(bytes, { trust }))).toBe('accepted')
    expect(outcome(() => read(bytes, { trust, time: signedAt(now) }))).toBe(want)
    expect(outcome(() => read(bytes, { trust, time: signedAt(today) }))).toBe('accepted')
    // Whatever the clocks of the device show: a message that states its time is judged by that.
    const stating = await short.message(client, { ...welcome, time: now })
    for (const clock of [0, Date.UTC(2106, 1, 7), today]) {
      expect(outcome(() => read(stating, { trust, time: { now: clock, floor: 0, signed: false } }))).toBe(want)
      expect(outcome(() => read(stating, { trust, time: signedAt(clock) }))).toBe(want)
      // Before any time is signed a clock alone makes nothing over: signed time does.
      expect(outcome(() => read(bytes, { trust, time: { now: clock, floor: today, signed: false } }))).toBe('accepted')
      expect(outcome(() => read(bytes, { trust, time: { now: clock, floor: today + 2 * day, signed: false } }))).toBe('unauthenticated server.signer')
    }
  })

  test('without a role, or with another one: signs nothing', async () => {
    const key = keyPair()
    for (const role of [undefined, 'release', 'group', 'challenge'] as const) {
      const certificate = server.issue({ subject: 'x', spki: key.spki, ...(role === undefined ? {} : { role }) })
      const trust = server.trust().with({ chain: [], keys: [certificate] })
      expect(outcome(() => trust.signerOf(Buffer.from(''), ['delivery'], signedAt(today)))).toBe('unauthenticated server.signer')
      const bytes = await server.message(client, welcome, { as: key })
      expect(outcome(() => read(bytes, { trust }))).toBe('unauthenticated server.signer')
    }
    const trust = server.trust().with({ chain: [], keys: [server.issue({ subject: 'x', spki: key.spki, role: 'delivery' })] })
    const bytes = await server.message(client, welcome, { as: key })
    expect(outcome(() => read(bytes, { trust }))).toBe('accepted')
  })

  test('newer certificates are added, the roots stay: what another root signed is not believed', async () => {
    const trust = server.trust().with({ chain: [stranger.root.der, stranger.issuing.der], keys: [stranger.certificates.delivery] })
    expect(trust.roots.map(({ der }) => der)).toEqual(server.trust().roots.map(({ der }) => der))
    expect(outcome(() => trust.check(stranger.certificates.delivery, [stranger.issuing.der, stranger.root.der], today))).toBe(
      'unauthenticated certificate.chain',
    )
    const bytes = await stranger.message(client, welcome)
    expect(outcome(() => read(bytes, { trust }))).toBe('unauthenticated server.signer')
    expect(outcome(() => trust.check(server.certificates.delivery, [], today))).toBe('accepted')
  })

  test('a device certificate is no issuer', () => {
    const device = keyPair()
    const leaf = server.issue({ subject: 'd-1', spki: device.spki })
    const forged = server.issue({ subject: 'forged', spki: keyPair().spki, issuer: 'd-1', key: device.private, role: 'delivery' })
    expect(outcome(() => server.trust().check(forged, [leaf], today))).toBe('unauthenticated certificate.chain')
  })

  test('what is no certificate: malformed', () => {
    for (const field of ['trust', 'chain', 'keys'] as const) expect(outcome(() => openTrust({ ...server.source, [field]: [random(40)] }))).toMatch(/^malformed/)
    expect(outcome(() => server.trust().check(random(40), [], today))).toMatch(/^malformed/)
  })
})

describe('a channel', () => {
  const device = keyPair()
  const open = (transmit: (bytes: Uint8Array) => Promise<void> = async () => undefined) =>
    openChannel({
      client,
      tenant: 'plant',
      signer: { kid: random(8), sign: device.sign },
      trust: () => server.trust(),
      random,
      clock: clockAt(today),
      transmit,
    })

  test('gives verified messages, and refuses frames that were not announced', async () => {
    const channel = open()
    expect(channel.receive(await server.message(client, retire))?.envelope.body).toEqual(retire)
    expect(outcome(() => channel.receive(Uint8Array.of(0x83, 0x50, ...random(16), 0, 0x41, 1)))).toMatch(/^malformed/)
    expect(outcome(() => channel.receive(new Uint8Array(0)))).toMatch(/^malformed/)
  })

  const identity: Body = {
    type: 'identity',
    re: random(16),
    device: DeviceId.parse('d-1'),
    ldevid: random(4_000),
    tls: random(4_000),
    chain: Array.from({ length: 4 }, () => random(4_000)),
    trust: Array.from({ length: 4 }, () => random(4_000)),
    keys: Array.from({ length: 8 }, () => random(4_000)),
    approvals: null,
    time: today,
  }
  test('long messages come in frames, in any company; each one is verified whole', async () => {
    const bytes = await server.message(client, identity, { role: 'challenge' })
    const { manifest, frames } = split(bytes, random(16))
    expect(frames.length).toBeGreaterThan(1)
    const channel = open()
    expect(channel.receive(await server.message(client, manifest))).toBeUndefined()
    const got = frames.map((frame) => channel.receive(frame))
    expect([got.slice(0, -1).every((one) => one === undefined), got.at(-1)?.envelope.body.type]).toEqual([true, 'identity'])
    // The same by a key that may announce, but not say this.
    const forged = split(await server.message(client, identity, { as: keyPair() }), random(16))
    channel.receive(await server.message(client, forged.manifest))
    expect(outcome(() => forged.frames.forEach((frame) => channel.receive(frame)))).toBe('unauthenticated server.signer')
  })

  test('sends one message after the other, the frames of a long one together', async () => {
    const sent: string[] = []
    const channel = open(async (bytes) => {
      await new Promise((resolve) => setTimeout(resolve, 1))
      sent.push(bytes[0] === 0x83 ? 'frame' : 'message')
    })
    await Promise.all([channel.send(welcome), channel.send(identity), channel.send(welcome)])
    expect(sent).toEqual(['message', 'message', 'frame', 'frame', 'message'])
  })
})
