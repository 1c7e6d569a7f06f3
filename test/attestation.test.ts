import { randomBytes } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import type { Asked, Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { createBoard, install, type Board } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeEkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { buildRelease, referenceValues, simulatedImages, type Release } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { DeviceId, EnrolmentId, GroupId, KeyId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body, BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage, signMessage } from '@fleetkey/protocol/signed.ts'
import { sealedProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import type { Campaign } from '@fleetkey/server/campaigns/campaign.ts'
import { hasIdentity, isMeasured, type MeasuredDevice } from '@fleetkey/server/fleet/device.ts'
import { approveReleases, firmwareOf } from '@fleetkey/server/flows/approvals.ts'
import { orderAttestation } from '@fleetkey/server/flows/attest.ts'
import type { DeviceRef } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { addMembers, createGroup, previewPolicy, removeMember, setGroupPolicy, type PolicyChange } from '@fleetkey/server/flows/group.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { settleOwedRotations } from '@fleetkey/server/flows/owed-rotation.ts'
import { settleOwedAppraisals } from '@fleetkey/server/flows/reappraise.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { drive } from '@fleetkey/server/flows/drive.ts'
import { startRotation } from '@fleetkey/server/flows/rotate.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { previewWithdrawal, withdrawRelease } from '@fleetkey/server/flows/withdraw-release.ts'
import { openDeviceKeys, provision, type DeviceKeyBlobs } from '@fleetkey/tpm2/device-keys.ts'
import { parsePublic } from '@fleetkey/tpm2/structures.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const max = 4 << 20
const built = (number: number, debug = false): Release =>
  buildRelease({ model: 'gateway', name: `${number}.0.0`, number, debug }, simulatedImages(`gateway/${number}`, new TextEncoder().encode('agent')))
const releases = { one: built(1), two: built(2), debug: built(9, true) }
const plant = GroupId.parse('plant')
const id = DeviceId.parse('gw-1')
const telemetry = KeyId.parse('telemetry')
const hour = 3_600_000

let ctx: TestContext
let handle: (from: DeviceRef, bytes: Uint8Array) => Promise<void>
let factory: ReturnType<typeof station>
let board: Board
let blobs: DeviceKeyBlobs
let attester: Attester
/** The device's connection, and the session nonce of its welcome. */
let from: DeviceRef
let session: Uint8Array
let sequence: number

const openAttester = async (): Promise<Attester> => tpm2Attester(await openDeviceKeys(new Tpm(board.transport(), { random }), blobs))

beforeEach(async () => {
  ctx = await testContext()
  handle = deviceHandler(ctx, { policy: { requireEkCertificate: false }, reportEvery: 300 })
  factory = station()
  const ca = makeEkCa(ctx.clock.now)
  const tpm = createSoftwareTpm({ random, now: () => ctx.clock.now })
  const ek = await personalise(tpm, ca, { random, now: ctx.clock.now })
  board = createBoard({ serial: 'GW-1', tpm, flash: new Flash() })
  install(board, releases.one)
  board.boot()
  blobs = await provision(new Tpm(board.transport(), { random }))
  attester = await openAttester()
  await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ca.certificate), test: true })
  await imported(releases.one)
  const rows = [{ serial: 'GW-1', ek }]
  await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch: 'b1', model: 'gateway', station: factory.id }, rows)), format: 'json' })
  await createGroup(ctx, operator(), plant)
  await addMembers(ctx, operator(), plant, { batch: 'b1' })
  await createKey(ctx, operator(), { id: telemetry, protection: 'sealed' })
  await grantKey(ctx, operator(), telemetry, plant)
})
afterEach(async () => await ctx.close())

const imported = async (release: Release): Promise<unknown> => await importRelease(ctx, operator(), factory.signed(referenceValues(release.manifest)))

const heard = (client: string): Body[] => ctx.bus.take(client).map((bytes) => readMessage(bytes, { max }).envelope.body)

/** Enrolment as any device does it; what the server answered. */
const enrol = async (purpose: 'enrol' | 'return' = 'enrol'): Promise<Body | undefined> => {
  const client = EnrolmentId.parse(`e-${randomBytes(16).toString('hex')}`)
  const guest = ctx.bus.connect({ client })
  const send = async (body: Body): Promise<Uint8Array> => {
    const bytes = await signMessage({ v: 1, tenant: TenantId.parse('plant'), device: client, from: 'device', id: random(16), seq: 1, body }, attester.signer)
    await handle(guest, bytes)
    return bytes
  }
  const hello = await attester.hello({ serial: 'GW-1', purpose, random: random(32), agent: 'test' })
  const helloBytes = await send(hello)
  const challenge = readMessage(ctx.bus.take(client).at(-1) ?? new Uint8Array(), { max })
  if (challenge.envelope.body.type !== 'challenge') return challenge.envelope.body
  const key = newTlsKey()
  const exporter = guest.exporter ?? new Uint8Array()
  const answer = await attester.answer({
    tenant: 'plant',
    hello,
    helloBytes,
    challenge: challenge.envelope.body,
    challengeBytes: challenge.bytes,
    exporter,
    eventLog: board.eventLog(),
    tls: { spki: key.spki, csr: await tlsCsr(key, 'GW-1') },
  })
  await send(answer)
  return heard(client).at(-1)
}

