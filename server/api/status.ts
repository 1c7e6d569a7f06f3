import { createHash } from 'node:crypto'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { maxOcspRequest } from '@fleetkey/protocol/x509/ocsp.ts'
import type { StatusPlaces } from '../ca/tbs.ts'
import { listName, pointOf } from '../ca/revocation-list.ts'
import type { Certificate } from '../ca/certificate.ts'
import type { Context } from '../flows/context.ts'
import { ocspResponder } from '../flows/ocsp.ts'
import { authorityName, statusLists } from '../flows/status-lists.ts'
import { listMaker } from './list-maker.ts'

/** Where the lists, the responder and the issuer's certificate are, under the base URL of the listener; for certificates of the CA with this key. */
export const statusPlaces = (base: string, key: string): StatusPlaces => ({
  crl: (serial) => `${listPlace(base)}${listName({ authority: authorityName(key), point: pointOf(serial), delta: false })}`,
  ocsp: `${base}/ocsp`,
  issuer: `${base}/ca/${authorityName(key)}.cer`,
})

/** URL to which the names of lists are appended. */
const listPlace = (base: string): string => `${base}/crl/`

/** Rounds of publishing while nothing happens, and how soon one follows a change: several changes share it. */
const every = { round: 60_000, change: 500 } as const
/** How long a cache between us and who asks may hand out an OCSP answer, whatever has happened since. */
const cachedFor = 5 * 60_000
/** Of a URL that holds an OCSP request in base64 (RFC 6960 §A.1). */
const maxPath = Math.ceil(maxOcspRequest / 3) * 4 * 2

interface Answer {
  readonly status: number
  readonly type: string
  readonly body: Uint8Array | string
  /** Milliseconds since 1970; null: nobody may keep it. */
  readonly until: number | null
  readonly etag?: string
  /** Milliseconds since 1970. */
  readonly modified?: number
}

const plain = (status: number, text: string): Answer => ({ status, type: 'text/plain', body: `${text}\n`, until: null })

