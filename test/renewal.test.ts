import { randomBytes } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { newTlsKey } from '@fleetkey/device-agent/tls-key.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { claimedSerial, parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { createBoard } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { deviceView } from '@fleetkey/server/api/admin/views.ts'
import { stateOf } from '@fleetkey/server/ca/certificate.ts'
import { findCertificate } from '@fleetkey/server/flows/inventory.ts'
import { allowRecovery } from '@fleetkey/server/flows/recover.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { attesterOf, given, openDevices, type Device, type Held } from './returning.ts'

const [minute, hour, day] = [60_000, 3_600_000, 86_400_000]
const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const id = (): Uint8Array => random(16)
const certificates = async (): Promise<number> => await ctx.store.count('certificate', { device: device.id })
const issued = (answer: BodyOf<'identity'> | BodyOf<'refusal'>): Uint8Array => {
  if (answer.type !== 'identity') throw new Error(`refused: ${answer.code}`)
  return answer.tls
}

let ctx: TestContext
let device: Device
let first: Held

beforeEach(async () => {
  ctx = await testContext()
  ;[device] = (await openDevices(ctx)) as [Device]
  first = given(await device.prove('enrol'))
  expect(await device.connect(first)).toBe('accepted')
  ctx.clock.now += day
})
afterEach(async () => await ctx.close())

const reason = async (): Promise<string> => (await ctx.entries()).findLast(({ outcome }) => outcome === 'refused')?.detail ?? ''

/** What the inventory says of it. */
const standing = async (certificate: Uint8Array): Promise<string> => stateOf(await findCertificate(ctx, claimedSerial(certificate) ?? ''), ctx.clock.now)