const connect = async (): Promise<void> => {
  from = ctx.bus.connect({ client: id, device: id })
  await expect.poll(() => ctx.bus.sent.some(({ client }) => client === id)).toBe(true)
  const [welcome] = heard(id)
  if (welcome?.type !== 'welcome') throw new Error('no welcome')
  session = welcome.session
  sequence = 0
}

const say = async (body: Body): Promise<Body[]> => {
  await handle(from, await signMessage({ v: 1, tenant: TenantId.parse('plant'), device: id, from: 'device', id: random(16), seq: 1, body }, attester.signer))
  return heard(id)
}

const report = async (of: Partial<BodyOf<'report'>> = {}): Promise<Body[]> =>
  await say({
    type: 'report',
    session,
    sequence: ++sequence,
    holdings: [],
    usage: [],
    resetCount: await attester.resetCount(),
    tlsNotAfter: 1,
    places: [],
    trust: null,
    agent: 'test',
    ...of,
  })

const attestOf = (bodies: readonly Body[]): BodyOf<'attest'> => {
  const found = bodies.find((body) => body.type === 'attest')
  if (found === undefined) throw new Error(`not asked, but sent ${bodies.map(({ type }) => type).join(', ') || 'nothing'}`)
  return found
}

/** Evidence as the device makes it; any input of it may be another. */
const evidence = async (attest: BodyOf<'attest'>, of: Partial<Asked> = {}): Promise<BodyOf<'evidence'>> => {
  const exporter = from.exporter ?? new Uint8Array()
  const made = await attester.evidence?.({ tenant: 'plant', device: id, session, attest, exporter, eventLog: board.eventLog(), ...of })
  if (made === undefined) throw new Error('no evidence')
  return made
}

const types = (bodies: readonly Body[]): readonly string[] => bodies.map(({ type }) => type)

const device = async (): Promise<MeasuredDevice> => {
  const row = await ctx.store.get('device', id)
  if (!hasIdentity(row) || !isMeasured(row)) throw new Error(`the device is ${row?.state ?? 'unknown'}`)
  return row
}
const stateAndReason = async (): Promise<readonly [string, string]> => {
  const { state, verdict } = await device()
  return [state, verdict.reason]
}

/** Power off and on, with whatever is on the flash; the agent starts anew and connects. */
const reboot = async (how?: Parameters<Board['boot']>[0]): Promise<void> => {
  ctx.bus.disconnect(from)
  board.boot(how)
  attester = await openAttester()
  await connect()
}

const tamper = (): void => board.flash.tamper('kernel', (bytes) => bytes.map((byte, at) => (at === 100 ? byte ^ 1 : byte)))

const enrolled = async (): Promise<void> => {
  expect(await enrol()).toMatchObject({ type: 'identity', device: id })
  await connect()
}

/** No delivery waits for, or was sent to, a quarantined device. */
const getsNothing = async (): Promise<void> => {
  expect((await ctx.store.find('outbox', { where: { device: id }, limit: 50 })).map(({ subject }) => subject)).toEqual([])
  expect(types(heard(id)).filter((type) => type !== 'attest' && type !== 'approvals' && type !== 'refusal')).toEqual([])
}

