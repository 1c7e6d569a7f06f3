import { generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import type { Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { newTlsKey, tlsCsr, type TlsKey } from '@fleetkey/device-agent/tls-key.ts'
import { createBoard, install, type Board } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeEkCa, type EkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { buildRelease, referenceValues, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { DeviceId, EnrolmentId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { AnswerOf, Body, BodyOf, ChallengeOf, HelloOf } from '@fleetkey/protocol/messages.ts'
import { keyId, readMessage, signMessage, type SignedMessage, type Signer } from '@fleetkey/protocol/signed.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { connectProof } from '@fleetkey/protocol/transcript.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { setClaimWindow } from '@fleetkey/server/flows/claim-window.ts'
import { admitConnection } from '@fleetkey/server/flows/connect.ts'
import type { DeviceRef } from '@fleetkey/server/flows/context.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const max = 4 << 20
const firmware = buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('gateway/1.0.0', new TextEncoder().encode('agent')))

interface Machine {
  readonly board: Board
  readonly ek: Uint8Array
  readonly attester: Attester
}

let ctx: TestContext
let handle: (from: DeviceRef, bytes: Uint8Array) => Promise<void>
let ca: EkCa
let machine: Machine
let other: Machine

const machineOf = async (serial: string, by: EkCa): Promise<Machine> => {
  const tpm = createSoftwareTpm({ random, now: () => ctx.clock.now })
  const ek = await personalise(tpm, by, { random, now: ctx.clock.now })
  const board = createBoard({ serial, tpm, flash: new Flash() })
  install(board, firmware)
  board.boot()
  const client = new Tpm(board.transport(), { random })
  return { board, ek, attester: tpm2Attester(await openDeviceKeys(client, await provision(client))) }
}

beforeEach(async () => {
  ctx = await testContext()
  handle = deviceHandler(ctx, { policy: { requireEkCertificate: false }, reportEvery: 300 })
  ca = makeEkCa(ctx.clock.now)
  const factory = station()
  machine = await machineOf('GW-1', ca)
  other = await machineOf('GW-2', ca)
  await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ca.certificate), test: true })
  await importRelease(ctx, operator(), factory.signed(referenceValues(firmware.manifest)))
  const rows = [
    { serial: 'GW-1', ek: machine.ek },
    { serial: 'GW-2', ek: other.ek },
  ]
  await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch: 'b1', model: 'gateway', station: factory.id }, rows)), format: 'json' })
})
afterEach(async () => await ctx.close())

/** An enrolment whose every message can be changed on its way. */
interface Attempt {
  readonly serial?: string
  readonly attester?: Attester
  hello?(body: BodyOf<'hello'>): BodyOf<'hello'>
  /** The exporter that the device computes its nonce with; its own connection's unless told. */
  readonly deviceExporter?: Uint8Array
  challenge?(body: BodyOf<'challenge'>): BodyOf<'challenge'>
  eventLog?(log: Uint8Array): Uint8Array
  answer?(body: BodyOf<'answer'>): BodyOf<'answer'> | Promise<BodyOf<'answer'>>
  readonly answerSigner?: Signer
  readonly between?: () => void | Promise<void>
  readonly tls?: { readonly key: TlsKey; readonly csr: Uint8Array }
}

const attempt = async (of: Attempt = {}): Promise<{ from: DeviceRef; body: Body; helloBytes: Uint8Array; answerBytes: Uint8Array | null }> => {
  const attester = of.attester ?? machine.attester
  const client = EnrolmentId.parse(`e-${randomBytes(16).toString('hex')}`)
  const from = ctx.bus.connect({ client })
  const send = async (body: Body, signer: Signer): Promise<Uint8Array> => {
    const bytes = await signMessage({ v: 1, tenant: TenantId.parse('plant'), device: client, from: 'device', id: random(16), seq: 1, body }, signer)
    await handle(from, bytes)
    return bytes
  }
  const heard = (): SignedMessage => readMessage(ctx.bus.take(client).at(-1) ?? new Uint8Array(), { max })
  const made = await attester.hello({ serial: of.serial ?? 'GW-1', purpose: 'enrol', random: random(32), agent: 'test' })
  const hello = of.hello?.(made) ?? made
  const helloBytes = await send(hello, attester.signer)
  const challengeMessage = heard()
  if (challengeMessage.envelope.body.type !== 'challenge') return { from, body: challengeMessage.envelope.body, helloBytes, answerBytes: null }
  const challenge = of.challenge?.(challengeMessage.envelope.body) ?? challengeMessage.envelope.body
  const key = of.tls?.key ?? newTlsKey()
  const log = machine.board.eventLog()
  const answered = await attester.answer({
    tenant: 'plant',
    hello,
    helloBytes,
    challenge,
    challengeBytes: challengeMessage.bytes,
    exporter: of.deviceExporter ?? from.exporter ?? new Uint8Array(),
    eventLog: of.eventLog?.(log) ?? log,
    tls: { spki: key.spki, csr: of.tls?.csr ?? (await tlsCsr(key, 'GW-1')) },
  })
  await of.between?.()
  const answerBytes = await send((await of.answer?.(answered)) ?? answered, of.answerSigner ?? attester.signer)
  return { from, body: heard().envelope.body, helloBytes, answerBytes }
}

