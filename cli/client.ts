import { existsSync, readFileSync } from 'node:fs'
import { X509Certificate } from 'node:crypto'
import { Agent, request } from 'node:https'
import { join } from 'node:path'
import type { IncomingMessage } from 'node:http'
import { checkServerIdentity, type PeerCertificate } from 'node:tls'
import {
  operations,
  ProblemView,
  type BodyIn,
  type Operation,
  type OperationName,
  type ParamsOf,
  type QueryIn,
  type ResponseOf,
} from '@fleetkey/protocol/admin.ts'
import { z } from 'zod'
import { UsageError } from './command.ts'

/** The server refused: its code decides the exit code. */
export class Refused extends Error {
  override readonly name = 'Refused'
  readonly code: string
  constructor(code: string, detail: string) {
    super(detail)
    this.code = code
  }
}

/** The server could not be reached or does not speak our language. */
export class Unreachable extends Error {
  override readonly name = 'Unreachable'
}

interface Connection {
  readonly server: string
  /** Undefined: nothing is asked that takes one. */
  readonly token: string | undefined
  /** PEM; its certificates are trusted for the names they bear. */
  readonly ca: string | undefined
  /** PEM: what the server shows while it is sealed. Trusted for itself, whatever the name. */
  readonly sealing?: string
}

export interface Call<N extends OperationName> {
  readonly params?: ParamsOf<N>
  readonly query?: QueryIn<N>
  readonly body?: BodyIn<N>
}

export interface Client {
  readonly server: string
  call<N extends OperationName>(name: N, call?: Call<N>): Promise<ResponseOf<N>>
  /** A GET whose body is text, handed over piece by piece. */
  stream(path: string, write: (chunk: string) => Promise<void> | void): Promise<void>
  /** Status and body of a GET without a token. */
  probe(path: string): Promise<{ readonly status: number; readonly body: string }>
  close(): void
}

const CliFile = z.strictObject({ server: z.string(), token: z.string(), ca: z.string() })