describe('a device that boots', () => {
  beforeEach(enrolled)

  test('right after enrolment it gets its keys without being asked again', async () => {
    expect(types(await report())).toEqual(['delivery'])
    expect(await device()).toMatchObject({
      state: 'enrolled',
      release: 'gateway/1.0.0',
      floor: 1,
      verdict: { verdict: 'affirming', reason: 'release.current' },
    })
  })

  test('into the same firmware: asked before any key, then keys at once', async () => {
    await reboot()
    const told = await report()
    expect(types(told)).toEqual(['attest'])
    // Whatever else happens on the server's side, nothing leaves before the evidence.
    await createKey(ctx, operator(), { id: KeyId.parse('command'), protection: 'sealed' })
    await grantKey(ctx, operator(), KeyId.parse('command'), plant)
    expect(heard(id)).toEqual([])
    expect(types(await say(await evidence(attestOf(told)))).toSorted()).toEqual(['delivery', 'delivery'])
    const { verdict, resetCount, reportedResetCount } = await device()
    expect([verdict.verdict, resetCount === reportedResetCount, resetCount === (await attester.resetCount())]).toEqual(['affirming', true, true])
    expect(verdict.claims.map(({ name }) => name)).toContain('pcr-4')
  })

  test('after a power cut its clock is not safe for a while: it attests all the same, as often as it is asked', async () => {
    await reboot({ shutdown: 'none' })
    expect(types(await say(await evidence(attestOf(await report()))))).toEqual(['delivery'])
    expect((await device()).verdict.claims).toContainEqual({ name: 'clock-safe', value: 'no' })
    const { at } = (await device()).verdict
    ctx.clock.now += 60_000
    expect(await orderAttestation(ctx, operator(), id)).toBe('asked')
    await say(await evidence(attestOf(heard(id))))
    expect(await device()).toMatchObject({ state: 'enrolled', lastRefusal: null, verdict: { verdict: 'affirming', at: at + 60_000 } })
  })

  test('into tampered firmware: quarantined, its deliveries are gone, and back once the flash is restored', async () => {
    // One delivery waits unacknowledged.
    await report()
    expect(await ctx.store.count('outbox', { device: id })).toBe(1)
    tamper()
    await reboot()
    const told = await report()
    expect(types(told)).toEqual(['attest'])
    expect(await say(await evidence(attestOf(told)))).toMatchObject([{ type: 'refusal', code: 'attestation-failed' }])
    expect(await stateAndReason()).toEqual(['quarantined', 'reference.pcr-4'])
    await getsNothing()
    // Keys stop, whoever causes them; it stays connected and may report.
    await createKey(ctx, operator(), { id: KeyId.parse('command'), protection: 'sealed' })
    await grantKey(ctx, operator(), KeyId.parse('command'), plant)
    await report()
    await getsNothing()
    tamper()
    await reboot()
    expect(types(await say(await evidence(attestOf(await report())))).toSorted()).toEqual(['delivery', 'delivery'])
    expect(await stateAndReason()).toEqual(['enrolled', 'release.current'])
    expect('quarantinedAt' in (await device())).toBe(false)
    const done = (await ctx.entries()).filter(({ action, outcome }) => action === 'device.evidence' && outcome === 'done').map(({ detail }) => detail)
    expect(done[0]).toMatch(/^quarantined: reference\.pcr-4/)
    expect(done[1]).toMatch(/affirming release\.current.*no longer quarantined/)
  })

  test('it stays out while nothing has changed, and is asked again', async () => {
    tamper()
    await reboot()
    await say(await evidence(attestOf(await report())))
    const { quarantinedAt } = (await device()) as { quarantinedAt?: number }
    ctx.clock.now += 120_000
    expect(await say(await evidence(attestOf(await report())))).toMatchObject([{ type: 'refusal', code: 'attestation-failed' }])
    expect(await device()).toMatchObject({ state: 'quarantined', quarantinedAt })
  })

  test('a resetCount that an agent keeps to itself changes nothing once it is asked', async () => {
    tamper()
    const before = await attester.resetCount()
    await reboot()
    // It lies in its report: until the verdict ages nobody asks. Then the quote tells.
    await report({ resetCount: before })
    ctx.clock.now += 25 * hour
    expect(await say(await evidence(attestOf(await report({ resetCount: before }))))).toMatchObject([{ type: 'refusal' }])
    expect((await device()).state).toBe('quarantined')
  })
})

describe('evidence', () => {
  beforeEach(async () => {
    await enrolled()
    await reboot()
  })

  test('counts once', async () => {
    const body = await evidence(attestOf(await report()))
    expect(types(await say(body))).toEqual(['delivery'])
    expect(await say(body)).toMatchObject([{ type: 'refusal', code: 'conflict' }])
    expect((await ctx.entries()).at(-1)?.detail).toContain('attest.challenge')
    expect((await device()).state).toBe('enrolled')
  })

  test('that nobody asked for, or for an older challenge, changes nothing', async () => {
    const first = attestOf(await report())
    ctx.clock.now += 31_000
    const second = attestOf(await report())
    expect(second.challenge).not.toEqual(first.challenge)
    expect(await say(await evidence(first))).toMatchObject([{ type: 'refusal', code: 'conflict' }])
    expect(types(await say(await evidence(second)))).toEqual(['delivery'])
  })

  test('of an earlier connection is for a challenge that is gone', async () => {
    const body = await evidence(attestOf(await report()))
    await reboot()
    await report()
    expect(await say(body)).toMatchObject([{ type: 'refusal', code: 'conflict' }])
    expect((await device()).state).toBe('enrolled')
  })

  test('after its time', async () => {
    const body = await evidence(attestOf(await report()))
    ctx.clock.now += 121_000
    expect(await say(body)).toMatchObject([{ type: 'refusal', code: 'expired' }])
    expect((await device()).state).toBe('enrolled')
  })

  const wrong: readonly [string, Partial<Asked>, string][] = [
    ['made for another connection: a relay', { exporter: random(32) }, 'quote.nonce'],
    ['made for another session', { session: random(16) }, 'quote.nonce'],
    ['made in the name of another device', { device: 'gw-2' }, 'quote.nonce'],
    ['with a log that is none', { eventLog: new Uint8Array(200).fill(0xff) }, 'log.'],
  ]
  test.each(wrong)('%s', async (_name, of, reason) => {
    expect(await say(await evidence(attestOf(await report()), of))).toMatchObject([{ type: 'refusal', code: 'attestation-failed' }])
    expect(await stateAndReason()).toEqual(['quarantined', expect.stringContaining(reason)])
    expect((await device()).verdict.claims).toEqual([])
    // A good quote brings it back.
    ctx.clock.now += 60_000
    expect(types(await say(await evidence(attestOf(await report()))))).toEqual(['delivery'])
    expect((await device()).state).toBe('enrolled')
  })

  test('whose log leaves an event out', async () => {
    const attest = attestOf(await report())
    const body = await evidence(attest)
    expect(await say({ ...body, eventLog: body.eventLog.subarray(0, 75) })).toMatchObject([{ type: 'refusal', code: 'attestation-failed' }])
    expect((await device()).state).toBe('quarantined')
  })

  test('with a recipient key or an IMA list that was not asked for', async () => {
    const body = await evidence(attestOf(await report()))
    await say({ ...body, ima: { from: 0, list: random(10) } })
    expect(await stateAndReason()).toEqual(['quarantined', 'ima.unasked'])
  })

  test('with a measurement list from another entry than was asked for', async () => {
    await setGroupPolicy(ctx, operator(), plant, { ima: 'required' })
    const attest = attestOf(await report())
    expect(attest.ima).toBe(0)
    const measurements = async () => ({ list: board.imaList(), ended: true })
    const body = await evidence(attest, { measurements })
    await say({ ...body, ima: { from: 1, list: body.ima?.list ?? new Uint8Array(0) } })
    expect(await stateAndReason()).toEqual(['quarantined', 'ima.unasked'])
    ctx.clock.now += 60_000
    // The list is bound by the quote: not even the same bytes under another quote.
    const again = attestOf(await report())
    const [one, other] = [await evidence(again, { measurements }), await evidence(again)]
    await say({ ...one, quote: other.quote })
    expect(await stateAndReason()).toEqual(['quarantined', 'quote.nonce'])
    ctx.clock.now += 60_000
    expect(types(await say(await evidence(attestOf(await report()), { measurements })))).toEqual(['delivery'])
    expect(await device()).toMatchObject({ state: 'enrolled', verdict: { verdict: 'affirming' } })
  })

  test('of a PCR that was extended after the boot', async () => {
    board.tpm.extend(7, random(32))
    await say(await evidence(attestOf(await report())))
    expect(await stateAndReason()).toEqual(['quarantined', 'log.replay.mismatch'])
  })

  test('of a TPM that was reset under the running connection, its measurements fed to it again', async () => {
    await report()
    board.boot()
    attester = await openAttester()
    ctx.clock.now += 31_000
    await say(await evidence(attestOf(await report())))
    expect(await stateAndReason()).toEqual(['quarantined', 'tpm.reset-in-session'])
  })
})

