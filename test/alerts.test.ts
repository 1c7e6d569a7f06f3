import { createHmac, randomBytes } from 'node:crypto'
import { createServer, type Server } from 'node:https'
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { alertService, type AlertService } from '@fleetkey/server/api/alerts.ts'
import { webhookHeaders, type Webhook } from '@fleetkey/server/api/webhook.ts'
import { alertsDue, alertText, defaultMarks, type DayOfEnds, type Deadline } from '@fleetkey/server/ca/alerts.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import { readSettings } from '@fleetkey/server/config.ts'
import { raisedAlerts } from '@fleetkey/server/flows/alerts.ts'
import { serverTls } from '@fleetkey/server/flows/authority.ts'
import { ownCertificates } from '@fleetkey/server/flows/calendar.ts'
import type { Write } from '@fleetkey/server/flows/context.ts'
import { change } from './conformance/store.ts'
import { testContext, type TestContext } from './harness.ts'

const [hour, day] = [3_600_000, 86_400_000]
const now = Date.UTC(2027, 0, 1)

describe('what is due', () => {
  const due = (deadlines: readonly Deadline[], days: readonly DayOfEnds[] = [], at = now): string[] =>
    alertsDue({ tenant: 'plant', deadlines, days, marks: defaultMarks, now: at }).map(
      ({ type, subject, mark }) => `${type} ${subject} ${mark === null ? '-' : mark / day}`,
    )
  const own = (left: number, life = 10 * 365 * day, kind: Deadline['kind'] = 'ca'): Deadline => ({
    name: 'issuing',
    kind,
    begins: now + left - life,
    at: now + left,
  })
  const devices = (left: number, life: number, certificates = 7): DayOfEnds => ({
    at: now + left,
    profile: 'device-identity',
    issuer: 'issuing-ca',
    certificates,
    life,
  })

  test.each<[string, string[], string[]]>([
    ['a CA long before its end', due([own(31 * day)]), []],
    ['at its first mark', due([own(30 * day)]), ['certificate.expiring issuing 30']],
    ['of several marks that are passed the tightest alone', due([own(6 * day)]), ['certificate.expiring issuing 7']],
    ['on its last day', due([own(2 * hour)]), ['certificate.expiring issuing 1']],
    ['over', due([own(0)]), ['certificate.expired issuing -']],
    ['what is renewed 15 days before its end has no mark above a third of its life', due([own(14 * day, 30 * day, 'tls')]), []],
    ['and was not renewed', due([own(6 * day, 30 * day, 'tls')]), ['certificate.expiring issuing 7']],
    ['a list that is made anew in time', due([own(6 * day, 7 * day, 'crl')]), []],
    ['a list that is not', due([own(1.5 * day, 7 * day, 'crl')]), ['crl.stale issuing -']],
    ['devices of one day, one alert', due([], [devices(29 * day, 3 * 365 * day)]), ['certificates.expiring device-identity by issuing-ca 30']],
    ['certificates that live for two days end every day', due([], [devices(day, 2 * day)]), []],
    ['a day on which nothing ends any more', due([], [devices(day, 3 * 365 * day, 0)]), []],
  ])('%s', (_name, found, want) => expect(found).toEqual(want))

  test('the same mark has the same id at every moment and in every process, another mark, end or tenant another', () => {
    const id = (left: number, at: number, tenant = 'plant'): string | undefined =>
      alertsDue({ tenant, deadlines: [{ ...own(0), at: now + left }], days: [], marks: defaultMarks, now: at })[0]?.id
    expect(id(29 * day, now)).toBe(id(29 * day, now + 10 * day))
    expect(new Set([id(29 * day, now), id(29 * day, now + 16 * day), id(29 * day + 1000, now), id(29 * day, now, 'other')]).size).toBe(4)
  })
})

test('signatures are those of Standard Webhooks', () => {
  const secret = new Secret(Buffer.from('MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw', 'base64'))
  expect(webhookHeaders(secret, { id: 'msg_p5jXN8AQM9LWM0D4loKWxJek', at: 1_614_265_330_123, body: '{"test": 2432232314}' })).toEqual({
    'webhook-id': 'msg_p5jXN8AQM9LWM0D4loKWxJek',
    'webhook-timestamp': '1614265330',
    'webhook-signature': 'v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=',
  })
})

