import { constants, createHash } from 'node:crypto'
import { createServer, type Server } from 'node:https'
import type { IncomingMessage, ServerResponse } from 'node:http'
import type { SecureContextOptions } from 'node:tls'
import { operations, type BodyOut, type Operation, type OperationName, type ParamsOf, type QueryOut, type ResponseOf } from '@fleetkey/protocol/admin.ts'
import { Problem, problemStatus, toProblem } from '@fleetkey/protocol/problem.ts'
import { actions, authorise, type Action } from '../../access/authorise.ts'
import type { Caller } from '../../access/caller.ts'
import type { Base } from '../../flows/context.ts'
import { refuse } from '../../flows/perform.ts'
import { addressPrefix } from '../address.ts'
import { openApi } from '../openapi.ts'
import { jsonIn } from './json.ts'

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
const largeBodies: ReadonlyMap<OperationName, Action> = new Map([
  ['endorsement.import', 'endorsement.import'],
  ['endorsement.policy.set', 'endorsement.policy'],
  ['batch.import', 'batch.import'],
  ['release.import', 'release.import'],
])

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
const authenticate = async (ctx: Base, request: IncomingMessage, asked: string): Promise<Caller> => {
  const from = addressPrefix(request.socket.remoteAddress ?? '')
  const token = /^Bearer ([A-Za-z0-9_-]{20,200})$/.exec(request.headers.authorization ?? '')?.[1]
  const hash = token === undefined ? '' : createHash('sha256').update(token).digest('hex')
  const known = token === undefined ? undefined : (await ctx.store.find('token', { where: { hash }, limit: 1 }))[0]
  if (known !== undefined && (known.expiresAt === null || known.expiresAt > ctx.now()))
    return { kind: 'operator', id: known.operator, roles: known.roles, from }
  const problem = new Problem('unauthenticated', token === undefined ? 'no bearer token' : known === undefined ? 'unknown token' : 'expired token', {
    reason: 'token',
  })
  // What was asked for by its name: a path or query may hold what somebody took for the place of a token.
  ctx.refusals.count({ caller: { from }, action: 'fleet.read', subject: asked }, problem, ctx.now())
  throw problem
}

const parsed = <T>(schema: Operation['body'], value: unknown, what: string): T => {
  if (schema === undefined) return undefined as T
  const result = schema.safeParse(value)
  if (result.success) return result.data as T
  const issue = result.error.issues[0]
  throw new Problem('malformed', `${what}${issue === undefined ? '' : ` ${issue.path.join('.')}: ${issue.message}`}`)
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
  // As it was sent: a path that would have to be normalised is one that nobody serves, and whatever stands before this server has seen the same path.
  const [path = '', ...rest] = (request.url ?? '/').split('?')
  const search = new URLSearchParams(rest.join('?'))
  if (request.method === 'GET' && path === '/healthz') return answer(response, 200, 'application/json', { ok: true })
  if (request.method === 'GET' && path === '/readyz') {
    const state = served.ready()
    return answer(response, state.ready ? 200 : 503, 'application/json', state)
  }
  if (request.method === 'GET' && path === '/openapi.json') return answer(response, 200, 'application/json', openApi())
  const { handlers, streams } = served
  if (request.method === 'GET' && path === '/api/1/audit/export') {
    if (streams === undefined) throw notServed(served)
    const caller = await authenticate(ctx, request, 'audit.export')
    return await audited(ctx, { caller, name: 'audit.export', method: 'GET' }, async () => await streams.auditExport(caller, response))
  }
  const found = matchRoute(request.method ?? '', path)
  if (found === undefined) throw new Problem('not-found', `${request.method} ${path}`)
  const { name, operation } = found.route
  const handler = handlers[name] as ((call: unknown) => Promise<unknown>) | undefined
  // Before any token is looked at: there is nobody to whom a sealed server says more.
  if (handler === undefined) throw notServed(served)
  const caller = operation.open === true ? stranger(request) : await authenticate(ctx, request, name)
  const done = await audited(ctx, { caller, name, method: operation.method }, async () => {
    // The flow asks again; whoever may not do it has nothing read for it.
    const large = largeBodies.get(name)
    if (large !== undefined) authorise(caller, large)
    const body =
      operation.body === undefined ? undefined : parsed(operation.body, jsonIn(await readBody(request, large === undefined ? smallBody : largeBody)), 'body')
    const unknown = [...search.keys()].find((key) => !Object.hasOwn(operation.query?.shape ?? {}, key))
    if (unknown !== undefined) throw new Problem('malformed', `query ${unknown.slice(0, 100)}: unknown`)
    const query = parsed(operation.query, Object.fromEntries(search), 'query')
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
  if (problem.code === 'internal') ctx.log(`admin ${request.method} ${(request.url ?? '').split('?')[0]?.slice(0, 200)}: ${problem.message}`)
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

interface OwnTls {
  readonly key: string
  readonly cert: string
}

const context = ({ key, cert }: OwnTls): SecureContextOptions => ({
  key,
  cert,
  minVersion: 'TLSv1.3',
  // No resumption: who saw the certificate of a sealed server looks at the next one anew.
  secureOptions: constants.SSL_OP_NO_TICKET,
})

/** The HTTPS admin API (TLS 1.3, bearer tokens, problem+json after RFC 9457). Not listening yet. `served` is asked at each request. */
export const adminServer = (ctx: Base, tls: OwnTls, served: () => Served): Server & { renew(tls: OwnTls): void } => {
  const server = createServer({ ...context(tls), maxHeaderSize: 16 << 10 }, (request, response) => {
    handle(ctx, served(), request, response).catch((thrown: unknown) => answerProblem(ctx, request, response, thrown))
  })
  server.headersTimeout = 10_000
  server.requestTimeout = 60_000
  // Longer than our clients keep a connection idle: none is closed under a request that is on its way.
  server.keepAliveTimeout = 30_000
  server.maxConnections = 512
  server.on('tlsClientError', () => undefined)
  server.on('clientError', (_error, socket) => socket.destroy())
  return Object.assign(server, { renew: (fresh: OwnTls) => server.setSecureContext(context(fresh)) })
}