describe('an acknowledgement', () => {
  beforeEach(enrolled)

  const delivered = async (): Promise<BodyOf<'delivery'>> => {
    const found = (await report()).find((body) => body.type === 'delivery')
    if (found === undefined) throw new Error('nothing was delivered')
    return found
  }
  const active = (of: BodyOf<'delivery'>, more: Partial<BodyOf<'acknowledge'>> = {}): Body => ({
    type: 'acknowledge',
    key: of.key,
    epoch: of.epoch,
    stage: 'active',
    campaign: of.campaign,
    nonce: of.nonce,
    proof: random(32),
    reason: null,
    ...more,
  })
  /** What a device that has the key makes. */
  const proofOf = async (of: BodyOf<'delivery'>, nonce = of.nonce): Promise<Uint8Array> => {
    const epoch = await ctx.store.get('epoch', `${of.key}/${of.epoch}`)
    if (epoch === undefined) throw new Error('no epoch')
    return sealedProof(ctx.vault.open(epoch), useTranscript({ tenant: 'plant', device: id, key: of.key, epoch: of.epoch, nonce }))
  }
  const stage = async (of: BodyOf<'delivery'>): Promise<string | undefined> => (await ctx.store.get('holding', `${id}/${of.key}/${of.epoch}`))?.stage
  /** What the audit log says of the last refusal: reason and detail. */
  const reasonOf = async (): Promise<string | undefined> => (await ctx.entries()).findLast(({ outcome }) => outcome === 'refused')?.detail.split(':')[0]

  test('case 50: acknowledge.proof, a key that the device cannot open', async () => {
    const delivery = await delivered()
    expect(types(await say(active(delivery)))).toEqual(['refusal'])
    expect([await reasonOf(), await stage(delivery)]).toEqual(['acknowledge.proof', 'delivered'])
    // Neither without a proof, nor with the right key over another nonce.
    for (const proof of [null, await proofOf(delivery, random(16))]) {
      await say(active(delivery, { proof }))
      expect(await stage(delivery)).toBe('delivered')
    }
    await say(active(delivery, { proof: await proofOf(delivery) }))
    expect(await stage(delivery)).toBe('active')
  })

  test('case 50: acknowledge.nonce, the acknowledgement of another delivery', async () => {
    const delivery = await delivered()
    const nonce = random(16)
    expect(types(await say(active(delivery, { nonce, proof: await proofOf(delivery, nonce) })))).toEqual(['refusal'])
    expect([await reasonOf(), await stage(delivery)]).toEqual(['acknowledge.nonce', 'delivered'])
    await say(active(delivery, { proof: await proofOf(delivery) }))
    expect(await stage(delivery)).toBe('active')
  })
})

