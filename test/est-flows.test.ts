import { randomBytes } from 'node:crypto'
import { request } from 'node:https'
import type { AddressInfo } from 'node:net'
import { connect } from 'node:tls'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { deviceHandler } from '@fleetkey/server/api/device.ts'
import { estServer } from '@fleetkey/server/api/est.ts'
import { hasIdentity, type Batch, type Device } from '@fleetkey/server/fleet/device.ts'
import { serverTls } from '@fleetkey/server/flows/authority.ts'
import type { Store, Write } from '@fleetkey/server/flows/context.ts'
import { importEndorsement } from '@fleetkey/server/flows/endorsement.ts'
import { createTokens } from '@fleetkey/server/flows/enrolment-token.ts'
import { estEnrol, estReenrol, type EstRequest } from '@fleetkey/server/flows/est.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { allowRecovery } from '@fleetkey/server/flows/recover.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { distributeCa, prepareCa } from '@fleetkey/server/flows/rollover.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { attemptAt, byToken } from './enrolling.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'

const hour = 3_600_000
const from = '192.0.2.0/24'

let ctx: TestContext
/** What the board with a secure element shows. */
let element: Uint8Array
beforeEach(async () => {
  ctx = await testContext()
  const [factory, ca] = [station(), makeIdevidCa(ctx.clock.now)]
  await addStation(ctx, operator(), { id: factory.id, publicKey: factory.publicKey })
  await importEndorsement(ctx, operator(), { certificate: toPem('CERTIFICATE', ca.certificate), test: true, for: 'idevid' })
  const made = makeElement(ca, 'SE-1', ctx.clock.now)
  element = made.certificate
  const rows = [{ serial: 'PL-1' }, { serial: 'PL-2' }, { serial: 'SE-1', idevid: made.spki }]
  await importBatch(ctx, operator(), { ...factory.signed(manifestJson({ batch: 'b1', model: 'gateway', station: factory.id }, rows)), format: 'json' })
})
afterEach(async () => await ctx.close())

const token = async (): Promise<string> => {
  const [one] = await createTokens(ctx, operator(), { batch: 'b1', count: 1, life: 7 * 24 * hour })
  return new TextDecoder().decode(one?.text.bytes())
}
const csr = async (id: string): Promise<Uint8Array> => await tlsCsr(newTlsKey(), id)
const enrol = async (of: Pick<EstRequest, 'basic' | 'chain'>, id: string): Promise<Uint8Array> => await estEnrol(ctx, { ...of, csr: await csr(id), from })
const byTokenOf = async (id: string): Promise<Uint8Array> => await enrol({ basic: { user: id, password: await token() }, chain: [] }, id)
const byElement = async (): Promise<Uint8Array> => await enrol({ basic: null, chain: [element] }, 'se-1')
const again = async (own: Uint8Array, id: string): Promise<Uint8Array> => await estReenrol(ctx, { chain: [own], basic: null, csr: await csr(id), from })
const refusal = async (act: Promise<unknown>): Promise<string> =>
  await act.then(
    () => 'done',
    (thrown: unknown) => `${toProblem(thrown).code} ${toProblem(thrown).reason ?? ''}`.trim(),
  )
const row = async (id: string): Promise<Device> => {
  const found = await ctx.store.get('device', id)
  if (found === undefined) throw new Error(`no ${id}`)
  return found
}
const set = async (write: Write): Promise<void> => {
  const entries = [{ at: 0, caller: 'test', from: 'test', action: 'test', subject: 'test', outcome: 'done', code: null, detail: '' }] as const
  expect(await ctx.store.commit({ writes: [write], entries: [...entries] })).toMatchObject({ committed: true })
}