const folder = mkdtempSync(join(tmpdir(), 'fleetkey-alerts-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

describe('to a receiver', () => {
  let ctx: TestContext
  let receiver: Server
  let service: AlertService
  let webhook: Webhook
  const key = randomBytes(32)
  let answers: number[]
  let got: { id: string; path: string; body: { type: string; data: { subject: string; certificates: number | null } } }[]
  let deadlines: Deadline[]
  let crashAt: string | undefined

  const listen = async (server: Server): Promise<number> => {
    await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
    return (server.address() as AddressInfo).port
  }
  const open = (): AlertService => alertService(ctx, { marks: defaultMarks, webhook, deadlines: async () => deadlines })

  beforeEach(async () => {
    ;[answers, got, deadlines, crashAt] = [[], [], [], undefined]
    // Certificates of the receiver are judged by the real clock.
    ctx = await testContext({
      now: Date.now(),
      onStep: (name) => {
        if (name === crashAt) throw new Error(`killed at ${name}`)
      },
    })
    const tls = await serverTls(ctx, ctx.authority, ['localhost'])
    receiver = createServer({ key: tls.key, cert: tls.cert }, (request, response) => {
      let text = ''
      request.on('data', (chunk: Buffer) => (text += chunk.toString()))
      request.on('end', () => {
        const { 'webhook-id': id, 'webhook-timestamp': at, 'webhook-signature': signature } = request.headers
        const own = `v1,${createHmac('sha256', key)
          .update(`${String(id)}.${String(at)}.${text}`)
          .digest('base64')}`
        const isFresh = Math.abs(Number(at) * 1000 - ctx.clock.now) < 300_000
        const status = answers.shift() ?? 204
        if (signature !== own || !isFresh || request.method !== 'POST') return void response.writeHead(401).end()
        if (status < 300) got.push({ id: String(id), path: request.url ?? '', body: JSON.parse(text) as (typeof got)[number]['body'] })
        response.writeHead(status, status === 302 ? { location: `https://127.0.0.1:${(receiver.address() as AddressInfo).port}/elsewhere` } : {}).end('x')
      })
    })
    const port = await listen(receiver)
    webhook = { url: new URL(`https://127.0.0.1:${port}/hook?team=pki`), secret: new Secret(key), ca: toPem('CERTIFICATE', ctx.authority.root) }
    service = open()
  })
  afterEach(async () => {
    await service.stop()
    receiver.closeAllConnections()
    receiver.close()
    await ctx.close()
  })
  const ends = (left: number, name = 'issuing'): Deadline => ({ name, kind: 'ca', begins: ctx.clock.now - 1000 * day, at: ctx.clock.now + left })

  test('each mark once, signed, at the configured path; a restart sends nothing twice', async () => {
    deadlines = [ends(29 * day)]
    for (let round = 0; round < 3; round++) await service.round()
    expect(got).toMatchObject([
      { path: '/hook?team=pki', body: { type: 'certificate.expiring', data: { subject: 'issuing', markHours: 720, tenant: 'plant' } } },
    ])
    await service.stop()
    service = open()
    await service.round()
    expect(got).toHaveLength(1)
    ctx.clock.now += 16 * day
    await service.round()
    expect(got.map(({ id }) => id)).toHaveLength(2)
    expect(new Set(got.map(({ id }) => id)).size).toBe(2)
    expect((await raisedAlerts(ctx)).map(({ state }) => state)).toEqual(['delivered', 'delivered'])
    expect((await ctx.entries()).filter(({ action }) => action.startsWith('alert.')).map(({ action }) => action)).toEqual([
      'alert.raise',
      'alert.deliver',
      'alert.raise',
      'alert.deliver',
    ])
  })

  test('killed before and after it was sent: it comes once, or once more under the same id', async () => {
    deadlines = [ends(29 * day)]
    crashAt = 'alert.raised'
    await service.round()
    expect(got).toEqual([])
    await service.stop()
    service = open()
    crashAt = undefined
    // The receiver has it, and the server does not know.
    const { commit } = ctx.store
    Object.assign(ctx.store, {
      commit: async (...of: Parameters<typeof commit>) => {
        if (of[0].entries.some(({ action }) => action === 'alert.deliver')) throw new Error('killed')
        return await commit.apply(ctx.store, of)
      },
    })
    await service.round()
    Object.assign(ctx.store, { commit })
    await service.stop()
    service = open()
    await service.round()
    await service.round()
    expect(got.map(({ id }) => id)).toEqual([got[0]?.id, got[0]?.id])
    expect((await raisedAlerts(ctx)).map(({ state }) => state)).toEqual(['delivered'])
  })

  test('thousands of devices whose certificates end on one day are one alert', async () => {
    const at = Math.floor((ctx.clock.now + 20 * day) / day) * day + 3 * hour
    const rows = Array.from({ length: 5000 }, (_, n): Write => {
      const row: Certificate = {
        id: `4${n.toString(16).padStart(8, '0')}`,
        version: 0,
        profile: 'device-identity',
        device: DeviceId.parse(`gw-${n}`),
        issuer: 'issuing-ca',
        der: Uint8Array.of(1),
        spkiHash: `s${n}`,
        notBefore: 0,
        notAfter: at + (n % 1000) * 1000,
        status: n % 10 === 0 ? 'revoked' : 'valid',
        revokedAt: null,
        reason: null,
        ...(n % 10 === 1 ? { replacedAt: 1 } : {}),
      }
      return { table: 'certificate', do: 'insert', row }
    })
    await ctx.store.commit(change(...rows))
    await service.round()
    await service.round()
    expect(got.map(({ body }) => [body.type, body.data.subject, body.data.certificates])).toEqual([
      ['certificates.expiring', 'device-identity by issuing-ca', 4000],
    ])
    expect(alertText((await raisedAlerts(ctx))[0] as never)).toMatch(
      /^4000 certificates in force \(device-identity by issuing-ca\) end on \d{4}-\d{2}-\d{2}: less than 30 days$/,
    )
  })

  test('a receiver that fails is asked after pauses that grow, is dead after five failures, and gets everything once when it is back', async () => {
    deadlines = [ends(29 * day, 'root'), ends(29 * day, 'issuing')]
    answers = [500, 503, 429, 500, 404, 500]
    const asked = (): number => 6 - answers.length
    await service.round()
    await service.round()
    expect([asked(), service.health()]).toMatchObject([1, { failures: 1, isDead: false, waiting: 2, error: 'answered 500' }])
    let last = 0
    while (answers.length > 0) {
      const before = asked()
      let waited = 0
      for (; asked() === before && waited < hour; waited += 1000) {
        ctx.clock.now += 1000
        await service.round()
      }
      expect(waited).toBeGreaterThan(last)
      last = waited * 1.2
    }
    expect(service.health()).toMatchObject({ failures: 6, isDead: true, waiting: 2 })
    expect(ctx.lines.filter((line) => line.includes('ALARM: webhook'))).toHaveLength(1)
    ctx.clock.now += hour
    await service.round()
    expect(got.map(({ body }) => body.data.subject).toSorted()).toEqual(['issuing', 'root'])
    expect(service.health()).toMatchObject({ failures: 0, isDead: false, waiting: 0, error: null })
  })

  test('it goes nowhere but to the configured URL: a redirect is a failure', async () => {
    deadlines = [ends(29 * day)]
    answers = [302]
    await service.round()
    expect(got).toEqual([])
    expect(service.health()?.error).toBe('answered 302, which is not followed')
  })

  test('a receiver that the configured CA does not vouch for gets nothing; one that is not there is an error', async () => {
    await service.stop()
    deadlines = [ends(29 * day)]
    const { ca: _, ...system } = webhook
    service = alertService(ctx, { marks: defaultMarks, webhook: { ...system, ca: undefined }, deadlines: async () => deadlines })
    await service.round()
    expect(got).toEqual([])
    expect(service.health()?.error).toMatch(/certificate/)
    expect(await service.test()).toMatch(/certificate/)
    const gone = alertService(ctx, { marks: defaultMarks, webhook: { ...webhook, url: new URL('https://127.0.0.1:1/') }, deadlines: async () => [] })
    expect(await gone.test()).toMatch(/ECONNREFUSED/)
    await gone.stop()
  })

  test('a test message goes out at once and is kept nowhere; without a webhook alerts are raised and wait', async () => {
    expect(await service.test()).toBeNull()
    expect(got).toMatchObject([{ body: { type: 'test' } }])
    expect(await raisedAlerts(ctx)).toEqual([])
    const none = alertService(ctx, { marks: defaultMarks, webhook: undefined, deadlines: async () => [ends(day)] })
    await none.round()
    expect([none.health(), await none.test(), (await raisedAlerts(ctx)).map(({ state }) => state)]).toEqual([null, undefined, ['waiting']])
    await none.stop()
  })

  test('more than a thousand that wait are dropped, not kept; what is long over is forgotten', async () => {
    answers = Array.from({ length: 1000 }, () => 500)
    deadlines = Array.from({ length: 1300 }, (_, n) => ends(29 * day, `ca-${n}`))
    for (let round = 0; round < 8; round++) await service.round()
    const count = async (state: string): Promise<number> => (await raisedAlerts(ctx)).filter((one) => one.state === state).length
    expect([await count('waiting'), await count('dropped')]).toEqual([1000, 300])
    deadlines = []
    ctx.clock.now += 29 * day + 91 * day
    await service.round()
    expect(await count('dropped')).toBe(0)
  })

  test('the CAs and keys of this server are among what is watched', async () => {
    const own = await ownCertificates(ctx)
    expect(own.map(({ name }) => name).toSorted()).toEqual(['challenge-signing', 'delivery-signing', 'group-signing', 'issuing', 'release-signing', 'root'])
    const first = own.reduce((least, one) => (one.at < least.at ? one : least))
    deadlines = [...own]
    await service.round()
    expect(got).toEqual([])
    ctx.clock.now = first.at - 7 * day
    await service.round()
    expect(got.map(({ body }) => body.data.subject)).toContain(first.name)
  })
})

describe('the configuration', () => {
  const path = (name: string): string => join(folder, name)
  const settings = (alerts: unknown): ReturnType<typeof readSettings> => {
    writeFileSync(path('config.json'), JSON.stringify({ alerts }))
    return readSettings(['--data', folder, '--config', path('config.json')], {})
  }
  const secretFile = path('secret')
  beforeEach(() => writeFileSync(secretFile, `whsec_${randomBytes(32).toString('base64')}\n`, { mode: 0o600 }))

  test('marks and webhook', () => {
    expect(settings(undefined).alerts).toEqual({ marks: defaultMarks, webhook: undefined })
    const { marks, webhook } = settings({ marks: ['60d', '36h'], webhook: { url: 'https://alerts.example/hook', secretFile } }).alerts
    expect([marks, webhook?.url.href, webhook?.secret.length]).toEqual([[60 * day, 36 * hour], 'https://alerts.example/hook', 32])
    expect(JSON.stringify(webhook)).not.toContain('whsec')
  })

  test.each<[string, unknown, RegExp]>([
    ['a mark that is none', { marks: ['soon'] }, /not a time/],
    ['plain http', { webhook: { url: 'http://alerts.example/', secretFile } }, /not an https/],
    ['a password in the URL', { webhook: { url: 'https://a:b@alerts.example/', secretFile } }, /password/],
    ['no secret', { webhook: { url: 'https://alerts.example/' } }, /secretFile/],
    ['a secret that is not there', { webhook: { url: 'https://alerts.example/', secretFile: path('none') } }, /ENOENT/],
    ['a CA that is not there', { webhook: { url: 'https://alerts.example/', secretFile, caFile: path('none') } }, /caFile.*ENOENT/],
  ])('refused: %s', (_name, alerts, why) => expect(() => settings(alerts)).toThrow(why))

  test.each<[string, string, number, RegExp]>([
    ['short', `whsec_${randomBytes(8).toString('base64')}`, 0o600, /8 bytes/],
    ['of another form', 'secret', 0o600, /not whsec_/],
    ['that others can read', `whsec_${randomBytes(32).toString('base64')}`, 0o644, /others may read it/],
  ])('refused: a secret %s', (_name, text, mode, why) => {
    writeFileSync(secretFile, text)
    chmodSync(secretFile, mode)
    expect(() => settings({ webhook: { url: 'https://alerts.example/', secretFile } })).toThrow(why)
    chmodSync(secretFile, 0o600)
  })
})