describe('the age of a verdict', () => {
  beforeEach(enrolled)

  test('asked before it is too old, keys go on meanwhile', async () => {
    ctx.clock.now += 20 * hour
    expect(types(await report()).toSorted()).toEqual(['attest', 'delivery'])
  })

  test('once too old no key is released before the evidence, also not when something is granted', async () => {
    await report()
    ctx.clock.now += 25 * hour
    await createKey(ctx, operator(), { id: KeyId.parse('command'), protection: 'sealed' })
    await grantKey(ctx, operator(), KeyId.parse('command'), plant)
    const told = heard(id)
    expect(types(told)).toEqual(['attest'])
    // The one that it never acknowledged, and the new one.
    expect(types(await say(await evidence(attestOf(told))))).toEqual(['delivery', 'delivery'])
  })

  test('the shortest age of its groups counts', async () => {
    await createGroup(ctx, operator(), GroupId.parse('vault'))
    await setGroupPolicy(ctx, operator(), GroupId.parse('vault'), { attestAge: 600 })
    await addMembers(ctx, operator(), GroupId.parse('vault'), { devices: [id] })
    heard(id)
    ctx.clock.now += 601_000
    expect(types(await report())).toEqual(['attest'])
  })

  test('what an operator orders is carried out now, or at the next connection', async () => {
    expect(await orderAttestation(ctx, operator(), id)).toBe('asked')
    await say(await evidence(attestOf(heard(id))))
    expect((await device()).attestOrderedAt).toBeNull()
    ctx.bus.disconnect(from)
    expect(await orderAttestation(ctx, operator(), id)).toBe('offline')
    await connect()
    expect(types(await report()).toSorted()).toEqual(['attest', 'delivery'])
    await expect(orderAttestation(ctx, operator('auditor'), id)).rejects.toMatchObject({ code: 'forbidden' })
  })
})

