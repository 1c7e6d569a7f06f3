import { createHash } from 'node:crypto'
import { request as plainRequest } from 'node:http'
import { request } from 'node:https'
import { readFileSync } from 'node:fs'
import { connect as connectTls } from 'node:tls'
import type { AddressInfo } from 'node:net'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { operations, ProblemView, SealView, type Operation } from '@fleetkey/protocol/admin.ts'
import type { Role } from '@fleetkey/server/access/caller.ts'
import { adminHandlers, adminStreams, type ServerFacts } from '@fleetkey/server/api/admin/handlers.ts'
import { alertService } from '@fleetkey/server/api/alerts.ts'
import { defaultMarks } from '@fleetkey/server/ca/alerts.ts'
import { adminServer } from '@fleetkey/server/api/admin/router.ts'
import { sealHandlers } from '@fleetkey/server/api/admin/seal.ts'
import { serverTls } from '@fleetkey/server/flows/authority.ts'
import { anEntry } from './conformance/store.ts'
import { healthy } from './healthy.ts'
import { testContext, type TestContext } from './harness.ts'
import { testSafe } from './safe.ts'

let ctx: TestContext
const place = testSafe()
let server: ReturnType<typeof adminServer>
let port: number
let ready = true
/** As while nothing opens the keys. */
let sealed = false
const tokens = { owner: 'o'.repeat(43), operator: 'p'.repeat(43), factory: 'f'.repeat(43), auditor: 'a'.repeat(43), expired: 'x'.repeat(43) }

beforeAll(async () => {
  ctx = await testContext()
  ctx.clock.now = Date.now()
  const key = await ctx.kms.create('audit-signing', 'audit-signing')
  const facts: ServerFacts = {
    version: 'test',
    store: 'memory',
    kms: 'file',
    bundle: () => ({ server: 'mqtts://localhost:1', tenant: 'plant', trust: ['t'], chain: ['c'], keys: ['k'] }),
    certificates: () => [],
    seal: await place.open(),
    deadlines: async () => [],
    alerts: alertService(ctx, { marks: defaultMarks, webhook: undefined, deadlines: async () => [] }),
    around: healthy,
    log: { origin: 'fleetkey/plant', key: 'audit-signing', spki: key.spki ?? new Uint8Array() },
  }
  const rows = Object.entries(tokens).map(([name, token]) => ({
    table: 'token' as const,
    do: 'insert' as const,
    row: {
      id: name,
      version: 0,
      operator: name,
      roles: [(name === 'expired' ? 'owner' : name) as Role],
      hash: createHash('sha256').update(token).digest('hex'),
      createdAt: 0,
      expiresAt: name === 'expired' ? ctx.clock.now - 1 : null,
    },
  }))
  await ctx.store.commit({ writes: rows, entries: [anEntry()] })
  const tls = await serverTls(ctx, ctx.authority, ['localhost'])
  const handlers = adminHandlers(ctx, facts)
  const streams = adminStreams(ctx, facts)
  server = adminServer(ctx, tls, () => ({
    ready: () => ({ ready, sealed: false, reason: ready ? null : 'the disk is full' }),
    ...(sealed ? { handlers: sealHandlers(ctx, facts.seal) } : { handlers, streams }),
  }))
  await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
  port = (server.address() as AddressInfo).port
})
afterAll(async () => {
  server.closeAllConnections()
  await new Promise((resolve) => server.close(resolve))
  await ctx.close()
  await place.close()
})

interface Answer {
  readonly status: number
  readonly type: string
  readonly text: string
}

const ask = async (method: string, path: string, of: { token?: string; body?: string | Buffer } = {}): Promise<Answer> =>
  await new Promise((resolve, reject) => {
    const headers = of.token === undefined ? {} : { authorization: `Bearer ${of.token}` }
    const outgoing = request({ host: '127.0.0.1', port, method, path, headers, rejectUnauthorized: false, agent: false }, (incoming) => {
      let text = ''
      incoming.on('data', (chunk: Buffer) => (text += chunk.toString()))
      incoming.on('end', () => resolve({ status: incoming.statusCode ?? 0, type: incoming.headers['content-type'] ?? '', text }))
    })
    outgoing.on('error', reject)
    outgoing.end(of.body)
  })
const problemOf = ({ type, text }: Answer) => {
  expect(type).toBe('application/problem+json')
  return ProblemView.parse(JSON.parse(text))
}
const owner = { token: tokens.owner }