const reasonOf = async (id = 'gw-1'): Promise<string | undefined> => (await ctx.store.get('device', DeviceId.parse(id)))?.lastRefusal?.reason

const flip = (bytes: Uint8Array, at = bytes.length - 1): Uint8Array => bytes.map((byte, index) => (index === at ? byte ^ 1 : byte))

test('a genuine device is enrolled, and gets the same identity for the same answer', async () => {
  const { from, body, answerBytes } = await attempt()
  expect(body).toMatchObject({ type: 'identity', device: 'gw-1' })
  const certificates = await ctx.store.count('certificate', { device: 'gw-1' })
  await handle(from, answerBytes ?? new Uint8Array())
  expect(readMessage(ctx.bus.take(from.client).at(-1) ?? new Uint8Array(), { max }).envelope.body).toEqual(body)
  expect(await ctx.store.count('certificate', { device: 'gw-1' })).toBe(certificates)
})

test('enrolled again: the same device id, new certificates', async () => {
  await attempt()
  ctx.clock.now += 1000
  expect((await attempt()).body).toMatchObject({ type: 'identity', device: 'gw-1' })
  expect(await ctx.store.count('certificate', { device: 'gw-1' })).toBeGreaterThanOrEqual(3)
})

const proving =
  (change: (of: AnswerOf<'tpm2'>['proven']) => Partial<AnswerOf<'tpm2'>['proven']>) =>
  (body: BodyOf<'answer'>): BodyOf<'answer'> => {
    const { proven } = body as AnswerOf<'tpm2'>
    return { ...body, proven: { ...proven, ...change(proven) } }
  }

const demanding =
  (pcrs: readonly number[]) =>
  (body: BodyOf<'challenge'>): BodyOf<'challenge'> => ({
    ...body,
    demanded: { ...(body as ChallengeOf<'tpm2'>).demanded, selection: [{ hash: 'sha256', pcrs: [...pcrs] }] },
  })

/** What must not get in: the public code is the same for all of them, the reason is on the device's record. */
const refused: readonly [string, () => Attempt | Promise<Attempt>, string][] = [
  ['the serial of another board', () => ({ serial: 'GW-2' }), 'manifest.serial-mismatch'],
  ['another connection: a relay', () => ({ deviceExporter: random(32) }), 'credential.proof'],
  ['a log with an event less', () => ({ eventLog: (log) => log.subarray(0, 75) }), 'log'],
  ['a log with another digest', () => ({ eventLog: (log) => flip(log, 100) }), 'log'],
  ['a log that is none', () => ({ eventLog: () => new Uint8Array(200) }), 'log.header'],
  ['a quote that was changed', () => ({ answer: proving((of) => ({ quote: { ...of.quote, attest: flip(of.quote.attest) } })) }), 'quote.signature'],
  ['a signature that was changed', () => ({ answer: proving((of) => ({ quote: { ...of.quote, signature: flip(of.quote.signature) } })) }), 'quote.signature'],
  ['the certification of one key for another', () => ({ answer: proving((of) => ({ certify: { ...of.certify, srk: of.certify.recipient } })) }), 'srk.nonce'],
  ['a quote where a certification belongs', () => ({ answer: proving((of) => ({ certify: { ...of.certify, ldevid: of.quote } })) }), 'ldevid.nonce'],
  ['no proof of activation', () => ({ answer: proving(() => ({ proof: random(32) })) }), 'credential.proof'],
  ['a TLS key that was not bound', () => ({ answer: (body) => ({ ...body, binding: flip(body.binding) }) }), 'csr.tls.binding'],
  [
    'a TLS request for another key',
    async () => {
      const csr = await tlsCsr(newTlsKey(), 'GW-1')
      return { answer: (body) => ({ ...body, csr: { ...body.csr, tls: csr } }) }
    },
    'credential.proof',
  ],
  ['PCRs of its own choice', () => ({ challenge: demanding([0]) }), 'quote.selection.missing'],
  ['more PCRs than asked', () => ({ challenge: demanding([0, 1, 2, 3, 4, 5, 6, 7, 11]) }), 'quote.selection.extra'],
]

