import { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Body, BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { keyId, readMessage, verifyMessage, verifySignature, type SignedMessage } from '@fleetkey/protocol/signed.ts'
import { sha256, tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { describe, expect, test } from 'vitest'
import type { Attester } from './attesters/attester.ts'
import type { Connection } from './connection.ts'
import { enrol, Refused, type EnrolOptions } from './enrol.ts'
import { openDocument } from './files.ts'
import { factsOf, identityStore, renewalStore, type Identity } from './identity.ts'
import { filePowerFailingAt, memoryFileSystem, type MemoryFileSystem } from './memory-filesystem.ts'
import { prepareRenewal, renewedIdentity } from './renew.ts'
import { clockAt } from './test-clock.ts'
import { random } from './test-keys.ts'
import { day, keyPair, testServer, today } from './test-server.ts'
import { exportTlsKey, newTlsKey, type TlsKey } from './tls-key.ts'

const server = testServer()
const stranger = testServer()
const ldevid = keyPair()
const d1 = DeviceId.parse('d-1')
const blob = random(16)
const attested = { attest: blob, signature: blob }

/** Says what a message must hold; what a TPM proves is judged elsewhere. */
const attester: Attester = {
  signer: { kid: keyId(ldevid.spki), sign: ldevid.sign },
  sign: ldevid.sign,
  resetCount: async () => 0,
  hello: async (of) => ({
    type: 'hello',
    presented: { method: 'tpm2', ekCertificate: null, ek: blob, ak: blob, srk: blob, ldevid: blob },
    ...of,
  }),
  answer: async ({ challenge, eventLog, tls }) => ({
    type: 'answer',
    challenge: challenge.challenge,
    proven: {
      method: 'tpm2',
      proof: random(32),
      quote: attested,
      eventLog,
      recipient: blob,
      certify: { srk: attested, ldevid: attested, recipient: attested },
    },
    csr: { ldevid: tls.csr, tls: tls.csr },
    binding: random(64),
  }),
}
const approvals = { signer: blob, ref: random(32), approvals: [{ release: 'gateway/1', number: 1, pcrs: [0], policy: random(32), signature: random(64) }] }
const challengeTo = (hello: Uint8Array): BodyOf<'challenge'> => ({
  type: 'challenge',
  challenge: random(16),
  hello: sha256(hello),
  random: random(32),
  demanded: { method: 'tpm2', credential: { blob, secret: blob }, selection: [{ hash: 'sha256', pcrs: [0] }], firmware: { signer: blob, ref: random(32) } },
  expires: today + day,
})
const tlsFor = (spki: Uint8Array, more: Partial<Parameters<typeof server.issue>[0]> = {}): Uint8Array => server.issue({ subject: 'd-1', spki, ...more })
const identityFor = (re: Uint8Array, tlsSpki: Uint8Array, more: Partial<BodyOf<'identity'>> = {}): BodyOf<'identity'> => ({
  type: 'identity',
  re,
  device: d1,
  ldevid: server.issue({ subject: 'd-1', spki: ldevid.spki }),
  tls: tlsFor(tlsSpki),
  chain: [server.issuing.der],
  trust: [server.root.der],
  keys: [server.certificates.challenge, server.certificates.delivery],
  approvals,
  time: today + 5,
  ...more,
})
const refusal = (re: Uint8Array, more: Partial<BodyOf<'refusal'>> = {}): Body => ({ type: 'refusal', re, code: 'attestation-failed', retryAfter: 60, ...more })

/** What the other side does; each may say anything in any order. */
interface Script {
  readonly onHello?: (say: Say, hello: SignedMessage) => Promise<void>
  readonly onAnswer?: (say: Say, answer: SignedMessage, tlsSpki: Uint8Array) => Promise<void>
}
interface Say {
  readonly client: string
  (body: Body, how?: Parameters<typeof server.message>[2]): Promise<void>
  raw(bytes: Uint8Array): void
  close(why: string): void
}
const play = async ({ onHello, onAnswer }: Script, more: Partial<EnrolOptions> = {}) => {
  const heard: string[] = []
  const steps: string[] = []
  let closed = 0
  const connect: EnrolOptions['connect'] = async ({ client, credentials, onMessage, onClose }) => {
    expect(credentials).toBeNull()
    const say: Say = Object.assign(
      async (body: Body, how: Parameters<typeof server.message>[2] = {}) => onMessage(await server.message(client, body, { role: 'challenge', ...how })),
      { client, raw: onMessage, close: onClose },
    )
    const connection: Connection = {
      client,
      exporter: random(32),
      server: { notBefore: today - day, notAfter: today + 30 * day },
      subscribe: async () => undefined,
      send: async (bytes) => {
        const message = readMessage(bytes, { max: 1 << 20 })
        verifyMessage(message, ldevid.spki)
        const { type } = message.envelope.body
        heard.push(type)
        const { body } = message.envelope
        if (body.type === 'hello') await (onHello ?? (async (reply) => await reply(challengeTo(bytes))))(say, message)
        if (body.type !== 'answer') return
        const { spki } = judgeRequest(body.csr.tls)
        await (onAnswer ?? (async (reply, answer, tlsSpki) => await reply(identityFor(answer.envelope.id, tlsSpki))))(say, message, spki)
      },
      close: async () => void (closed += 1),
      destroy: () => undefined,
    }
    return connection
  }
  const result = await enrol({
    connect,
    attester,
    trust: server.trust(),
    tenant: 'plant',
    serial: 'SN-1',
    purpose: 'enrol',
    known: null,
    agent: 'test/1',
    eventLog: async () => new Uint8Array(0),
    random,
    clock: clockAt(today),
    step: (name) => void steps.push(name),
    ...more,
  }).catch((thrown: unknown) => thrown)
  return { result, heard, steps, closed }
}
const reasonOf = (thrown: unknown): string =>
  thrown instanceof Problem ? `${thrown.code} ${thrown.reason ?? ''}` : thrown instanceof Error ? thrown.message : 'nothing thrown'

describe('enrolment', () => {
  test('in two round trips, over a connection of its own that is closed in the end', async () => {
    const { result, heard, steps, closed } = await play({})
    expect(result).toMatchObject({ identity: { device: 'd-1', chain: [server.issuing.der] }, approvals, time: today + 5 })
    expect([heard, steps, closed]).toEqual([['hello', 'answer'], ['enrol.hello', 'enrol.answered'], 1])
  })

  const noise = async (say: Say, own: Uint8Array): Promise<void> => {
    say.raw(random(200))
    say.raw(new Uint8Array(0))
    say.raw(await stranger.message(say.client, refusal(own), { role: 'challenge' }))
    say.raw(await server.message('d-2', refusal(own), { role: 'challenge' }))
    await say(refusal(random(16)))
    await say(refusal(own), { tenant: 'other' })
    await say({ type: 'retire', key: 'site', below: null, campaign: null, nonce: random(16) } as Body)
  }
  test('whatever is not from the server, or not the answer, is passed over', async () => {
    const { result, closed } = await play({
      onHello: async (say, hello) => {
        await noise(say, hello.envelope.id)
        await say(challengeTo(random(100)))
        await say(challengeTo(hello.bytes), { role: 'delivery' })
        await say(challengeTo(hello.bytes))
      },
      onAnswer: async (say, answer, tlsSpki) => {
        await noise(say, answer.envelope.id)
        await say(identityFor(random(16), tlsSpki))
        await say(identityFor(answer.envelope.id, tlsSpki), { as: keyPair() })
        await say(identityFor(answer.envelope.id, tlsSpki))
      },
    })
    expect([reasonOf(result), closed]).toEqual(['nothing thrown', 1])
  })

  test('a refusal of the hello or of the answer ends it, with the server’s code and pause', async () => {
    for (const script of [
      { onHello: async (say: Say, hello: SignedMessage) => await say(refusal(hello.envelope.id)) },
      { onAnswer: async (say: Say, answer: SignedMessage) => await say(refusal(answer.envelope.id)) },
    ]) {
      const { result, closed } = await play(script)
      expect(result).toBeInstanceOf(Refused)
      expect([result, closed]).toEqual([expect.objectContaining({ code: 'attestation-failed', retryAfter: 60 }), 1])
    }
  })

  const identities: readonly (readonly [string, (re: Uint8Array, tlsSpki: Uint8Array) => BodyOf<'identity'>, string])[] = [
    ['of another device than before', (re, spki) => identityFor(re, spki, { device: DeviceId.parse('d-2') }), 'forbidden identity.other-device'],
    ['without an LDevID certificate', (re, spki) => identityFor(re, spki, { ldevid: null }), 'malformed identity.no-ldevid'],
    [
      'with an LDevID certificate of another key',
      (re, spki) => identityFor(re, spki, { ldevid: server.issue({ subject: 'd-1', spki: keyPair().spki }) }),
      'forbidden identity.ldevid-key',
    ],
    ['with a TLS certificate of another key', (re) => identityFor(re, keyPair().spki), 'forbidden identity.tls-key'],
    ['with a TLS certificate of another name', (re, spki) => identityFor(re, spki, { tls: tlsFor(spki, { subject: 'd-2' }) }), 'forbidden identity.tls-name'],
    [
      'with a TLS certificate of another CA',
      (re, spki) => identityFor(re, spki, { tls: stranger.issue({ subject: 'd-1', spki }), chain: [stranger.issuing.der, stranger.root.der] }),
      'unauthenticated certificate.chain',
    ],
    [
      'with a TLS certificate that is over',
      (re, spki) => identityFor(re, spki, { tls: tlsFor(spki, { notAfter: today - day }) }),
      'unauthenticated certificate.chain',
    ],
    [
      'that is over by the server’s own time',
      (re, spki) => identityFor(re, spki, { tls: tlsFor(spki, { notAfter: today - 1_000 }) }),
      'unauthenticated certificate.chain',
    ],
    ['with certificates that are none', (re, spki) => identityFor(re, spki, { tls: random(100) }), 'malformed '],
  ]
  test.each(identities)('an identity %s is not taken', async (_name, make, want) => {
    const { result, closed } = await play({ onAnswer: async (say, answer, tlsSpki) => await say(make(answer.envelope.id, tlsSpki)) }, { known: 'd-1' })
    expect([reasonOf(result).slice(0, want.length), closed]).toEqual([want, 1])
  })

  test('a connection that ends in between, an event log that is too long', async () => {
    const lost = await play({ onHello: async (say) => say.close('cable pulled') })
    expect([reasonOf(lost.result), lost.closed]).toEqual(['cable pulled', 1])
    const long = await play({}, { eventLog: async () => new Uint8Array(1 << 20) })
    expect([reasonOf(long.result), long.heard]).toEqual(['unsupported event-log.size', []])
  })
})

const storage = new Secret(random(32))
const stores = (files: MemoryFileSystem, of: { readonly storage?: Secret; readonly tenant?: string; readonly losses?: string[] } = {}) => {
  const document = (name: string) => openDocument({ files, folder: '/data', name, step: () => undefined })
  const common = { storage: of.storage ?? storage, tenant: of.tenant ?? 'plant', random, onLoss: (why: string) => void of.losses?.push(why) }
  return { identities: identityStore({ ...common, document: document('identity') }), renewals: renewalStore({ ...common, document: document('renewal') }) }
}
const identityOf = (tlsKey: TlsKey, more: Partial<Parameters<typeof server.issue>[0]> = {}): Identity => ({
  device: 'd-1',
  ldevid: server.issue({ subject: 'd-1', spki: ldevid.spki }),
  tls: tlsFor(tlsKey.spki, more),
  tlsKey,
  chain: [server.issuing.der],
  keys: [server.certificates.delivery],
})
const plain = (identity: Identity | undefined) => (identity === undefined ? undefined : { ...identity, tlsKey: exportTlsKey(identity.tlsKey).bytes().toHex() })

describe('the identity at rest', () => {
  const one = identityOf(newTlsKey())
  const two = identityOf(newTlsKey())

  test('is what was stored, and tells the life of its certificate', async () => {
    const files = memoryFileSystem()
    expect(await stores(files).identities.load()).toBeUndefined()
    await stores(files).identities.save(one)
    expect(plain(await stores(files).identities.load())).toEqual(plain(one))
    expect(factsOf(one)).toEqual({
      device: 'd-1',
      ldevidNotBefore: parseCertificate(one.ldevid).notBefore,
      ldevidNotAfter: parseCertificate(one.ldevid).notAfter,
      tlsNotBefore: today - 30 * day,
      tlsNotAfter: today + 365 * day,
    })
  })

  test('a power cut at every change of the medium: the old one or the new one', async () => {
    for (const keep of [false, true]) {
      for (let cut = 0; cut < 7; cut += 1) {
        const files = memoryFileSystem()
        await stores(files).identities.save(one)
        files.powerCycle({ power: filePowerFailingAt(cut) })
        const done = await stores(files)
          .identities.save(two)
          .then(
            () => true,
            () => false,
          )
        files.powerCycle({ keep })
        const found = plain(await stores(files).identities.load())
        expect(done ? [plain(two)] : [plain(one), plain(two)]).toContainEqual(found)
        expect(done).toBe(cut === 6)
      }
    }
  })

  test('the TLS key is nowhere in plain, and opens for nobody else', async () => {
    const files = memoryFileSystem()
    await stores(files).identities.save(one)
    const key = exportTlsKey(one.tlsKey).bytes()
    for (const bytes of files.contents().values())
      for (let at = 0; at + 32 <= key.length; at += 32) expect(Buffer.from(bytes).includes(key.subarray(at, at + 32))).toBe(false)
    for (const other of [{ storage: new Secret(random(32)) }, { tenant: 'other' }]) {
      const losses: string[] = []
      expect([await stores(files, { ...other, losses }).identities.load(), losses]).toEqual([undefined, ['identity: identity at rest does not open']])
    }
  })

  test('cannot be put in the place of a renewal', async () => {
    const files = memoryFileSystem()
    await stores(files).identities.save(one)
    for (const slot of ['a', 'b'])
      await files.write(`/data/renewal.${slot}`, (await files.read(`/data/identity.${slot}`)) ?? new Uint8Array(0), { mode: 0o600 })
    const losses: string[] = []
    expect([await stores(files, { losses }).renewals.load(), losses]).toEqual([undefined, ['renewal: renewal at rest does not open']])
  })
})

describe('renewal', () => {
  const identity = identityOf(newTlsKey())
  const session = random(16)
  const prepare = async (files: MemoryFileSystem, now = today, steps: string[] = []) =>
    await prepareRenewal({
      store: stores(files).renewals,
      identity,
      tenant: 'plant',
      session,
      sign: ldevid.sign,
      random,
      now,
      step: (name) => void steps.push(name),
    })

  test('the new key is durable before the request leaves; the request proves both keys', async () => {
    const files = memoryFileSystem()
    const steps: string[] = []
    const { pending, body } = await prepare(files, today, steps)
    files.powerCycle()
    expect([(await stores(files).renewals.load())?.id, steps]).toEqual([pending.id, ['renew.prepared']])
    const { spki } = judgeRequest(body.csr)
    expect(spki).toEqual(pending.tlsKey.spki)
    expect(verifySignature(ldevid.spki, tlsBinding('plant', session, spki), body.binding)).toBe(true)
    expect(spki).not.toEqual(identity.tlsKey.spki)
  })

  const repeats: readonly (readonly [string, number, boolean])[] = [
    ['at once', 0, true],
    ['days later: the server says when it is over', 3 * day, true],
  ]
  test.each(repeats)('repeated %s (%i ms): the same request: %s', async (_name, after, same) => {
    const files = memoryFileSystem()
    const first = await prepare(files)
    const second = await prepare(files, today + after)
    expect([Buffer.compare(first.pending.id, second.pending.id) === 0, Buffer.compare(first.pending.tlsKey.spki, second.pending.tlsKey.spki) === 0]).toEqual([
      same,
      same,
    ])
  })

  test('once it is settled the next one is new', async () => {
    const files = memoryFileSystem()
    const { pending } = await prepare(files)
    await stores(files).renewals.save(null)
    expect(await stores(files).renewals.load()).toBeNull()
    expect((await prepare(files)).pending.id).not.toEqual(pending.id)
  })

  test('a medium that fails: nothing is asked', async () => {
    for (let cut = 0; cut < 6; cut += 1) await expect(prepare(memoryFileSystem({ power: filePowerFailingAt(cut) }))).rejects.toThrow(/^(while|before)/)
  })

  const pending = { id: random(16), tlsKey: newTlsKey(), since: today }
  const renewed = (message: Partial<BodyOf<'identity'>>): Identity =>
    renewedIdentity({
      identity,
      pending,
      message: identityFor(pending.id, pending.tlsKey.spki, { ldevid: null, ...message }),
      trust: server.trust(),
    })

  test('takes the new certificate, chain and server keys; the LDevID stays', () => {
    const keys = [server.certificates.challenge]
    expect(renewed({ keys })).toMatchObject({ device: 'd-1', ldevid: identity.ldevid, tlsKey: pending.tlsKey, keys })
  })

  const answers: readonly (readonly [string, Partial<BodyOf<'identity'>>, string])[] = [
    ['another key', { tls: tlsFor(identity.tlsKey.spki) }, 'forbidden identity.tls-key'],
    ['another device', { device: DeviceId.parse('d-2'), tls: tlsFor(pending.tlsKey.spki, { subject: 'd-2' }) }, 'forbidden identity.tls-name'],
    ['another CA', { tls: stranger.issue({ subject: 'd-1', spki: pending.tlsKey.spki }), chain: [stranger.issuing.der] }, 'unauthenticated certificate.chain'],
    ['the past', { tls: tlsFor(pending.tlsKey.spki, { notAfter: today - 1_000 }) }, 'unauthenticated certificate.chain'],
  ]
  test.each(answers)('a certificate for %s is not taken', (_name, message, want) => {
    let thrown: unknown
    try {
      renewed(message)
    } catch (error) {
      thrown = error
    }
    expect(reasonOf(thrown)).toBe(want)
  })
})
