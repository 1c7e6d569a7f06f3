import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { createHash } from 'node:crypto'
import { connect } from 'node:tls'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { makeOcspRequest } from '@fleetkey/protocol/x509/ocsp.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import { roleEku } from '@fleetkey/protocol/x509/roles.ts'
import { rolloverOf, serverTls } from '@fleetkey/server/flows/authority.ts'
import { prepareCertificates, recordIssued } from '@fleetkey/server/flows/issue.ts'
import { ocspResponder } from '@fleetkey/server/flows/ocsp.ts'
import { isDue, renewRoles } from '@fleetkey/server/flows/own-certificates.ts'
import { perform } from '@fleetkey/server/flows/perform.ts'
import { activateCa, distributeCa, prepareCa } from '@fleetkey/server/flows/rollover.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { theNextCaWasKnown } from './invariants/invariants.ts'
import { spkiPair } from './spki.ts'
import { openWorld, until, type World } from './world.ts'

const day = 86_400_000
const year = 365 * day

test.each([
  ['new', 0, 100, false],
  ['half of its life over', 50, 100, false],
  ['a moment later', 50.1, 100, true],
  ['over', 101, 100, true],
  ['as long as its CA: nothing would be won', 99, 1000, false],
] as const)('to be replaced: %s', (_, now, caMore, want) =>
  expect(isDue({ notBefore: 0, notAfter: 100 }, { until: caMore === 1000 ? 100 : 1000 }, now)).toBe(want),
)

describe('by the flows', () => {
  let ctx: TestContext
  beforeEach(async () => void (ctx = await testContext()))
  afterEach(async () => await ctx.close())

  const roles = (): Record<string, Certificate> =>
    Object.fromEntries(Object.entries(ctx.authority.roles).map(([role, { certificate }]) => [role, parseCertificate(certificate)]))
  const issuing = (): Certificate => parseCertificate(ctx.authority.issuing)
  const issue = async (id: string, profile: 'device-identity' | 'device-tls' = 'device-identity') => {
    const order = { profile, device: DeviceId.parse(id), subject: id, spki: spkiPair() } as const
    const intent = { caller: { kind: 'system', id: 'setup', from: 'server' }, action: 'server.setup', subject: id } as const
    const [issued] = await prepareCertificates(ctx, ctx.authority, intent, [order])
    if (issued === undefined) throw new Error('one was ordered')
    await perform(ctx, intent, (tx) => recordIssued(tx, issued))
    return parseCertificate(issued.der)
  }

  test('nothing lasts longer than its CA; one that is over signs nothing', async () => {
    ctx.clock.now += 8 * year
    expect((await issue('gw-1')).notAfter).toBe(issuing().notAfter)
    expect((await issue('gw-2', 'device-tls')).notAfter).toBe(ctx.clock.now + 2 * day)
    ctx.clock.now = issuing().notAfter - day
    expect((await issue('gw-3', 'device-tls')).notAfter).toBe(issuing().notAfter)
    expect((await serverTls(ctx, ctx.authority, ['a.example'])).notAfter).toBe(issuing().notAfter)
    const before = await ctx.store.count('intent')
    ctx.clock.now = issuing().notAfter
    const refused = await issue('gw-4').catch(toProblem)
    expect(refused).toMatchObject({ code: 'unavailable', reason: 'issuer.over' })
    expect(await ctx.store.count('intent')).toBe(before)
    // The next one lasts as long as its root: twenty years in all.
    await prepareCa(ctx, operator(), { root: false })
    await distributeCa(ctx, operator())
    await activateCa(ctx, operator(), null)
    expect(issuing().notAfter).toBe(parseCertificate(ctx.authority.root).notAfter)
    expect((await issue('gw-5')).notAfter).toBe(ctx.clock.now + 3 * year)
  })

  test('message keys are certified anew at half of their life, once, and devices are told', async () => {
    const before = roles()
    await renewRoles(ctx)
    ctx.clock.now += year - day
    await renewRoles(ctx)
    expect(roles()).toEqual(before)
    expect(ctx.authority.bundle).toBeNull()
    ctx.clock.now += 2 * day
    await Promise.all([renewRoles(ctx), renewRoles(ctx)])
    await renewRoles(ctx)
    expect((await rolloverOf(ctx)).version).toBe(2)
    expect(ctx.steps.filter((step) => step === 'roles.renewed')).toHaveLength(1)
    for (const [role, certificate] of Object.entries(roles())) {
      expect(certificate.notAfter).toBe(ctx.clock.now + 2 * year)
      expect(certificate.serial).not.toBe(before[role]?.serial)
      // The same key, so that messages on their way are understood by either certificate.
      expect(Buffer.compare(certificate.spki, before[role]?.spki ?? new Uint8Array())).toBe(0)
      const path = { leaf: certificate, intermediates: [issuing()], roots: [parseCertificate(ctx.authority.root)], at: ctx.clock.now }
      expect(validateChain({ ...path, eku: roleEku[role as keyof typeof roleEku] }).ok).toBe(true)
      expect((await ctx.store.get('certificate', certificate.serial))?.status).toBe('valid')
    }
    expect(ctx.authority.bundle?.keys.map((der) => parseCertificate(der).serial)).toEqual(Object.values(roles()).map(({ serial }) => serial))
    await theNextCaWasKnown({ store: ctx.store })
    // Over the years they never run out, up to the end of their CA; from there on only the next one helps.
    for (let at = ctx.clock.now; at < issuing().notAfter - 10 * day; at += 90 * day) {
      ctx.clock.now = at
      await renewRoles(ctx)
      for (const { notAfter } of Object.values(roles())) expect(notAfter).toBeGreaterThan(at + 9 * day)
    }
    const version = (await rolloverOf(ctx)).version
    ctx.clock.now = issuing().notAfter - 1_000
    await renewRoles(ctx)
    expect((await rolloverOf(ctx)).version).toBe(version)
  })

  test('a responder renews itself, and not with every question when its CA ends', async () => {
    const device = await issue('gw-1')
    const responder = ocspResponder(ctx)
    const sha1 = (bytes: Uint8Array): Uint8Array => new Uint8Array(createHash('sha1').update(bytes).digest())
    // The bits of the key alone: what follows the header of an uncompressed P-256 point.
    const names = { hash: 'sha1', issuerNameHash: sha1(issuing().subject), issuerKeyHash: sha1(issuing().spki.subarray(26)) } as const
    const request = (): Uint8Array => makeOcspRequest({ ...names, serial: Buffer.from(device.serial, 'hex'), nonce: ctx.random(16) })
    const count = async (): Promise<number> =>
      (await ctx.store.find('certificate', { limit: 1000 })).filter(({ profile }) => profile === 'ocsp-responder').length
    const ask = async (at: number): Promise<number> => {
      ctx.clock.now = at
      for (let times = 0; times < 3; times++) expect((await responder.answer(request())).bytes.length).toBeGreaterThan(200)
      return await count()
    }
    const begun = ctx.clock.now
    expect(await ask(begun)).toBe(1)
    expect(await ask(begun + 14 * day)).toBe(1)
    expect(await ask(begun + 16 * day)).toBe(2)
    expect(await ask(issuing().notAfter - day)).toBe(3)
    expect(await ask(issuing().notAfter - 60_000)).toBe(3)
  })
})