describe('refused as attestation-failed', () => {
  test.each(refused)('%s', async (_, of, reason) => {
    const { body } = await attempt(await of())
    expect(body).toMatchObject({ type: 'refusal', code: 'attestation-failed' })
    expect(await reasonOf()).toContain(reason)
    expect((await ctx.store.get('device', DeviceId.parse('gw-1')))?.state).toBe('registered')
    // Nothing is held against the genuine device.
    expect((await attempt()).body.type).toBe('identity')
  })

  test('a kernel that is not the one of the release', async () => {
    machine.board.flash.tamper('kernel', (bytes) => flip(bytes))
    machine.board.boot()
    expect((await attempt()).body).toMatchObject({ code: 'attestation-failed' })
    expect(await reasonOf()).toBe('reference.pcr-4')
  })

  test('a PCR that was extended after the boot', async () => {
    machine.board.tpm.extend(7, random(32))
    expect((await attempt()).body).toMatchObject({ code: 'attestation-failed' })
    expect(await reasonOf()).toBe('log.replay.mismatch')
  })

  test('a TPM that no batch names', async () => {
    const foreign = await machineOf('GW-1', ca)
    expect((await attempt({ attester: foreign.attester })).body).toMatchObject({ type: 'refusal', code: 'attestation-failed' })
  })

  test('an EK certificate of a CA that only bears the name of a trusted one', async () => {
    const foreign = await machineOf('GW-1', makeEkCa(ctx.clock.now))
    expect((await attempt({ attester: foreign.attester })).body).toMatchObject({ type: 'refusal', code: 'attestation-failed' })
    // Strangers are counted, not written one by one.
    expect(ctx.refusals.take()).toContain('ek.cert.bad-signature')
  })

  test('keys of another TPM below a genuine EK', async () => {
    const stolen = await other.attester.hello({ serial: 'GW-2', purpose: 'enrol', random: random(32), agent: 'test' })
    const { srk } = (stolen as HelloOf<'tpm2'>).presented
    const { body } = await attempt({ hello: (hello) => ({ ...hello, presented: { ...(hello as HelloOf<'tpm2'>).presented, srk } }) })
    expect(body).toMatchObject({ type: 'refusal' })
    expect((await ctx.store.get('device', DeviceId.parse('gw-1')))?.state).toBe('registered')
  })
})

describe('a challenge', () => {
  test('is spent by the first answer, whatever it was', async () => {
    const { from, answerBytes } = await attempt({ answer: proving(() => ({ proof: random(32) })) })
    const good = await attempt()
    expect(good.body.type).toBe('identity')
    await handle(from, answerBytes ?? new Uint8Array())
    expect(readMessage(ctx.bus.take(from.client).at(-1) ?? new Uint8Array(), { max }).envelope.body).toMatchObject({ type: 'refusal' })
  })

  test('runs out', async () => {
    const { body } = await attempt({ between: () => void (ctx.clock.now += 3_600_000) })
    expect(body).toMatchObject({ type: 'refusal', code: 'expired' })
  })

  test('is not spent by whoever cannot sign as its device', async () => {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    const thief: Signer = {
      kid: keyId(new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))),
      sign: async (tbs) => new Uint8Array(sign('sha256', tbs, { key: privateKey, dsaEncoding: 'ieee-p1363' })),
    }
    expect((await attempt({ answerSigner: thief })).body).toMatchObject({ type: 'refusal', code: 'unauthenticated' })
    expect((await ctx.store.find('challenge', { limit: 10 })).every(({ spentAt }) => spentAt === null)).toBe(true)
  })
})

