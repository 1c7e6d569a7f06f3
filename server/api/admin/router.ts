import { createHash } from 'node:crypto'
import { createServer, type Server } from 'node:https'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { operations, type BodyOut, type Operation, type OperationName, type ParamsOf, type QueryOut, type ResponseOf } from '@fleetkey/protocol/admin.ts'
import { Problem, problemStatus, toProblem } from '@fleetkey/protocol/problem.ts'
import { actions, type Action } from '../../access/authorise.ts'
import type { Caller } from '../../access/caller.ts'
import type { Base } from '../../flows/context.ts'
import { refuse } from '../../flows/perform.ts'
import { addressPrefix } from '../address.ts'
import { openApi } from '../openapi.ts'

/** One authenticated, parsed request. */
export interface Call<N extends OperationName> {
  readonly caller: Caller
  readonly params: ParamsOf<N>
  readonly query: QueryOut<N>
  readonly body: BodyOut<N>
}

export type Handlers = { readonly [N in OperationName]: (call: Call<N>) => Promise<ResponseOf<N>> }

/** What cannot be one JSON answer: it writes its own body. */
export interface Streams {
  readonly auditExport: (caller: Caller, response: ServerResponse) => Promise<void>
}

/** What is served now. While the server is sealed: what needs no token, and nothing else. */
export interface Served {
  readonly handlers: Partial<Handlers>
  readonly streams?: Streams
  readonly ready: () => { readonly ready: boolean; readonly sealed: boolean; readonly reason: string | null }
}

/** Says why nothing else is served. */
const notServed = ({ ready }: Served): Problem =>
  new Problem('unavailable', `${ready().reason ?? 'the server is starting'}: fleetkey seal status`, { reason: 'kms.sealed', retryAfterSeconds: 5 })

const smallBody = 64 << 10
/** A batch manifest of 100,000 rows is about 12 MB; base64 adds a third. */
const largeBody = 24 << 20
const largeBodies: ReadonlySet<OperationName> = new Set(['endorsement.import', 'endorsement.policy.set', 'batch.import', 'release.import'])

interface Route {
  readonly name: OperationName
  readonly operation: Operation
  readonly segments: readonly string[]
}

const routes: readonly Route[] = Object.entries(operations).map(([name, operation]) => ({
  name: name as OperationName,
  operation,
  segments: operation.path.split('/'),
}))

/** The route of a request with its path parameters; `undefined` when there is none. */
export const matchRoute = (method: string, path: string): { route: Route; params: Record<string, string> } | undefined => {
  const segments = path.split('/')
  for (const route of routes) {
    if (route.operation.method !== method || route.segments.length !== segments.length) continue
    const params: Record<string, string> = {}
    const matches = route.segments.every((expected, at) => {
      const given = segments[at] ?? ''
      if (!expected.startsWith('{')) return expected === given
      if (!/^[A-Za-z0-9_.:-]{1,200}$/.test(given)) return false
      params[expected.slice(1, -1)] = given
      return true
    })
    if (matches) return { route, params }
  }
  return undefined
}

const readBody = async (request: IncomingMessage, max: number): Promise<Buffer> => {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of request as AsyncIterable<Buffer>) {
    length += chunk.length
    if (length > max) throw new Problem('malformed', `body of more than ${max} bytes`)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}

/** Who holds this bearer token (RFC 6750). Only the hash is stored and looked up, so the comparison leaks nothing of a token. */
const authenticate = async (ctx: Base, request: IncomingMessage): Promise<Caller> => {
  const from = addressPrefix(request.socket.remoteAddress ?? '')
  const token = /^Bearer ([A-Za-z0-9_-]{20,200})$/.exec(request.headers.authorization ?? '')?.[1]
  const hash = token === undefined ? '' : createHash('sha256').update(token).digest('hex')
  const known = token === undefined ? undefined : (await ctx.store.find('token', { where: { hash }, limit: 1 }))[0]
  if (known !== undefined && (known.expiresAt === null || known.expiresAt > ctx.now()))
    return { kind: 'operator', id: known.operator, roles: known.roles, from }
  const problem = new Problem('unauthenticated', token === undefined ? 'no bearer token' : known === undefined ? 'unknown token' : 'expired token', {
    reason: 'token',
  })
  ctx.refusals.count({ caller: { from }, action: 'fleet.read', subject: (request.url ?? '').slice(0, 100) }, problem, ctx.now())
  throw problem
}

const parsed = <T>(schema: Operation['body'], value: unknown, what: string): T => {
  if (schema === undefined) return undefined as T
  const result = schema.safeParse(value)
  if (result.success) return result.data as T
  const issue = result.error.issues[0]
  throw new Problem('malformed', `${what}${issue === undefined ? '' : ` ${issue.path.join('.')}: ${issue.message}`}`)
}

const json = (text: string): unknown => {
  try {
    return text === '' ? {} : JSON.parse(text)
  } catch (cause) {
    throw new Problem('malformed', 'the body is not JSON', { cause })
  }
}

const answer = (response: ServerResponse, status: number, type: string, body: unknown, headers: Readonly<Record<string, string>> = {}): void => {
  response.writeHead(status, { 'content-type': type, 'cache-control': 'no-store', 'x-content-type-options': 'nosniff', ...headers })
  response.end(typeof body === 'string' ? body : `${JSON.stringify(body)}\n`)
}