describe('a renewal', () => {
  test('one that was never used is superseded by the next, and so is an LDevID by that of a new enrolment', async () => {
    const [one, other] = [newTlsKey(), newTlsKey()]
    const unused = issued(await device.renew(await device.open(), { key: one }))
    ctx.clock.now += hour
    const next = issued(await device.renew(await device.open(), { key: other }))
    expect(await Promise.all([first.certificate, unused, next].map(standing))).toEqual(['valid', 'superseded', 'valid'])
    const { ldevidSerial } = await device.row()
    const again = given(await device.prove('enrol'))
    expect(await device.connect(again)).toBe('accepted')
    const rows = await ctx.store.find('certificate', { where: { device: 'gw-1' }, limit: 100 })
    const row = await device.row()
    const inForce = rows.filter((one) => stateOf(one, ctx.clock.now) === 'valid').map(({ id }) => id)
    expect(inForce.toSorted()).toEqual([row.ldevidSerial, row.tlsSerial].toSorted())
    expect(row.ldevidSerial).not.toBe(ldevidSerial)
  })

  test('the old certificate stays good until the new one was used, and not a moment longer', async () => {
    const key = newTlsKey()
    const second = { key, certificate: issued(await device.renew(await device.open(), { key })) }
    expect(parseCertificate(second.certificate)).toMatchObject({ commonName: 'gw-1', serial: (await device.row()).tlsSerial })
    for (let time = 0; time < 3; time++) expect(await device.connect(first)).toBe('accepted')
    expect(await standing(first.certificate)).toBe('valid')
    expect(await device.connect(second)).toBe('accepted')
    expect([await standing(first.certificate), await standing(second.certificate)]).toEqual(['superseded', 'valid'])
    expect(await device.connect(first)).toBe('forbidden')
    expect((await device.row()).lastRefusal?.reason).toBe('certificate.replaced')
    expect(await device.connect(second)).toBe('accepted')
  })

  test('the same request has the same certificate for answer: over the same connection, another one, after its use, never a second serial', async () => {
    const [request, key] = [id(), newTlsKey()]
    const over = await device.open()
    const certificate = issued(await device.renew(over, { id: request, key }))
    const count = await certificates()
    expect(issued(await device.renew(over, { id: request, key }))).toEqual(certificate)
    ctx.bus.disconnect(over.from)
    ctx.clock.now += 2 * hour
    expect(issued(await device.renew(await device.open(), { id: request, key }))).toEqual(certificate)
    expect(await device.connect({ key, certificate })).toBe('accepted')
    expect(issued(await device.renew(await device.open(), { id: request, key }))).toEqual(certificate)
    expect(await certificates()).toBe(count)
  })

  test('the same request many times at once: one certificate', async () => {
    const [request, key] = [id(), newTlsKey()]
    const over = await device.open()
    const before = await ctx.store.count('intent')
    const again = await device.open()
    await Promise.all([over, again, again, again].map(async (one) => await device.renew(one, { id: request, key }).catch(() => undefined)))
    expect(await ctx.store.count('intent')).toBe(before + 1)
  })

  test('one at a time: another one is told of the conflict by its own code, with the time to wait', async () => {
    const over = await device.open()
    const key = newTlsKey()
    const certificate = issued(await device.renew(over, { key }))
    ctx.clock.now += 5 * minute
    expect(await device.renew(over)).toMatchObject({ type: 'refusal', code: 'conflict', retryAfter: 600 })
    expect(await reason()).toContain('renewal.under-way')
    // Over once it was used.
    expect(await device.connect({ key, certificate })).toBe('accepted')
    expect((await device.renew(over)).type).toBe('identity')
  })

  test('a device that lost its new key waits a quarter of an hour; what it connects with stays good, however many answers get lost', async () => {
    const over = await device.open()
    for (let lost = 0; lost < 3; lost++) {
      issued(await device.renew(over))
      ctx.clock.now += 15 * minute
      expect(await device.connect(first)).toBe('accepted')
    }
    const key = newTlsKey()
    const certificate = issued(await device.renew(over, { key }))
    expect(await device.connect({ key, certificate })).toBe('accepted')
    expect(await device.connect(first)).toBe('forbidden')
  })

  test('a request whose certificate was overtaken is over', async () => {
    const over = await device.open()
    const [request, key] = [id(), newTlsKey()]
    issued(await device.renew(over, { id: request, key }))
    ctx.clock.now += 15 * minute
    issued(await device.renew(over))
    expect(await device.renew(over, { id: request, key })).toMatchObject({ code: 'conflict', retryAfter: null })
  })

  test('a new key each time: the key of any certificate, its own ones too, is refused', async () => {
    const over = await device.open()
    expect(await device.renew(over, { key: first.key })).toMatchObject({ code: 'conflict', retryAfter: null })
    expect(await reason()).toContain('renewal.key-used')
    const [request, key] = [id(), newTlsKey()]
    issued(await device.renew(over, { id: request, key }))
    expect(await device.renew(over, { id: request })).toMatchObject({ code: 'conflict', retryAfter: null })
    expect(await reason()).toContain('renewal.other-key')
  })

  test('is delivered again after a reconnect, until its certificate was used', async () => {
    const over = await device.open()
    const [request, key] = [id(), newTlsKey()]
    const certificate = issued(await device.renew(over, { id: request, key }))
    ctx.bus.disconnect(over.from)
    const again = await device.open()
    expect(again.greeted.filter(({ type }) => type === 'identity')).toMatchObject([{ type: 'identity', re: request, tls: certificate, ldevid: null }])
    ctx.bus.disconnect(again.from)
    await device.connect({ key, certificate })
    expect((await device.open()).greeted.map(({ type }) => type)).toEqual(['welcome', 'approvals'])
  })
})

describe('away for too long', () => {
  test('an expired certificate opens nothing but the way back: a fresh quote, and the LDevID stays', async () => {
    const before = await device.row()
    ctx.clock.now += 3 * day
    expect(await device.connect(first)).toBe('expired')
    expect((await device.row()).lastRefusal?.reason).toBe('certificate.expired')
    const count = await certificates()
    const back = given(await device.prove('return'))
    expect(await certificates()).toBe(count + 1)
    const after = await device.row()
    expect([after.ldevidSerial, after.recovery?.begun.length]).toEqual([before.ldevidSerial, 1])
    expect(after.verdict.at).toBe(ctx.clock.now)
    expect(await device.connect(back)).toBe('accepted')
  })

  test('an LDevID that is over: neither renewal nor return, enrolment again; no TLS certificate outlives it', async () => {
    const { notAfter } = (await ctx.store.get('certificate', (await device.row()).ldevidSerial)) ?? { notAfter: 0 }
    ctx.clock.now = notAfter - hour
    const key = newTlsKey()
    const back = given(await device.prove('return'))
    expect(parseCertificate(back.certificate).notAfter).toBe(notAfter)
    expect(await device.connect(back)).toBe('accepted')
    const over = await device.open()
    expect(parseCertificate(issued(await device.renew(over, { key }))).notAfter).toBe(notAfter)
    ctx.clock.now = notAfter + 1
    expect(await device.renew(over)).toMatchObject({ code: 'expired' })
    expect(await device.prove('return')).toMatchObject({ code: 'expired' })
    expect((await device.row()).lastRefusal?.reason).toBe('ldevid.expired')
    const anew = given(await device.prove('enrol'))
    expect(await device.connect(anew)).toBe('accepted')
    expect((await ctx.store.get('certificate', (await device.row()).ldevidSerial))?.notAfter).toBeGreaterThan(ctx.clock.now + 365 * day)
  })
})