describe('who gets nothing, whatever it brings', () => {
  test('a quarantined device', async () => {
    const own = await byTokenOf('pl-1')
    await set({ table: 'device', do: 'update', row: { ...(await row('pl-1')), state: 'quarantined', quarantinedAt: 1 } as Device })
    expect(await refusal(again(own, 'pl-1'))).toBe('forbidden est.quarantined')
    expect(await refusal(byTokenOf('pl-1'))).toBe('forbidden est.quarantined')
    expect((await row('pl-1')).lastRefusal?.reason).toBe('est.quarantined')
  })

  test('a device of a batch that is barred, before its own record says so', async () => {
    const own = await byElement()
    const standing = { state: 'suspended', at: 1, by: 'operator:alice', reason: 'recall', code: 'unspecified' } as const
    await set({ table: 'batch', do: 'update', row: { ...((await ctx.store.get('batch', 'b1')) as Batch), standing } })
    for (const act of [again(own, 'se-1'), byElement(), byTokenOf('pl-1')]) expect(await refusal(act)).toBe('forbidden batch.suspended')
  })

  test('a certificate that has run out renews nothing', async () => {
    const own = await byElement()
    ctx.clock.now += 48 * hour
    expect(await refusal(again(own, 'se-1'))).toBe('done')
    ctx.clock.now += 1_000
    expect(await refusal(again(own, 'se-1'))).toBe('expired certificate.expired')
    // The factory's word stands.
    expect(await refusal(byElement())).toBe('done')
  })

  test('a device that an agent runs', async () => {
    const side = { ctx, handle: deviceHandler(ctx, { policy: { requireEkCertificate: true }, reportEvery: 300 }) }
    expect(await attemptAt(side, { serial: 'PL-1', attester: await byToken(await token()) })).toBe('admitted')
    expect(await refusal(byTokenOf('pl-1'))).toBe('forbidden est.agent-device')
    const tls = hasIdentity(await row('pl-1')) ? ((await row('pl-1')) as { tlsSerial: string }).tlsSerial : ''
    const certificate = await ctx.store.get('certificate', tls)
    expect(await refusal(again(certificate?.der ?? new Uint8Array(), 'pl-1'))).toBe('forbidden est.agent-device')
  })

  test('129 at once: the last one is asked to come later, and nobody is served by halves', { timeout: 30_000 }, async () => {
    const gate = Promise.withResolvers<void>()
    const get: Store['get'] = async (table, id) => {
      if (table === 'enrolmentToken') await gate.promise
      return await ctx.store.get(table, id)
    }
    const server = estServer({ ...ctx, store: { ...ctx.store, get } }, await serverTls(ctx, ctx.authority, []))
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    const { port } = server.address() as AddressInfo
    const body = Buffer.from(await csr('pl-1')).toString('base64')
    const open = (written: string, length = written.length) => {
      const authorization = `Basic ${Buffer.from(`pl-1:fkt1-${randomBytes(48).toString('base64url')}`).toString('base64')}`
      const headers = { 'content-type': 'application/pkcs10', 'content-length': length, authorization }
      const asked = request({
        host: '127.0.0.1',
        port,
        path: '/.well-known/est/simpleenroll',
        method: 'POST',
        agent: false,
        rejectUnauthorized: false,
        headers,
      })
      asked.on('error', () => undefined)
      asked.write(written)
      if (written.length === length) asked.end()
      const status = new Promise<{ status: number; after: string | undefined }>((resolve) =>
        asked.on('response', (response) => {
          response.resume()
          resolve({ status: response.statusCode ?? 0, after: response.headers['retry-after'] })
        }),
      )
      return { status, stop: () => void asked.destroy() }
    }
    try {
      // Whoever sends slowly holds no place.
      const slow = Array.from({ length: 130 }, () => open(body.slice(0, 20), body.length))
      const waiting = Array.from({ length: 128 }, () => open(body))
      await new Promise((resolve) => void setTimeout(resolve, 3_000))
      expect(await open(body).status).toEqual({ status: 503, after: '5' })
      gate.resolve()
      for (const one of waiting) expect((await one.status).status).toBe(401)
      for (const one of slow) one.stop()
    } finally {
      gate.resolve()
      server.closeAllConnections()
      await new Promise((resolve) => void server.close(resolve))
    }
  })
})