describe('who asks', () => {
  test.each([
    ['nobody', undefined],
    ['a token that was never given', 'z'.repeat(43)],
    ['a token that has expired', tokens.expired],
    ['something that is no token', 'short'],
    ['a token with more behind it', `${tokens.owner}x`],
  ])('%s: 401, told nothing more, counted', async (_, token) => {
    ctx.refusals.take()
    const before = (await ctx.entries()).length
    const answered = await ask('GET', '/api/1/devices', token === undefined ? {} : { token })
    expect(answered.status).toBe(401)
    expect(problemOf(answered)).toEqual({ type: 'urn:fleetkey:problem:unauthenticated', title: 'unauthenticated', status: 401, code: 'unauthenticated' })
    expect((await ctx.entries()).length).toBe(before)
    expect(ctx.refusals.take()).toContain('token')
  })

  const isOpen = (operation: Operation): boolean => operation.open === true
  const everything = [
    ...Object.values(operations)
      .filter((operation) => !isOpen(operation))
      .map(({ method, path }) => [method, path.replaceAll(/\{\w+\}/g, 'x')]),
    ['GET', '/api/1/audit/export'],
  ]

  test('every operation and every stream asks for a token, but those about the seal', async () => {
    expect(Object.entries<Operation>(operations).flatMap(([name, operation]) => (isOpen(operation) ? [name] : []))).toEqual(['seal.status', 'seal.unseal'])
    for (const [method = '', path = ''] of everything) expect([path, (await ask(method, path)).status]).toEqual([path, 401])
    const status = await ask('GET', '/api/1/seal')
    expect([status.status, SealView.parse(JSON.parse(status.text))]).toMatchObject([200, { sealed: false, reason: null, ways: ['passphrase'] }])
    const answered = await ask('POST', '/api/1/seal/shares', { body: JSON.stringify({ share: Buffer.alloc(200).toString('base64') }) })
    expect([answered.status, problemOf(answered)]).toMatchObject([409, { code: 'conflict' }])
  })

  test('sealed, nothing else is served, whoever asks', async () => {
    sealed = true
    for (const [method = '', path = ''] of everything)
      for (const token of [undefined, tokens.owner]) {
        const answered = await ask(method, path, token === undefined ? {} : { token })
        expect([path, answered.status, problemOf(answered).code]).toEqual([path, 503, 'unavailable'])
      }
    for (const path of ['/healthz', '/readyz', '/api/1/seal']) expect([path, (await ask('GET', path)).status]).toEqual([path, 200])
    for (const body of ['', '{}', '{"share":"?"}', `{"share":"${'A'.repeat(1000)}"}`, '{"share":"AAAA","reset":1}', '{"share":"AAAA","x":1}'])
      expect([body, (await ask('POST', '/api/1/seal/shares', { body })).status]).toEqual([body, 400])
    sealed = false
  })

  test.each<readonly [keyof typeof tokens, string, string, string]>([
    ['factory', 'GET', '/api/1/audit', 'audit.read'],
    ['operator', 'GET', '/api/1/audit/export', 'audit.read'],
    ['auditor', 'POST', '/api/1/groups', 'group.create'],
    ['factory', 'POST', '/api/1/keys', 'key.create'],
  ])('%s may not %s %s: 403, audited once', async (role, method, path, action) => {
    const before = (await ctx.entries()).length
    const body = path.endsWith('keys') ? '{"id":"k","protection":"sealed"}' : '{"id":"g"}'
    const answered = await ask(method, path, { token: tokens[role], ...(method === 'POST' ? { body } : {}) })
    expect([answered.status, problemOf(answered).code]).toEqual([403, 'forbidden'])
    const entries = (await ctx.entries()).slice(before)
    expect(entries).toMatchObject([{ caller: `operator:${role}`, action, outcome: 'refused', code: 'forbidden' }])
  })
})