describe('a server and its board over the years', () => {
  let world: World | undefined
  afterEach(async () => await world?.stop())

  const shownBy = async (port: number): Promise<number> =>
    await new Promise((resolve, reject) => {
      const socket = connect({ port, host: '127.0.0.1', rejectUnauthorized: false }, () => {
        resolve(Date.parse(socket.getPeerCertificate().valid_to))
        socket.destroy()
      })
      socket.on('error', reject)
    })

  test('sessions end with their certificates, the server renews its own, the board believes them, and comes back each time', { timeout: 180_000 }, async () => {
    let ahead = 0
    const now = (): number => Date.now() + ahead
    world = await openWorld({ now })
    const of = world
    const board = await of.simulated('YR-1')
    await of.enlist([board], 'plant')
    // Asked all the time: the clock of TLS in this process stands still, and with the server's next certificate it would believe no new connection.
    const shown = async () => await of.client.call('device.show', { params: { id: 'yr-1' } })
    let agent = of.agent(board, { now })
    await until('it is connected', () => agent.status().connected, 60_000)
    const first = await shown()

    // Its clock stands still while the server's goes on: it has not renewed in time, is cut, and returns by its hardware.
    ahead += 3 * day
    await until('its session was ended', () => of.lines.some((line) => line.includes('its certificate has run out')), 30_000)
    await until('it has returned', async () => agent.status().connected && (await shown()).tlsNotAfter !== first.tlsNotAfter, 60_000)
    expect((await shown()).ldevidNotAfter).toBe(first.ldevidNotAfter)

    for (const [years, version] of [
      [1.1, 2],
      [1.2, 3],
    ] as const) {
      await agent.stop()
      ahead += years * year
      await until('its own TLS certificate was renewed', async () => (await shown()) && (await shownBy(of.server.mqttPort)) > now() + 29 * day, 60_000)
      expect(await shownBy(of.server.httpsPort)).toBeGreaterThan(now() + 29 * day)
      await until('its message keys were certified anew', async () => (await of.client.call('ca.status')).version === version, 60_000)
      agent = of.agent(board, { now })
      await until('it is back', async () => (await shown()) && agent.status().connected, 60_000)
      await until('it believes them', async () => (await shown()).trust?.version === version, 60_000)
      expect(agent.status().lastRefusal).toBeNull()
    }
    // 2.3 years: the certificates of its first configuration are over; new devices are given the new ones.
    const { keys } = await of.client.call('bundle')
    for (const pem of keys) expect(now()).toBeLessThan(parseCertificate(derOf(pem)).notAfter - year)
    expect((await of.client.call('ca.status')).readiness).toMatchObject({ devices: 1, acknowledged: 1, stranded: 0 })
  })
})

const derOf = (pem: string): Uint8Array => new Uint8Array(Buffer.from(pem.replace(/-----[^-]+-----|\s/g, ''), 'base64'))