describe('what is acceptable changes', () => {
  beforeEach(async () => {
    await imported(releases.two)
    await imported(releases.debug)
    await enrolled()
    await report()
  })

  const update = async (release: Release): Promise<readonly string[]> => {
    install(board, release)
    await reboot()
    return types(await say(await evidence(attestOf(await report()))))
  }

  test('an update is accepted, going back is not', async () => {
    expect((await device()).verdict).toMatchObject({ verdict: 'warning', reason: 'release.older' })
    expect(await update(releases.two)).toEqual(['delivery'])
    expect(await device()).toMatchObject({ release: 'gateway/2.0.0', floor: 2, verdict: { verdict: 'affirming' } })
    expect(await update(releases.one)).toEqual(['refusal'])
    expect(await stateAndReason()).toEqual(['quarantined', 'release.rollback'])
    // What it was last accepted with stays on its record, and the floor with it.
    expect(await device()).toMatchObject({ release: 'gateway/2.0.0', floor: 2, verdict: { release: 'gateway/1.0.0' } })
    expect(await update(releases.two)).toEqual(['delivery'])
  })

  test('withdrawing a release: the preview says whom, then they are quarantined in the same breath', async () => {
    expect(await previewWithdrawal(ctx, 'gateway/1.0.0')).toEqual({ judged: 1, quarantines: 1, first: [{ device: id, reason: 'release.withdrawn' }] })
    expect((await device()).state).toBe('enrolled')
    expect(await withdrawRelease(ctx, operator(), 'gateway/1.0.0', 'CVE-2027-1')).toMatchObject({ judged: 1, quarantines: 1 })
    expect(await stateAndReason()).toEqual(['quarantined', 'release.withdrawn'])
    await getsNothing()
    // What it gets is wrapped to a recipient key of the next generation.
    const { recipient } = (await device()).keys
    expect(await update(releases.two)).toEqual(['delivery'])
    expect((await device()).state).toBe('enrolled')
    expect((await device()).keys.recipient).not.toEqual(recipient)
    await expect(withdrawRelease(ctx, operator(), 'gateway/1.0.0', 'again')).rejects.toMatchObject({ code: 'conflict' })
    await expect(withdrawRelease(ctx, operator('operator'), 'gateway/2.0.0', 'no')).rejects.toMatchObject({ code: 'forbidden' })
  })

  test('a crash right after the withdrawal: the next start judges the devices', async () => {
    const { step } = ctx
    const crashing: TestContext = {
      ...ctx,
      step(name) {
        step(name)
        if (name === 'release.withdrawn') throw new Error('power')
      },
    }
    await expect(withdrawRelease(crashing, operator(), 'gateway/1.0.0', 'CVE-2027-1')).rejects.toThrow('power')
    expect((await device()).state).toBe('enrolled')
    await settleOwedAppraisals(ctx)
    expect((await device()).state).toBe('quarantined')
    expect(await ctx.store.find('setting', { prefix: 'owed-appraisal/', limit: 10 })).toEqual([])
  })

  test('a release that is withdrawn while evidence for it is being committed', async () => {
    install(board, releases.two)
    await reboot()
    const body = await evidence(attestOf(await report()))
    const commit = ctx.store.commit.bind(ctx.store)
    let raced = false
    const spy = vi.spyOn(ctx.store, 'commit').mockImplementation(async (changes, options) => {
      if (!raced && changes.entries.some(({ action }) => action === 'device.evidence')) {
        raced = true
        // Judged by what the device proved before: it is not among those that the withdrawal quarantines.
        expect(await withdrawRelease(ctx, operator(), 'gateway/2.0.0', 'CVE-2027-2')).toMatchObject({ quarantines: 0 })
      }
      return await commit(changes, options)
    })
    await say(body)
    spy.mockRestore()
    expect(raced).toBe(true)
    expect(await stateAndReason()).toEqual(['quarantined', 'release.withdrawn'])
    await getsNothing()
  })

  test('a debug release only where policy lets it pass, with a warning', async () => {
    expect(await update(releases.debug)).toEqual(['refusal'])
    expect(await stateAndReason()).toEqual(['quarantined', 'release.debug'])
    await setGroupPolicy(ctx, operator(), plant, { onDebug: 'warn' })
    // It is asked at once: it was acceptable all along, but only a fresh quote brings it back.
    expect((await device()).state).toBe('quarantined')
    expect(types(await say(await evidence(attestOf(heard(id)))))).toEqual(['delivery'])
    expect(await device()).toMatchObject({ state: 'enrolled', verdict: { verdict: 'warning', reason: 'release.debug' } })
  })

  test('unknown firmware that policy lets pass is enrolled without a release', async () => {
    await setGroupPolicy(ctx, operator(), plant, { onUnknown: 'warn' })
    tamper()
    await reboot()
    expect(types(await say(await evidence(attestOf(await report()))))).toEqual(['delivery'])
    expect(await device()).toMatchObject({ state: 'enrolled', release: null, floor: 1, verdict: { verdict: 'warning', reason: 'reference.pcr-4' } })
  })

  const policies: readonly [string, PolicyChange, string][] = [
    ['a list without its release', { releases: ['gateway/2.0.0'] }, 'release.not-accepted'],
    ['a minimum above it', { minimumRelease: 2 }, 'release.below-minimum'],
  ]
  test.each(policies)('a policy with %s', async (_name, change, reason) => {
    expect(await previewPolicy(ctx, plant, change)).toEqual({ judged: 1, quarantines: 1, first: [{ device: id, reason }] })
    expect((await device()).state).toBe('enrolled')
    await setGroupPolicy(ctx, operator(), plant, change)
    expect(await stateAndReason()).toEqual(['quarantined', reason])
    await getsNothing()
    expect(await update(releases.two)).toEqual(['delivery'])
  })

  test('a list with a release that is not there is refused', async () => {
    await expect(setGroupPolicy(ctx, operator(), plant, { releases: ['gateway/2.0'] })).rejects.toMatchObject({ code: 'not-found' })
    expect((await device()).state).toBe('enrolled')
  })

  test('joining a stricter group judges the device before any key of it leaves; leaving asks it again', async () => {
    const vault = GroupId.parse('vault')
    await createGroup(ctx, operator(), vault)
    await setGroupPolicy(ctx, operator(), vault, { minimumRelease: 2 })
    await createKey(ctx, operator(), { id: KeyId.parse('safe'), protection: 'sealed' })
    await grantKey(ctx, operator(), KeyId.parse('safe'), vault)
    heard(id)
    await addMembers(ctx, operator(), vault, { devices: [id] })
    expect(await stateAndReason()).toEqual(['quarantined', 'release.below-minimum'])
    await getsNothing()
    await removeMember(ctx, operator(), vault, id)
    expect(types(await say(await evidence(attestOf(heard(id)))))).toEqual(['delivery'])
  })

  test('an assurance that it does not reach: a member, and its keys are taken back', async () => {
    await setGroupPolicy(ctx, operator(), plant, { assurance: 'attested' })
    expect(heard(id)).toMatchObject([{ type: 'retire', key: telemetry, below: null }])
    expect((await device()).state).toBe('enrolled')
    await setGroupPolicy(ctx, operator(), plant, { assurance: 'simulated' })
    expect(types(heard(id))).toEqual(['delivery'])
  })

  test('it can be revoked', async () => {
    await withdrawRelease(ctx, operator(), 'gateway/1.0.0', 'CVE-2027-1')
    const { keys } = await revokeDevice(ctx, operator(), id, 'stolen')
    expect(keys).toEqual([telemetry])
    expect(await ctx.store.get('device', id)).toMatchObject({ state: 'revoked', keys: { ekHash: expect.any(String) as string } })
  })
})