const readBody = async (request: IncomingMessage): Promise<Uint8Array | undefined> => {
  const chunks: Buffer[] = []
  let length = 0
  for await (const chunk of request as AsyncIterable<Buffer>) {
    length += chunk.length
    if (length > maxOcspRequest) return undefined
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}

/** The request in a path: base64, percent-encoded or not (clients differ); undefined when it is none. */
const requestIn = (path: string): Uint8Array | undefined => {
  try {
    const text = decodeURIComponent(path)
    return /^[A-Za-z0-9+/]+={0,2}$/.test(text) ? Buffer.from(text, 'base64') : undefined
  } catch {
    return undefined
  }
}

export interface StatusService {
  /** Not listening yet. */
  readonly server: Server
  /** Rows whose status has changed durably. */
  changed(certificates: readonly Certificate[]): void
  /** When each list that is handed out has to be replaced, and when it was made; empty before the first round. */
  lists(): readonly { readonly name: string; readonly thisUpdate: number; readonly nextUpdate: number }[]
  /** Begins to make lists, which are there once everything that is revoked was read; from then on they are kept up to date. */
  start(): void
  stop(): Promise<void>
}

/**
 * Revocation lists, OCSP (RFC 6960) and CA certificates over plain HTTP, for others: everything here is signed and public. A listener of its own, bounded in
 * header, body, time and connections; it knows no token and changes nothing. `base`: the URL that lists name each other by.
 */
export const statusService = (ctx: Context, base: string): StatusService => {
  const lists = statusLists(ctx, listPlace(base), listMaker)
  const responder = ocspResponder(ctx)

  /** `isShared`: by GET, which caches between here and who asks may answer (RFC 5019 §6). */
  const ocsp = async (request: Uint8Array | undefined, isShared: boolean): Promise<Answer> => {
    if (request === undefined) return plain(400, 'no OCSP request')
    const { bytes, valid } = await responder.answer(request)
    const common = { status: 200, type: 'application/ocsp-response', body: bytes } as const
    if (valid === null || !isShared) return { ...common, until: null }
    const etag = `"${createHash('sha256').update(bytes).digest('hex')}"`
    return { ...common, until: Math.min(valid.until, ctx.now() + cachedFor), etag, modified: valid.from }
  }

  const list = (name: string): Answer => {
    const found = lists.get(name)
    if (found === undefined) return isReady ? plain(404, 'no such list') : plain(503, 'the lists are being made')
    // Newer ones come before this one runs out: caches ask again soon.
    return { status: 200, type: 'application/pkix-crl', body: found.bytes, until: ctx.now() + every.round, etag: `"${found.number}"` }
  }

  const answerTo = async (request: IncomingMessage): Promise<Answer> => {
    const { method, url = '/' } = request
    const path = url.split('?')[0] ?? '/'
    if (path.length > maxPath) return plain(414, 'too long')
    const isRead = method === 'GET' || method === 'HEAD'
    if (method === 'POST' && path === '/ocsp') return await ocsp(await readBody(request), false)
    if (!isRead) return plain(405, 'GET, HEAD, or POST to /ocsp')
    if (path.startsWith('/ocsp/')) return await ocsp(requestIn(path.slice('/ocsp/'.length)), true)
    if (path.startsWith('/crl/')) return list(path.slice('/crl/'.length))
    const certificate = path.startsWith('/ca/') ? ctx.authority.certificates.get(path.slice('/ca/'.length)) : undefined
    if (certificate !== undefined) return { status: 200, type: 'application/pkix-cert', body: certificate, until: ctx.now() + 3_600_000 }
    return plain(404, 'nothing here')
  }

  const write = (request: IncomingMessage, response: ServerResponse, answer: Answer): void => {
    const { status, type, body, until, etag, modified } = answer
    const age = until === null ? 0 : Math.max(0, Math.floor((until - ctx.now()) / 1000))
    const headers = {
      ...(age === 0
        ? { 'cache-control': 'no-store' }
        : { 'cache-control': `max-age=${age}, public, no-transform, must-revalidate`, expires: new Date(ctx.now() + age * 1000).toUTCString() }),
      'x-content-type-options': 'nosniff',
      ...(etag === undefined ? {} : { etag }),
      ...(modified === undefined ? {} : { 'last-modified': new Date(modified).toUTCString() }),
    }
    // If-Modified-Since is not heard: two answers of one second may say different things.
    if (etag !== undefined && request.headers['if-none-match'] === etag) {
      response.writeHead(304, headers)
      return void response.end()
    }
    response.writeHead(status, {
      ...headers,
      'content-type': type,
      'content-length': Buffer.byteLength(body),
      ...(status === 200 ? {} : { connection: 'close' }),
    })
    response.end(request.method === 'HEAD' ? undefined : body)
  }

  const server = createServer({ maxHeaderSize: 16 << 10 }, (request, response) => {
    answerTo(request).then(
      (answer) => write(request, response, answer),
      (thrown: unknown) => {
        ctx.log(`status: ${toProblem(thrown).message.slice(0, 200)}`)
        if (response.headersSent) response.destroy()
        else write(request, response, plain(503, 'later'))
      },
    )
  })
  server.headersTimeout = 5_000
  server.requestTimeout = 10_000
  server.keepAliveTimeout = 5_000
  server.maxConnections = 512
  server.on('clientError', (_error, socket) => socket.destroy())

  let isReady = false
  let work: Promise<void> = Promise.resolve()
  const publish = (): void => {
    work = lists.publish().then(
      () => void (isReady = true),
      (thrown: unknown) => ctx.log(`revocation lists: ${toProblem(thrown).message.slice(0, 500)}`),
    )
  }
  let rounds: NodeJS.Timeout | undefined
  let soon: NodeJS.Timeout | undefined
  return {
    server,
    changed(rows) {
      lists.changed(rows)
      if (rounds === undefined) return
      soon ??= setTimeout(() => {
        soon = undefined
        publish()
      }, every.change)
    },
    lists: () => [...lists.all()].map(([name, { thisUpdate, nextUpdate }]) => ({ name, thisUpdate, nextUpdate })),
    start() {
      publish()
      rounds = setInterval(() => {
        publish()
        responder.renew().catch((thrown: unknown) => ctx.log(`OCSP answers: ${toProblem(thrown).message.slice(0, 500)}`))
      }, every.round)
    },
    async stop() {
      clearInterval(rounds)
      clearTimeout(soon)
      rounds = undefined
      await new Promise<void>((resolve) => {
        server.close(() => resolve())
        server.closeAllConnections()
      })
      await work
      await lists.close()
    },
  }
}
