import { constants } from 'node:crypto'
import type { X509Certificate } from 'node:crypto'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { createServer, type Server } from 'node:https'
import type { SecureContextOptions, TLSSocket } from 'node:tls'
import { problemStatus, toProblem, type Problem } from '@fleetkey/protocol/problem.ts'
import { certsOnly } from '@fleetkey/protocol/x509/certs-only.ts'
import { oid, sequence, set } from '@fleetkey/protocol/x509/der.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import type { Certificate } from '../ca/certificate.ts'
import { estStatus, refuseEst } from '../ca/est-reasons.ts'
import type { Context } from '../flows/context.ts'
import { estEnrol, estReenrol, type EstRequest } from '../flows/est.ts'
import { sha256hex } from '../flows/message.ts'
import { addressPrefix } from './address.ts'

const root = '/.well-known/est/'
/** A request of 16 KiB in base64, with line breaks. */
const maxBody = 24 << 10
/** Enrolments at once: each waits for the KMS and the disk. */
const maxWaiting = 128
const maxChain = 4

interface Answer {
  readonly type: string
  readonly body: Uint8Array
}

/** What a request should be made of (RFC 7030 §4.5.2): a P-256 key, signed by ECDSA with SHA-256. */
const csrAttributes = sequence(sequence(oid(oids.ecPublicKey), set(oid(oids.p256))), oid(oids.ecdsaSha256))