describe('a rotation', () => {
  beforeEach(async () => {
    await enrolled()
    await report()
  })
  /** It boots what nobody knows. */
  const turns = async (): Promise<void> => {
    tamper()
    await reboot()
    await say(await evidence(attestOf(await report())))
    expect(await stateAndReason()).toEqual(['quarantined', 'reference.pcr-4'])
  }
  const campaigns = async (): Promise<readonly Campaign[]> => await ctx.store.find('campaign', { limit: 10 })

  test('drops a device that is quarantined with an outcome of its own, and comes to its end', async () => {
    const { campaign } = await startRotation(ctx, operator(), telemetry, { because: 'test' })
    await drive(ctx, campaign)
    expect(types(heard(id))).toContain('delivery')
    await turns()
    expect(await ctx.store.get('target', `${campaign}/${id}`)).toMatchObject({ stage: 'quarantined', reason: 'reference.pcr-4' })
    expect(ctx.woken).toContain(campaign)
    await drive(ctx, campaign)
    expect((await ctx.store.get('campaign', campaign))?.state).toBe('activating')
    await getsNothing()
    ctx.clock.now += 30 * 24 * hour
    await drive(ctx, campaign)
    expect((await ctx.store.get('campaign', campaign))?.state).toBe('done')
  })

  test('does not target a quarantined device', async () => {
    await turns()
    const { campaign } = await startRotation(ctx, operator(), telemetry, { because: 'test' })
    expect(await ctx.store.count('target', { campaign })).toBe(0)
  })

  test('of everything a withdrawn release could reach, without the devices that run it', async () => {
    await withdrawRelease(ctx, operator(), 'gateway/1.0.0', 'CVE-2027-1')
    expect(await stateAndReason()).toEqual(['quarantined', 'release.withdrawn'])
    expect(await campaigns()).toMatchObject([{ key: telemetry, to: 2, because: 'release gateway/1.0.0 withdrawn' }])
    expect(await ctx.store.count('target', { device: id })).toBe(0)
  })

  test('without the device when policy says so, once', async () => {
    await setGroupPolicy(ctx, operator(), plant, { rotateOnQuarantine: true })
    expect(await campaigns()).toEqual([])
    await turns()
    expect(await campaigns()).toMatchObject([{ key: telemetry, to: 2 }])
    expect(await ctx.store.count('target', { device: id })).toBe(0)
    ctx.clock.now += 120_000
    await say(await evidence(attestOf(await report())))
    expect(await campaigns()).toHaveLength(1)
    expect(ctx.bus.kicked).toEqual([])
  })
})

describe('withdrawing a release that others ran', () => {
  beforeEach(async () => {
    await enrolled()
    await imported(releases.two)
    await report()
    heard(id)
  })
  const withdrawn = async (): Promise<BodyOf<'attest'>> => {
    await withdrawRelease(ctx, operator(), 'gateway/2.0.0', 'CVE-2027-2')
    return attestOf(heard(id))
  }
  const policyOf = (publicBytes: Uint8Array): Uint8Array => parsePublic(publicBytes).authPolicy

  test('a connected device hears what is approved now, and is asked for a recipient key under the next generation', async () => {
    const before = await firmwareOf(ctx, 'gateway')
    await withdrawRelease(ctx, operator(), 'gateway/2.0.0', 'CVE-2027-2')
    const after = await firmwareOf(ctx, 'gateway')
    expect([before.generation, after.generation]).toEqual([1, 2])
    const bodies = heard(id)
    expect(bodies.find((body) => body.type === 'approvals')).toMatchObject({ ...after.policy, approvals: [{ release: 'gateway/1.0.0', number: 1 }] })
    expect(attestOf(bodies).firmware).toEqual(after.policy)
    expect((await ctx.store.find('campaign', { limit: 10 })).map(({ because }) => because)).toEqual(['release gateway/2.0.0 withdrawn'])
  })

  test('nothing is wrapped to its old recipient key, all that waits is wrapped to the new one', async () => {
    const attest = await withdrawn()
    expect(types(await report())).toEqual([])
    const { recipient } = (await device()).keys
    expect(types(await say(await evidence(attest)))).toContain('delivery')
    const { state, keys } = await device()
    expect(state).toBe('enrolled')
    expect(keys.recipient).not.toEqual(recipient)
    expect(policyOf(keys.recipient)).toEqual((await firmwareOf(ctx, 'gateway')).authPolicy)
    // The next report is answered as ever.
    expect(types(await report()).filter((type) => type === 'attest')).toEqual([])
  })

  const wrong: readonly (readonly [string, (of: BodyOf<'evidence'>, attest: BodyOf<'attest'>) => Promise<BodyOf<'evidence'>>, string])[] = [
    ['with no key', async (of) => ({ ...of, recipient: null }), 'recipient.unasked'],
    [
      'with the key of before',
      async (of) => ({ ...of, recipient: of.recipient && { ...of.recipient, public: (await device()).keys.recipient } }),
      'quote.nonce',
    ],
    ['with a certification of another nonce', async (of) => ({ ...of, recipient: of.recipient && { ...of.recipient, certify: of.quote } }), 'recipient.nonce'],
    [
      'with a key under a policy of its own',
      async (_of, attest) => await evidence({ ...attest, firmware: { signer: attest.firmware?.signer ?? random(8), ref: random(32) } }),
      'recipient.policy',
    ],
  ]
  test.each(wrong)('%s: quarantined, and nothing is wrapped to it', async (_name, change, reason) => {
    const attest = await withdrawn()
    const { recipient } = (await device()).keys
    expect(types(await say(await change(await evidence(attest), attest)))).toEqual(['refusal'])
    expect(await stateAndReason()).toEqual(['quarantined', reason])
    expect((await device()).keys.recipient).toEqual(recipient)
    await getsNothing()
  })

  test('a device that was away is asked when it reports', async () => {
    ctx.bus.disconnect(from)
    await withdrawRelease(ctx, operator(), 'gateway/2.0.0', 'CVE-2027-2')
    attester = await openAttester()
    await connect()
    const attest = attestOf(await report())
    expect(attest.firmware).toEqual((await firmwareOf(ctx, 'gateway')).policy)
    expect(types(await say(await evidence(attest)))).toContain('delivery')
  })

  test('a crash right after it: the next start approves, rotates, and the device is asked when it reports', async () => {
    const { step } = ctx
    const crashing: TestContext = {
      ...ctx,
      step(name) {
        step(name)
        if (name === 'release.withdrawn') throw new Error('power')
      },
    }
    await expect(withdrawRelease(crashing, operator(), 'gateway/2.0.0', 'CVE-2027-2')).rejects.toThrow('power')
    await approveReleases(ctx)
    await settleOwedAppraisals(ctx)
    await settleOwedRotations(ctx)
    expect((await ctx.store.find('campaign', { limit: 10 })).map(({ key }) => key)).toEqual([telemetry])
    expect((await ctx.store.find('setting', { prefix: 'owed-', limit: 10 })).map((one) => one.id)).toEqual([])
    expect(attestOf(await report()).firmware).toEqual((await firmwareOf(ctx, 'gateway')).policy)
  })
})