const fileText = (path: string, what: string): string => {
  try {
    return readFileSync(path, 'utf8')
  } catch (error) {
    throw new UsageError(`${what} ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

const tokenIn = (path: string): string => {
  const token = fileText(path, 'token file').trim()
  if (!/^[A-Za-z0-9_-]{20,200}$/.test(token)) throw new UsageError(`token file ${path}: not a token, which is one line of letters, digits, - and _`)
  return token
}

const authorityIn = (path: string): string => {
  const text = fileText(path, 'CA file')
  if (!text.includes('-----BEGIN CERTIFICATE-----')) throw new UsageError(`CA file ${path}: no PEM certificate`)
  return text
}

const address = (given: string): string => {
  if (!URL.canParse(given) || new URL(given).protocol !== 'https:') throw new UsageError(`--server takes an address such as https://host:8443, not ${given}`)
  return given
}

/**
 * Where the server is: options, then FLEETKEY_SERVER, FLEETKEY_TOKEN_FILE, FLEETKEY_CA, then `cli.json` in the data folder,
 * which the server writes at its first start.
 */
export const resolveConnection = (
  given: { server?: string | undefined; tokenFile?: string | undefined; ca?: string | undefined; data: string },
  env: NodeJS.ProcessEnv,
): Connection => {
  const server = given.server ?? env['FLEETKEY_SERVER']
  const tokenFile = given.tokenFile ?? env['FLEETKEY_TOKEN_FILE']
  const ca = given.ca ?? env['FLEETKEY_CA']
  if (server !== undefined && tokenFile !== undefined && ca !== undefined) return { server: address(server), token: tokenIn(tokenFile), ca: authorityIn(ca) }
  const path = join(given.data, 'cli.json')
  let file: z.infer<typeof CliFile>
  try {
    file = CliFile.parse(JSON.parse(readFileSync(path, 'utf8')))
  } catch {
    throw new UsageError(`no server is named: give --server, --token-file and --ca, or --data DIR with the cli.json that the server wrote (looked at ${path})`)
  }
  return {
    server: server === undefined ? file.server : address(server),
    token: tokenFile === undefined ? file.token : tokenIn(tokenFile),
    ca: ca === undefined ? file.ca : authorityIn(ca),
  }
}

/**
 * To a server that may be sealed: no token is ever sent to it. Trusted is the certificate that it shows then (`--sealing`, FLEETKEY_SEALING, `sealing.crt` in
 * the data folder), and what is trusted otherwise, as far as it is at hand.
 */
export const resolveSealed = (
  given: { server?: string | undefined; sealing?: string | undefined; ca?: string | undefined; data: string },
  env: NodeJS.ProcessEnv,
): Connection => {
  const path = join(given.data, 'cli.json')
  const file = existsSync(path) ? CliFile.safeParse(JSON.parse(fileText(path, 'connection'))).data : undefined
  const [caFile, sealingFile] = [given.ca ?? env['FLEETKEY_CA'], given.sealing ?? env['FLEETKEY_SEALING'] ?? join(given.data, 'sealing.crt')]
  const server = given.server ?? env['FLEETKEY_SERVER'] ?? file?.server
  if (server === undefined) throw new UsageError(`no server is named: give --server, or --data DIR with the cli.json that the server wrote (looked at ${path})`)
  const asked = given.sealing !== undefined || env['FLEETKEY_SEALING'] !== undefined
  const sealing = asked || existsSync(sealingFile) ? { sealing: authorityIn(sealingFile) } : {}
  const ca = caFile === undefined ? file?.ca : authorityIn(caFile)
  if (ca === undefined && sealing.sealing === undefined)
    throw new UsageError('no certificate to know the server by: give --sealing FILE (its sealing.crt), or --ca for one that is not sealed')
  return { server: address(server), token: undefined, ca, ...sealing }
}

const bodyOf = async (response: IncomingMessage, max = 64 << 20): Promise<string> => {
  let all = ''
  response.setEncoding('utf8')
  for await (const chunk of response as AsyncIterable<string>) {
    all += chunk
    if (all.length > max) throw new Unreachable('the answer is too long')
  }
  return all
}

const problemOf = (status: number, body: string): Error => {
  try {
    const problem = ProblemView.parse(JSON.parse(body))
    return new Refused(problem.code, problem.detail ?? problem.title)
  } catch {
    return new Unreachable(`unexpected answer ${status}`)
  }
}

/** Speaks the admin API over TLS 1.3; every answer is checked against its schema. */
export const createClient = (connection: Connection): Client => {
  const { sealing } = connection
  const pinned = sealing === undefined ? undefined : new X509Certificate(sealing).raw
  const agent = new Agent({
    ca: [connection.ca, sealing].filter((pem) => pem !== undefined),
    minVersion: 'TLSv1.3',
    keepAlive: true,
    maxSockets: 8,
    // Idle for no longer than this: well before the server closes it.
    timeout: 5_000,
    // Whoever has the key of exactly this certificate is the server, under whatever name it was reached.
    checkServerIdentity: (host: string, peer: PeerCertificate) => (pinned?.equals(peer.raw) === true ? undefined : checkServerIdentity(host, peer)),
  })
  const send = async (method: string, path: string, body: unknown, authorised: boolean): Promise<IncomingMessage> => {
    const { response, reused } = attempt(method, path, body, authorised)
    return await response.catch(async (error: unknown) => {
      // A server closes idle connections, and one may be on its way out when it is used again: what only reads is asked once more.
      if (method === 'GET' && reused()) return await attempt(method, path, body, authorised).response
      throw error
    })
  }
  const attempt = (
    method: string,
    path: string,
    body: unknown,
    authorised: boolean,
  ): { readonly response: Promise<IncomingMessage>; readonly reused: () => boolean } => {
    const payload = body === undefined ? undefined : JSON.stringify(body)
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
    const url = new URL(path, connection.server)
    const outgoing = request(url, {
      method,
      agent,
      timeout: 60_000,
      headers: {
        ...(authorised && connection.token !== undefined ? { authorization: `Bearer ${connection.token}` } : {}),
        ...(payload === undefined ? {} : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(payload) }),
      },
    })
    outgoing.on('response', resolve)
    outgoing.on('timeout', () => outgoing.destroy(new Error('no answer within 60 s')))
    outgoing.on('error', (error: NodeJS.ErrnoException) => {
      const why =
        error.code === 'DEPTH_ZERO_SELF_SIGNED_CERT'
          ? 'self-signed certificate: a sealed server shows one (fleetkey seal status)'
          : `${error.message}${error.code === 'ECONNREFUSED' ? ': no server listens there (fleetkey server start)' : ''}`
      reject(new Unreachable(`${connection.server}: ${why}`))
    })
    outgoing.end(payload)
    return { response: promise, reused: () => outgoing.reusedSocket }
  }
  return {
    server: connection.server,
    async call(name, call = {}) {
      const operation: Operation = operations[name]
      const params: Readonly<Record<string, string>> = call.params ?? {}
      const path = operation.path.replaceAll(/\{(\w+)\}/g, (_, key: string) => encodeURIComponent(params[key] ?? ''))
      const query = Object.entries(call.query ?? {}).flatMap(([key, value]) =>
        value === undefined ? [] : [[key, `${value as string | number | boolean}`] as [string, string]],
      )
      const response = await send(operation.method, query.length === 0 ? path : `${path}?${new URLSearchParams(query).toString()}`, call.body, true)
      const body = await bodyOf(response)
      if (response.statusCode !== 200) throw problemOf(response.statusCode ?? 0, body)
      const result = operation.response.safeParse(JSON.parse(body))
      if (!result.success) throw new Unreachable(`the server's answer to ${name} is not understood: ${result.error.issues[0]?.message}`)
      return result.data as never
    },
    async stream(path, write) {
      const response = await send('GET', path, undefined, true)
      if (response.statusCode !== 200) throw problemOf(response.statusCode ?? 0, await bodyOf(response))
      response.setEncoding('utf8')
      for await (const chunk of response as AsyncIterable<string>) await write(chunk)
      if (!response.complete) throw new Unreachable('the answer ended early')
    },
    async probe(path) {
      const response = await send('GET', path, undefined, false)
      return { status: response.statusCode ?? 0, body: await bodyOf(response) }
    },
    close: () => agent.destroy(),
  }
}