const readBody = async (request: IncomingMessage): Promise<string> => {
  const chunks: Buffer[] = []
  let length = 0
  // What refuses a body has to be able to say so: the socket stays.
  for await (const chunk of request.iterator({ destroyOnReturn: false }) as AsyncIterable<Buffer>) {
    length += chunk.length
    if (length > maxBody) refuseEst('est.body-size')
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString('latin1')
}

/** Base64 of RFC 4648 §4 with whole quanta and zero padding bits; line breaks and blanks are passed over (RFC 8951 §3.1). */
const decoded = (body: string): Uint8Array => {
  const text = body.replace(/[\r\n\t ]/g, '')
  const bytes = Buffer.from(text, 'base64')
  return bytes.length === 0 || bytes.toString('base64') !== text ? refuseEst('est.base64') : new Uint8Array(bytes)
}

/** What the peer sent, its own certificate first. Whether anything of it counts is not judged here. */
const chainOf = (socket: TLSSocket): readonly Uint8Array[] => {
  const chain: Uint8Array[] = []
  let one: X509Certificate | undefined = socket.getPeerX509Certificate()
  while (one !== undefined && chain.length < maxChain) {
    chain.push(new Uint8Array(one.raw))
    const issuer: X509Certificate | undefined = one.issuerCertificate
    one = issuer === undefined || issuer.fingerprint256 === one.fingerprint256 ? undefined : issuer
  }
  return chain
}

/** Of its path what may stand in a log: no query, which may hold what somebody took for the place of a token. */
const shown = ({ url = '' }: IncomingMessage): string => (url.split('?')[0] ?? '').slice(0, 100)

/** HTTP Basic (RFC 7617). */
const basicOf = (request: IncomingMessage): EstRequest['basic'] => {
  const header = request.headers.authorization
  if (header === undefined) return null
  const encoded = /^Basic ([A-Za-z0-9+/]{4,400}={0,2})$/i.exec(header)?.[1]
  const text = encoded === undefined ? '' : Buffer.from(encoded, 'base64').toString('utf8')
  const at = text.indexOf(':')
  return at <= 0 || text.length > 300 ? refuseEst('est.authorization') : { user: text.slice(0, at), password: text.slice(at + 1) }
}

const enrolmentOf = async (request: IncomingMessage): Promise<EstRequest> => {
  const type = (request.headers['content-type'] ?? '').split(';')[0]?.trim().toLowerCase()
  if (type !== 'application/pkcs10') refuseEst('est.content-type', `content type ${JSON.stringify(type).slice(0, 100)}`)
  const socket = request.socket as TLSSocket
  const basic = basicOf(request)
  return { csr: decoded(await readBody(request)), chain: chainOf(socket), basic, from: addressPrefix(socket.remoteAddress ?? '') }
}

export type EstServer = Server & {
  renew(tls: { readonly key: string; readonly cert: string }): void
  /** Ends connections over these certificates, those that are good aside. What they ask is refused without it: every request judges the certificate anew. */
  cut(certificates: readonly Pick<Certificate, 'der' | 'status'>[]): void
}

/**
 * EST (RFC 7030, RFC 8951) for devices that run no agent of ours. A listener of its own: it asks for client certificates (which are judged in our code, never by
 * TLS) and takes TLS 1.2, because EST clients of today speak no other; the operators' API does neither. Not listening yet.
 */
export const estServer = (ctx: Context, tls: { readonly key: string; readonly cert: string }): EstServer => {
  let waiting = 0
  /** Connections on which a certificate was shown, by its SHA-256 (hex). */
  const byCertificate = new Map<string, Set<TLSSocket>>()

  const enrolment = async (request: IncomingMessage, work: (ctx: Context, of: EstRequest) => Promise<Uint8Array>): Promise<Answer> => {
    // Whoever sends its request slowly holds up nobody but itself.
    const asked = await enrolmentOf(request)
    if (waiting >= maxWaiting) refuseEst('est.busy')
    waiting++
    try {
      return { type: 'application/pkcs7-mime; smime-type=certs-only', body: certsOnly([await work(ctx, asked)]) }
    } finally {
      waiting--
    }
  }

  const operations: Readonly<Record<string, { readonly method: string; readonly answer: (request: IncomingMessage) => Promise<Answer> }>> = {
    cacerts: { method: 'GET', answer: async () => ({ type: 'application/pkcs7-mime', body: certsOnly(ctx.authority.anchors) }) },
    csrattrs: { method: 'GET', answer: async () => ({ type: 'application/csrattrs', body: csrAttributes }) },
    simpleenroll: { method: 'POST', answer: async (request) => await enrolment(request, estEnrol) },
    simplereenroll: { method: 'POST', answer: async (request) => await enrolment(request, estReenrol) },
  }

  const answerTo = async (request: IncomingMessage): Promise<Answer> => {
    const path = request.url ?? '/'
    const name = path.startsWith(root) ? path.slice(root.length) : ''
    const operation = Object.hasOwn(operations, name) ? operations[name] : undefined
    if (operation === undefined) return refuseEst('est.path', `${request.method} ${shown(request)}`)
    if (request.method !== operation.method) return refuseEst('est.method', `${request.method} ${name}`)
    return await operation.answer(request)
  }

  const refused = (request: IncomingMessage, response: ServerResponse, thrown: unknown): void => {
    const problem = toProblem(thrown)
    if (problem.code === 'internal') ctx.log(`est ${request.method} ${shown(request)}: ${problem.message.slice(0, 1000)}`)
    // What a flow refused it has audited; what never came that far is counted with its source.
    else if (problem.reason?.startsWith('est.') === true && isEarly(problem)) count(request, problem)
    if (response.headersSent) return void response.destroy()
    const text = `${problem.code}\n`
    response.writeHead(estStatus(problem.reason) ?? problemStatus[problem.code], {
      'content-type': 'text/plain',
      'content-length': Buffer.byteLength(text),
      'cache-control': 'no-store',
      connection: 'close',
      ...(problem.code === 'unauthenticated' ? { 'www-authenticate': 'Basic realm="fleetkey est", charset="UTF-8"' } : {}),
      ...(problem.retryAfterSeconds === undefined ? {} : { 'retry-after': String(problem.retryAfterSeconds) }),
    })
    response.end(text)
  }
  const early: ReadonlySet<string> = new Set(['est.path', 'est.method', 'est.content-type', 'est.body-size', 'est.base64', 'est.busy', 'est.authorization'])
  const isEarly = ({ reason }: Problem): boolean => reason !== undefined && early.has(reason)
  const count = (request: IncomingMessage, problem: Problem): void =>
    ctx.refusals.count(
      {
        caller: { from: addressPrefix((request.socket as TLSSocket | null)?.remoteAddress ?? '') },
        action: 'est.enrol',
        subject: shown(request).slice(0, 64),
      },
      problem,
      ctx.now(),
    )

  const context = (of: { readonly key: string; readonly cert: string }): SecureContextOptions => ({
    ...of,
    minVersion: 'TLSv1.2',
    ciphers: 'TLS_AES_256_GCM_SHA384:TLS_AES_128_GCM_SHA256:ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384',
    // No resumption and no renegotiation: every connection proves its key anew, once.
    secureOptions: constants.SSL_OP_NO_TICKET | constants.SSL_OP_NO_RENEGOTIATION,
  })
  const server = createServer(
    { ...context(tls), requestCert: true, rejectUnauthorized: false, handshakeTimeout: 10_000, maxHeaderSize: 8 << 10 },
    (request, response) => {
      answerTo(request).then(
        ({ type, body }) => {
          // One line, its length known before: clients stumble over line breaks and chunks.
          const text = Buffer.from(body).toString('base64')
          response.writeHead(200, { 'content-type': type, 'content-transfer-encoding': 'base64', 'content-length': text.length, 'cache-control': 'no-store' })
          response.end(text)
        },
        (thrown: unknown) => refused(request, response, thrown),
      )
    },
  )
  server.headersTimeout = 5_000
  server.requestTimeout = 10_000
  server.keepAliveTimeout = 5_000
  server.maxConnections = 512
  server.on('tlsClientError', () => undefined)
  server.on('secureConnection', (socket: TLSSocket) => {
    const certificate = socket.getPeerX509Certificate()
    if (certificate === undefined) return
    const name = sha256hex(certificate.raw)
    const same = (byCertificate.get(name) ?? new Set()).add(socket)
    byCertificate.set(name, same)
    socket.once('close', () => {
      same.delete(socket)
      if (same.size === 0 && byCertificate.get(name) === same) byCertificate.delete(name)
    })
  })
  const end = (sockets: Iterable<TLSSocket>): void => [...sockets].forEach((socket) => socket.destroy())
  let retired = ctx.authority.retired.size
  // A CA counts no more. Which connections rest on it is not looked up: there are 512 at most, and whoever may comes back.
  ctx.authority.onChange(async () => {
    if (ctx.authority.retired.size > retired) for (const sockets of byCertificate.values()) end(sockets)
    retired = ctx.authority.retired.size
  })
  server.on('clientError', (_error, socket) => socket.destroy())
  return Object.assign(server, {
    renew: (fresh: { readonly key: string; readonly cert: string }) => server.setSecureContext(context(fresh)),
    cut(certificates: readonly Pick<Certificate, 'der' | 'status'>[]) {
      if (byCertificate.size === 0) return
      for (const { der, status } of certificates) if (status !== 'valid') end(byCertificate.get(sha256hex(der)) ?? [])
    },
  })
}