/** Cases of the acceptance list (docs/attestation.md) that only the whole conversation shows. */
describe('numbered cases', () => {
  test('case 9: identity.other-ek, a device id with another EK', async () => {
    expect((await attempt()).body.type).toBe('identity')
    // Somebody rewrites the manifest in the database: the device's own record still says which hardware it is.
    const rows = await ctx.store.find('manifest', { limit: 10 })
    const [mine, theirs] = ['GW-1', 'GW-2'].map((serial) => rows.find((row) => row.serial === serial))
    if (mine === undefined || theirs === undefined) throw new Error('two rows were imported')
    const entry = { at: 0, caller: 'test', from: 'test', action: 'test', subject: 'test', outcome: 'done', code: null, detail: '' } as const
    await ctx.store.commit({ writes: [{ table: 'manifest', do: 'delete', id: mine.id, version: mine.version }], entries: [entry] })
    await ctx.store.commit({ writes: [{ table: 'manifest', do: 'update', row: { ...theirs, device: mine.device, serial: mine.serial } }], entries: [entry] })
    ctx.clock.now += 10_000
    expect((await attempt({ attester: other.attester })).body).toMatchObject({ code: 'attestation-failed' })
    expect(await reasonOf()).toBe('identity.other-ek')
  })

  test('case 9: an EK that is a device already is not imported as another', async () => {
    const factory = station('line-2')
    await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
    const rows = [{ serial: 'GW-9', ek: machine.ek }]
    const twice = { ...factory.signed(manifestJson({ batch: 'b2', model: 'gateway', station: factory.id }, rows)), format: 'json' as const }
    await expect(importBatch(ctx, operator(), twice)).rejects.toThrow(expect.objectContaining({ code: 'conflict' }) as Error)
  })

  test('case 10: manifest.unknown-ek, a genuine TPM that is not ours', async () => {
    const foreign = await machineOf('GW-1', ca)
    expect((await attempt({ attester: foreign.attester })).body).toMatchObject({ code: 'attestation-failed' })
    expect(ctx.refusals.take()).toContain('manifest.unknown-ek')
  })

  test('case 18: challenge.spent, a secret that is used twice', async () => {
    const { from, answerBytes } = await attempt({ answer: proving(() => ({ proof: random(32) })) })
    ctx.refusals.take()
    await handle(from, answerBytes ?? new Uint8Array())
    expect(ctx.refusals.take()).toContain('challenge.spent')
  })

  test('case 18: challenge.client, the challenge of another client', async () => {
    const stranger = ctx.bus.connect({ client: EnrolmentId.parse(`e-${randomBytes(16).toString('hex')}`) })
    await attempt({
      async answer(body) {
        const device = EnrolmentId.parse(stranger.client)
        const say = async (said: Body, seq: number): Promise<void> => {
          const envelope = { v: 1, tenant: TenantId.parse('plant'), device, from: 'device', id: random(16), seq, body: said } as const
          await handle(stranger, await signMessage(envelope, machine.attester.signer))
        }
        await say(await machine.attester.hello({ serial: 'GW-1', purpose: 'enrol', random: random(32), agent: 'test' }), 1)
        await say(body, 2)
        return body
      },
    })
    expect(ctx.refusals.take()).toContain('challenge.client')
  })

  test('case 52: challenge.unknown, a whole enrolment that is played again', async () => {
    const { from, helloBytes, answerBytes } = await attempt()
    ctx.bus.disconnect(from)
    const again = ctx.bus.connect({ client: from.client })
    ctx.refusals.take()
    await handle(again, helloBytes)
    await handle(again, answerBytes ?? new Uint8Array())
    expect(readMessage(ctx.bus.take(from.client).at(-1) ?? new Uint8Array(), { max }).envelope.body).toMatchObject({ type: 'refusal', code: 'not-found' })
    expect(ctx.refusals.take()).toContain('challenge.unknown')
  })

  const until = async (claimUntil: number | null): Promise<unknown> => await setClaimWindow(ctx, operator(), 'b1', claimUntil)
  const soon = (): number => ctx.clock.now + 60_000

  test('case 52: manifest.window-closed, a claim after the factory window', async () => {
    await until(soon())
    ctx.clock.now += 60_000
    expect((await attempt()).body).toMatchObject({ type: 'refusal', code: 'attestation-failed' })
    expect([await reasonOf(), (await ctx.store.get('device', DeviceId.parse('gw-1')))?.state]).toEqual(['manifest.window-closed', 'registered'])
    // Nothing of it was begun: no challenge waits for an answer.
    expect(await ctx.store.count('challenge')).toBe(0)
    // An operator extends it, and that is written down.
    await until(soon())
    expect((await ctx.entries()).at(-1)).toMatchObject({ action: 'batch.window', subject: 'b1', caller: 'operator:alice', outcome: 'done' })
    expect((await ctx.entries()).at(-1)?.detail).toMatch(/^was to be claimed until .*, now to be claimed until /)
    ctx.clock.now += 10_000
    expect((await attempt()).body.type).toBe('identity')
  })

  test('case 52: manifest.window-closed, between the challenge and its answer', async () => {
    await until(soon())
    const { body } = await attempt({ between: () => void (ctx.clock.now += 60_000) })
    expect([body, await reasonOf()]).toMatchObject([{ code: 'attestation-failed' }, 'manifest.window-closed'])
    expect(await ctx.store.count('certificate', { device: 'gw-1' })).toBe(0)
  })

  test('a device that has its identity comes back after the window, whoever never came does not', async () => {
    await until(soon())
    expect((await attempt()).body.type).toBe('identity')
    ctx.clock.now += 3_600_000
    expect((await attempt()).body.type).toBe('identity')
    expect((await attempt({ attester: other.attester, serial: 'GW-2' })).body).toMatchObject({ code: 'attestation-failed' })
    await until(null)
    ctx.clock.now += 10_000
    expect((await attempt({ attester: other.attester, serial: 'GW-2' })).body.type).toBe('identity')
  })

  test('the window is the owner’s to move', async () => {
    await expect(setClaimWindow(ctx, operator('operator'), 'b1', null)).rejects.toMatchObject({ code: 'forbidden' })
    await expect(setClaimWindow(ctx, operator(), 'b9', null)).rejects.toMatchObject({ code: 'not-found' })
  })

  test('case 51: connect.other-device, a peer that presents the client id of another device', async () => {
    for (const [one, serial] of [
      [machine, 'GW-1'],
      [other, 'GW-2'],
    ] as const)
      expect((await attempt({ attester: one.attester, serial })).body.type).toBe('identity')
    const tlsOf = async (device: string): Promise<Uint8Array> =>
      (await ctx.store.find('certificate', { where: { device }, limit: 10 })).find(({ profile }) => profile === 'device-tls')?.der ?? new Uint8Array()
    const exporter = random(32)
    /** CONNECT with the TLS certificate of one device, the LDevID key of one, and the client id of one. */
    const connect = async (of: { certificate: string; attester: Attester; clientId: string; over?: Uint8Array }): Promise<unknown> => {
      const certificate = await tlsOf(of.certificate)
      const proof = await of.attester.sign(connectProof('plant', of.clientId, certificate, of.over ?? exporter))
      const password = new TextEncoder().encode(Buffer.from(proof).toString('base64url'))
      return await admitConnection(ctx, { clientId: of.clientId, username: of.clientId, password, certificate, exporter, from: '127.0.0.0/24' })
    }
    expect(await connect({ certificate: 'gw-1', attester: machine.attester, clientId: 'gw-1' })).toMatchObject({ device: 'gw-1' })
    expect(await connect({ certificate: 'gw-1', attester: machine.attester, clientId: 'gw-2' })).toEqual({ refused: 'forbidden' })
    // On the record of who did it; the one whose name was used has nothing against it.
    expect([await reasonOf('gw-1'), await reasonOf('gw-2')]).toEqual(['connect.other-device', undefined])
    // With a stolen TLS key as well: the proof of its own TPM is none of the other's, nor is one that the other made for another connection.
    ctx.clock.now += 10_000
    expect(await connect({ certificate: 'gw-2', attester: machine.attester, clientId: 'gw-2' })).toEqual({ refused: 'unauthenticated' })
    expect(await reasonOf('gw-2')).toBe('connect.proof')
    expect(await connect({ certificate: 'gw-2', attester: other.attester, clientId: 'gw-2', over: random(32) })).toEqual({ refused: 'unauthenticated' })
  })

  test('case 51: enrol.other-device, the connection of one device presents the EK of another', async () => {
    await attempt()
    await attempt({ attester: other.attester, serial: 'GW-2' })
    const from = ctx.bus.connect({ client: 'gw-2', device: 'gw-2' })
    const body = await machine.attester.hello({ serial: 'GW-1', purpose: 'return', random: random(32), agent: 'test' })
    const device = DeviceId.parse('gw-2')
    await handle(
      from,
      await signMessage({ v: 1, tenant: TenantId.parse('plant'), device, from: 'device', id: random(16), seq: 1, body }, machine.attester.signer),
    )
    const answers = ctx.bus.take('gw-2').map((bytes) => readMessage(bytes, { max }).envelope.body)
    expect(answers.filter(({ type }) => type === 'challenge' || type === 'identity')).toEqual([])
    expect(answers.at(-1)).toMatchObject({ type: 'refusal', code: 'forbidden' })
    expect(await reasonOf()).toBe('enrol.other-device')
  })
})

test('a revoked device does not come back by enrolling', async () => {
  await attempt()
  const device = await ctx.store.get('device', DeviceId.parse('gw-1'))
  if (device?.state !== 'enrolled') throw new Error('not enrolled')
  await revokeDevice(ctx, operator(), device.id, 'stolen')
  expect((await attempt()).body).toMatchObject({ type: 'refusal', code: 'forbidden' })
})