test('over one connection: revoked between two requests, it is refused at the next one, which is the last', { timeout: 30_000 }, async () => {
  const server = estServer(ctx, await serverTls(ctx, ctx.authority, []))
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const first = newTlsKey()
  const own = await estEnrol(ctx, { basic: { user: 'pl-1', password: await token() }, chain: [], csr: await tlsCsr(first, 'pl-1'), from })
  const socket = connect({
    port: (server.address() as AddressInfo).port,
    host: '127.0.0.1',
    rejectUnauthorized: false,
    key: first.private.export({ format: 'pem', type: 'pkcs8' }),
    cert: toPem('CERTIFICATE', own),
  })
  let heard = ''
  socket.on('data', (bytes: Buffer) => (heard += bytes.toString('latin1')))
  socket.on('error', () => undefined)
  const ended = new Promise<void>((resolve) => socket.once('close', () => resolve()))
  /** Each asks for a certificate for another key, without closing. */
  const asked = async (): Promise<string> => {
    heard = ''
    const body = Buffer.from(await csr('pl-1')).toString('base64')
    const head = ['POST /.well-known/est/simplereenroll HTTP/1.1', 'host: est', 'content-type: application/pkcs10', `content-length: ${body.length}`]
    socket.write(`${head.join('\r\n')}\r\n\r\n${body}`)
    while (!/\r\n\r\n[^]+$/.test(heard)) await new Promise((resolve) => void setTimeout(resolve, 5))
    return heard
  }
  try {
    for (let times = 0; times < 2; times++) expect(await asked()).toMatch(/^HTTP\/1\.1 200 [^]*\r\nconnection: keep-alive/i)
    const certificates = (await ctx.store.find('certificate', { where: { device: DeviceId.parse('pl-1') }, limit: 10 })).length
    // Nobody has told the listener: the row is read for every request.
    await revokeDevice(ctx, operator(), DeviceId.parse('pl-1'), 'stolen')
    expect(await asked()).toMatch(/^HTTP\/1\.1 403 [^]*\r\nconnection: close[^]*\r\n\r\nforbidden\n$/i)
    await ended
    expect((await row('pl-1')).lastRefusal?.reason).toBe('certificate.revoked')
    expect(await ctx.store.find('certificate', { where: { device: DeviceId.parse('pl-1') }, limit: 10 })).toHaveLength(certificates)
  } finally {
    socket.destroy()
    server.closeAllConnections()
    await new Promise((resolve) => void server.close(resolve))
  }
})

test('one identity has ten certificates an hour, by its certificate', async () => {
  let own = await byElement()
  for (let count = 2; count <= 10; count++) own = await again(own, 'se-1')
  const refused = await again(own, 'se-1').catch(toProblem)
  expect(refused).toMatchObject({ code: 'rate-limited', reason: 'est.rate', retryAfterSeconds: 3_600 })
  // Of many at once no more get through, and others are not touched.
  await byTokenOf('pl-1')
  ctx.clock.now += hour
  const results = await Promise.all(Array.from({ length: 16 }, async () => await refusal(again(own, 'se-1'))))
  expect(results.filter((result) => result === 'done')).toHaveLength(10)
  expect(new Set(results.filter((result) => result !== 'done'))).toEqual(new Set(['rate-limited est.rate']))
})

test('enrolling again is a recovery: paced while nothing of it was used, held beyond the budget, until a person decides', async () => {
  for (let attempt = 1; attempt <= 4; attempt++) expect(await refusal(byElement())).toBe('done')
  expect(await refusal(byElement())).toBe('rate-limited recovery.pause')
  ctx.clock.now += 30_000
  let own = await byElement()
  for (let recoveries = 0; recoveries < 8; recoveries++) {
    ctx.clock.now += 2 * hour
    // Used: that recovery is over, the next one counts.
    own = await again(own, 'se-1')
    own = await byElement()
  }
  ctx.clock.now += 2 * hour
  own = await again(own, 'se-1')
  expect(await refusal(byElement())).toBe('forbidden recovery.held')
  expect((await row('se-1')) as { recovery?: { heldAt: number | null } }).toMatchObject({ recovery: { heldAt: ctx.clock.now } })
  expect(await refusal(again(own, 'se-1'))).toBe('done')
  await allowRecovery(ctx, operator(), DeviceId.parse('se-1'), 'the board was repaired')
  expect(await refusal(byElement())).toBe('done')
})

test('cacerts while the root changes: the active CA, the next one, and the roots by each other (RFC 7030 §4.1.3)', async () => {
  const { issuing, root } = ctx.authority
  expect(ctx.authority.anchors).toEqual([issuing, root])
  await prepareCa(ctx, operator(), { root: true })
  expect(ctx.authority.anchors).toEqual([issuing, root])
  await distributeCa(ctx, operator())
  const names = ctx.authority.anchors.map((der) => parseCertificate(der))
  expect(ctx.authority.anchors.slice(0, 2)).toEqual([issuing, root])
  expect(names.map(({ commonName }) => commonName ?? '').toSorted()).toEqual([
    'Fleetkey issuing CA 2 of plant',
    'Fleetkey issuing CA of plant',
    ...Array.from({ length: 4 }, () => 'Fleetkey root of plant'),
  ])
  expect(new Set(names.map(({ serial }) => serial)).size).toBe(6)
})