describe('the recovery budget', () => {
  beforeEach(() => Object.assign(ctx, { recoveries: { count: 3, window: 30 * day } }))

  /** One recovery from its beginning to the first connection. */
  const comeBack = async (): Promise<void> => expect(await device.connect(given(await device.prove('return')))).toBe('accepted')

  test('spent: the device is held for a person, who lets it come back', async () => {
    for (let time = 0; time < 3; time++) await comeBack()
    expect(await device.prove('return')).toMatchObject({ code: 'forbidden' })
    expect((await device.row()).recovery?.heldAt).toBe(ctx.clock.now)
    ctx.clock.now += 10_000
    expect(await device.prove('enrol')).toMatchObject({ code: 'forbidden' })
    expect((await device.row()).lastRefusal?.reason).toBe('recovery.held')
    expect((await ctx.entries()).filter(({ action }) => action === 'device.hold')).toHaveLength(1)
    // The window passes: it stays held.
    ctx.clock.now += 60 * day
    expect(await device.prove('return')).toMatchObject({ code: 'forbidden' })
    expect(await allowRecovery(ctx, operator('operator'), device.id, 'board repaired')).toEqual({ held: true })
    await comeBack()
    expect((await ctx.entries()).find(({ action }) => action === 'device.recover')).toMatchObject({
      outcome: 'done',
      detail: 'board repaired; 3 recoveries before, held',
    })
  })

  test('a device that keeps crashing before it has its certificate burns one, and waits longer each time', async () => {
    for (let crash = 0; crash < 4; crash++) given(await device.prove('return'))
    expect(await device.prove('return')).toMatchObject({ code: 'rate-limited', retryAfter: 30 })
    ctx.clock.now += 30_000
    const last = given(await device.prove('return'))
    expect(await device.connect(last)).toBe('accepted')
    expect((await device.row()).recovery).toMatchObject({ begun: [expect.any(Number)], attempts: 0, heldAt: null })
  })

  test('what it could connect with before stays good through all of that', async () => {
    for (let crash = 0; crash < 4; crash++) given(await device.prove('return'))
    expect(await device.connect(first)).toBe('accepted')
    expect((await device.row()).recovery?.attempts).toBe(4)
  })

  test('whoever only claims to be the device burns nothing and holds nobody', async () => {
    for (let time = 0; time < 3; time++) await comeBack()
    const spent = (await device.row()).recovery
    const foreign = await attesterOf(createBoard({ serial: 'GW-1', tpm: createSoftwareTpm({ random: random, now: () => ctx.clock.now }), flash: new Flash() }))
    expect(await device.prove('return', { attester: foreign })).toMatchObject({ type: 'refusal' })
    expect((await device.row()).recovery).toEqual(spent)
  })

  test('an expired certificate, and what the budget says, are shown', async () => {
    await comeBack()
    const shown = await deviceView(ctx, await device.row())
    expect(shown.recovery).toEqual({ left: 2, budget: 3, days: 30, begun: [ctx.clock.now], attempts: 0, heldAt: null })
    expect(shown.tlsNotAfter).toBe(ctx.clock.now + 2 * day)
    expect(shown.ldevidNotAfter).toBeGreaterThan(ctx.clock.now + 1000 * day)
    const over = await device.open()
    issued(await device.renew(over))
    expect((await deviceView(ctx, await device.row())).renewal).toMatchObject({ issuedAt: ctx.clock.now, notAfter: ctx.clock.now + 2 * day })
  })

  test('only operators let a device come back', async () => {
    await expect(allowRecovery(ctx, operator('auditor'), device.id, 'x')).rejects.toMatchObject({ code: 'forbidden' })
    expect(await allowRecovery(ctx, operator(), device.id, 'x')).toEqual({ held: false })
  })
})