/** Known by its address only: what it hands over is the proof. */
const stranger = (request: IncomingMessage): Caller => {
  const from = addressPrefix(request.socket.remoteAddress ?? '')
  return { kind: 'unidentified', id: from, from }
}

const handle = async (ctx: Base, served: Served, request: IncomingMessage, response: ServerResponse): Promise<void> => {
  const url = new URL(request.url ?? '/', 'https://fleetkey')
  if (request.method === 'GET' && url.pathname === '/healthz') return answer(response, 200, 'application/json', { ok: true })
  if (request.method === 'GET' && url.pathname === '/readyz') {
    const state = served.ready()
    return answer(response, state.ready ? 200 : 503, 'application/json', state)
  }
  if (request.method === 'GET' && url.pathname === '/openapi.json') return answer(response, 200, 'application/json', openApi())
  const { handlers, streams } = served
  if (request.method === 'GET' && url.pathname === '/api/1/audit/export') {
    if (streams === undefined) throw notServed(served)
    const caller = await authenticate(ctx, request)
    return await audited(ctx, { caller, name: 'audit.export', method: 'GET' }, async () => await streams.auditExport(caller, response))
  }
  const found = matchRoute(request.method ?? '', url.pathname)
  if (found === undefined) throw new Problem('not-found', `${request.method} ${url.pathname}`)
  const { name, operation } = found.route
  const handler = handlers[name] as ((call: unknown) => Promise<unknown>) | undefined
  // Before any token is looked at: there is nobody to whom a sealed server says more.
  if (handler === undefined) throw notServed(served)
  const caller = operation.open === true ? stranger(request) : await authenticate(ctx, request)
  const done = await audited(ctx, { caller, name, method: operation.method }, async () => {
    const body =
      operation.body === undefined
        ? undefined
        : parsed(operation.body, json((await readBody(request, largeBodies.has(name) ? largeBody : smallBody)).toString('utf8')), 'body')
    const unknown = [...url.searchParams.keys()].find((key) => !Object.hasOwn(operation.query?.shape ?? {}, key))
    if (unknown !== undefined) throw new Problem('malformed', `query ${unknown.slice(0, 100)}: unknown`)
    const query = parsed(operation.query, Object.fromEntries(url.searchParams), 'query')
    return await handler({ caller, params: found.params, query, body })
  })
  answer(response, 200, 'application/json', done, served.ready().sealed ? { connection: 'close' } : {})
}

/**
 * Flows audit what they refuse. What is refused before a flow (a read that the caller's roles do not allow, a body that is none) is audited here; a read of
 * what is not there is an answer.
 */
const audited = async <T>(ctx: Base, of: { readonly caller: Caller; readonly name: string; readonly method: string }, work: () => Promise<T>): Promise<T> => {
  try {
    return await work()
  } catch (thrown) {
    const problem = toProblem(thrown)
    if (problem.code === 'forbidden' || (problem.code === 'malformed' && of.method !== 'GET')) {
      const named = problem.reason?.replace(/^access\./, '') ?? of.name
      const action = [named, of.name].find((name): name is Action => Object.hasOwn(actions, name)) ?? 'fleet.read'
      await refuse(ctx, { caller: of.caller, action, subject: of.name }, problem).catch((unwritable: unknown) =>
        ctx.log(`refusal of ${of.name} not audited: ${toProblem(unwritable).message.slice(0, 200)}`),
      )
    }
    throw problem
  }
}

/** Operators are told why (they are authenticated); an internal fault and a missing token show no more than the code. */
const answerProblem = (ctx: Base, request: IncomingMessage, response: ServerResponse, thrown: unknown): void => {
  const problem = toProblem(thrown)
  if (problem.code === 'internal') ctx.log(`admin ${request.method} ${(request.url ?? '').slice(0, 200)}: ${problem.message}`)
  if (response.headersSent) return void response.destroy()
  const detail = problem.code === 'internal' || problem.code === 'unauthenticated' ? {} : { detail: problem.message }
  const retry = problem.retryAfterSeconds === undefined ? {} : { 'retry-after': String(problem.retryAfterSeconds) }
  const status = problemStatus[problem.code]
  // What is left of a refused body is not worth reading.
  answer(
    response,
    status,
    'application/problem+json',
    { type: `urn:fleetkey:problem:${problem.code}`, title: problem.code, status, code: problem.code, ...detail },
    { connection: 'close', ...retry },
  )
}

/** The HTTPS admin API (TLS 1.3, bearer tokens, problem+json after RFC 9457). Not listening yet. `served` is asked at each request. */
export const adminServer = (ctx: Base, tls: { readonly key: string; readonly cert: string }, served: () => Served): Server => {
  const server = createServer({ key: tls.key, cert: tls.cert, minVersion: 'TLSv1.3', maxHeaderSize: 16 << 10 }, (request, response) => {
    handle(ctx, served(), request, response).catch((thrown: unknown) => answerProblem(ctx, request, response, thrown))
  })
  server.headersTimeout = 10_000
  server.requestTimeout = 60_000
  // Longer than our clients keep a connection idle: none is closed under a request that is on its way.
  server.keepAliveTimeout = 30_000
  server.maxConnections = 512
  server.on('tlsClientError', () => undefined)
  server.on('clientError', (_error, socket) => socket.destroy())
  return server
}