describe('what is asked', () => {
  test.each<readonly [string, string, string, string | Buffer | undefined, number]>([
    ['a path that is not there', 'GET', '/api/1/nothing', undefined, 404],
    ['a method that it has not', 'DELETE', '/api/1/devices', undefined, 404],
    ['a device that is not there', 'GET', '/api/1/devices/nobody', undefined, 404],
    ['a path that climbs', 'GET', '/api/1/devices/..%2f..%2fetc', undefined, 404],
    ['a name of the prototype', 'GET', '/api/1/devices/__proto__', undefined, 404],
    ['a body that is no JSON', 'POST', '/api/1/groups', '{', 400],
    ['a body without its field', 'POST', '/api/1/groups', '{}', 400],
    ['a body with a field too many', 'POST', '/api/1/groups', '{"id":"g","more":1}', 400],
    ['a name that is none', 'POST', '/api/1/groups', '{"id":"../g"}', 400],
    ['a body of 64 KiB and one', 'POST', '/api/1/groups', Buffer.alloc((64 << 10) + 1, 0x20), 400],
    ['a query that is none', 'GET', '/api/1/devices?limit=many', undefined, 400],
    ['a query with more', 'GET', '/api/1/devices?nonsense=1', undefined, 400],
  ])('%s', async (_, method, path, body, status) => {
    const answered = await ask(method, path, { ...owner, ...(body === undefined ? {} : { body }) })
    expect(answered.status).toBe(status)
    expect(problemOf(answered).status).toBe(status)
    expect(await ctx.store.count('group')).toBe(0)
  })

  test('an order that is malformed is an entry, a read of what is not there is none', async () => {
    const before = (await ctx.entries()).length
    await ask('POST', '/api/1/groups', { ...owner, body: '{}' })
    await ask('GET', '/api/1/devices/nobody', owner)
    expect((await ctx.entries()).slice(before)).toMatchObject([{ caller: 'operator:owner', action: 'group.create', outcome: 'refused', code: 'malformed' }])
  })

  test('what is done twice is a conflict, with its reason', async () => {
    expect((await ask('POST', '/api/1/groups', { ...owner, body: '{"id":"plant"}' })).status).toBe(200)
    const again = await ask('POST', '/api/1/groups', { ...owner, body: '{"id":"plant"}' })
    expect(problemOf(again)).toMatchObject({ status: 409, code: 'conflict', detail: expect.stringMatching(/plant/) })
  })

  test('a fault inside shows its code and nothing of itself', async () => {
    const find = ctx.store.find
    ctx.store.find = (async (table: never, query: never) => {
      if (table === 'campaign') throw new Error('secret path /var/lib')
      return await find(table, query)
    }) as typeof find
    const answered = await ask('GET', '/api/1/campaigns', owner)
    ctx.store.find = find
    expect([answered.status, answered.text.includes('secret')]).toEqual([500, false])
    expect(problemOf(answered).code).toBe('internal')
    expect(ctx.lines.join('\n')).toContain('secret path')
  })
})

describe('without a token', () => {
  test('alive and ready, or why not', async () => {
    expect(await ask('GET', '/healthz')).toMatchObject({ status: 200 })
    expect(await ask('GET', '/readyz')).toMatchObject({ status: 200 })
    ready = false
    expect(await ask('GET', '/readyz')).toMatchObject({ status: 503, text: expect.stringContaining('the disk is full') })
    ready = true
  })

  test('the description that is in docs/', async () => {
    const answered = await ask('GET', '/openapi.json')
    expect(JSON.parse(answered.text)).toEqual(JSON.parse(readFileSync(new URL('../docs/openapi.json', import.meta.url), 'utf8')))
    expect(JSON.parse(answered.text)).toMatchObject({ openapi: '3.1.0' })
  })
})

describe('transport', () => {
  test('TLS 1.3 only', async () => {
    const version = await new Promise((resolve) => {
      const socket = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, maxVersion: 'TLSv1.2' }, () => resolve(socket.getProtocol()))
      socket.on('error', () => resolve('refused'))
    })
    expect(version).toBe('refused')
  })

  test('plain HTTP gets nothing', async () => {
    const answered = await new Promise((resolve) => {
      const outgoing = plainRequest({ port, host: '127.0.0.1', path: '/healthz' }, (incoming) => resolve(incoming.statusCode))
      outgoing.on('error', () => resolve('closed'))
      outgoing.end()
    })
    expect(answered).toBe('closed')
  })

  test('nothing is cached, and no type is guessed', async () => {
    const headers = await new Promise<NodeJS.Dict<string | string[]>>((resolve, reject) => {
      const outgoing = request(
        { host: '127.0.0.1', port, path: '/api/1/groups', headers: { authorization: `Bearer ${tokens.owner}` }, rejectUnauthorized: false, agent: false },
        (incoming) => resolve(incoming.resume().headers),
      )
      outgoing.on('error', reject)
      outgoing.end()
    })
    expect(headers).toMatchObject({ 'cache-control': 'no-store', 'x-content-type-options': 'nosniff' })
  })
})