describe('a return by enrolment', () => {
  test('a newcomer on unacceptable firmware gets no identity', async () => {
    tamper()
    board.boot()
    attester = await openAttester()
    expect(await enrol()).toMatchObject({ type: 'refusal', code: 'attestation-failed' })
    expect((await ctx.store.get('device', id))?.state).toBe('registered')
  })

  test('an enrolled device keeps its identity and is quarantined; a good one comes back', async () => {
    await enrolled()
    await report()
    tamper()
    ctx.bus.disconnect(from)
    board.boot()
    attester = await openAttester()
    ctx.clock.now += 1000
    expect(await enrol('return')).toMatchObject({ type: 'identity', device: id })
    expect(await stateAndReason()).toEqual(['quarantined', 'reference.pcr-4'])
    await getsNothing()
    await connect()
    // It is asked whenever it connects.
    expect(types(await report())).toEqual(['attest'])
    tamper()
    ctx.bus.disconnect(from)
    board.boot()
    attester = await openAttester()
    ctx.clock.now += 1000
    expect(await enrol('return')).toMatchObject({ type: 'identity', device: id })
    expect((await device()).state).toBe('enrolled')
    await connect()
    expect(types(await report())).toEqual(['delivery'])
  })

  test('evidence that does not verify is refused and held against nobody: anybody could have sent it', async () => {
    await enrolled()
    await report()
    ctx.bus.disconnect(from)
    board.boot()
    // Measured, and kept out of the log.
    board.tpm.extend(7, random(32))
    attester = await openAttester()
    ctx.clock.now += 1000
    expect(await enrol('return')).toMatchObject({ type: 'refusal', code: 'attestation-failed' })
    expect(await device()).toMatchObject({ state: 'enrolled', lastRefusal: { reason: 'log.replay.mismatch' } })
    // With the identity that it has it attests before any key, and that counts.
    await connect()
    const told = await report()
    expect(types(told)).toEqual(['attest'])
    await say(await evidence(attestOf(told)))
    expect(await stateAndReason()).toEqual(['quarantined', 'log.replay.mismatch'])
    await getsNothing()
  })

  test('does not bring a device back that was quarantined for what its kernel measured', async () => {
    const measurements = async () => ({ list: board.imaList(), ended: true })
    await enrolled()
    await setGroupPolicy(ctx, operator(), plant, { ima: 'listed' })
    board.measureFile('/usr/bin/tool', random(8))
    await say(await evidence(attestOf(heard(id)), { measurements }))
    expect(await stateAndReason()).toEqual(['quarantined', 'ima.file'])
    ctx.bus.disconnect(from)
    ctx.clock.now += 1000
    expect(await enrol('return')).toMatchObject({ type: 'identity', device: id })
    expect(await stateAndReason()).toEqual(['quarantined', 'ima.awaited'])
    await getsNothing()
    await connect()
    await say(await evidence(attestOf(await report()), { measurements }))
    expect(await stateAndReason()).toEqual(['quarantined', 'ima.file'])
    // Without it in the next boot.
    await reboot()
    expect(types(await say(await evidence(attestOf(await report()), { measurements })))).toEqual(['delivery'])
    expect(await stateAndReason()).toEqual(['enrolled', 'release.current'])
  })

  test('however often it returns quarantined, the certificate on its disk from before stays good', async () => {
    await enrolled()
    const { tlsSerial } = await device()
    tamper()
    for (let boots = 0; boots < 2; boots++) {
      ctx.bus.disconnect(from)
      board.boot()
      attester = await openAttester()
      ctx.clock.now += 60_000
      expect(await enrol('return')).toMatchObject({ type: 'identity', device: id })
      await connect()
      const row = await device()
      expect([row.state, row.previousTlsSerial, row.tlsSerial === tlsSerial]).toEqual(['quarantined', tlsSerial, false])
    }
  })
})
