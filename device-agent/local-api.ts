import { createServer, connect, type Server, type Socket } from 'node:net'
import { chmod, chown, rm } from 'node:fs/promises'
import { Problem, toProblem, type ProblemCode } from '@fleetkey/protocol/problem.ts'
import { KeyId } from '@fleetkey/protocol/ids.ts'
import { z } from 'zod'
import type { Consumers, Registration } from './consumers.ts'
import type { LocalKeys } from './local-keys.ts'

/** A change that local applications are told of. */
export interface KeyChange {
  readonly key: string
  /** The epoch in use; null when the key was withdrawn. */
  readonly epoch: number | null
}

export interface LocalApi {
  readonly path: string
  /** Tells the watchers; returns when it is in their sockets. A watcher that does not read is dropped. */
  notify(change: KeyChange): void
  close(): Promise<void>
  /** As a power cut. */
  destroy(): void
}

/** sun_path has 108 bytes, one of them the final zero. */
export const maxSocketPath = 107

const limits = { line: 96 << 10, connections: 64, data: 16 << 10, plaintext: 64 << 10, backlog: 256 << 10, goodbye: 1_000 } as const

const base64 = (max: number) =>
  z
    .string()
    .max(Math.ceil(max / 3) * 4)
    .regex(/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/, { message: 'expected base64' })
    .transform((text) => new Uint8Array(Buffer.from(text, 'base64')))
const id = z.union([z.string().max(64), z.number()]).optional()
const epoch = z.int().min(1).max(0xffff_ffff)

/** One request is one line of JSON. Bytes are base64. */
const Request = z.discriminatedUnion('op', [
  z.strictObject({ id, op: z.literal('status') }),
  z.strictObject({ id, op: z.literal('list') }),
  z.strictObject({ id, op: z.literal('get'), key: KeyId, epoch: epoch.optional() }),
  z.strictObject({ id, op: z.literal('encrypt'), key: KeyId, plaintext: base64(limits.plaintext), aad: base64(4096).optional() }),
  z.strictObject({ id, op: z.literal('decrypt'), key: KeyId, ciphertext: base64(limits.plaintext + 256), aad: base64(4096).optional() }),
  z.strictObject({
    id,
    op: z.literal('used'),
    key: KeyId,
    epoch,
    messages: z
      .int()
      .min(1)
      .max(2 ** 32),
  }),
  z.strictObject({ id, op: z.literal('mac'), key: KeyId, data: base64(limits.data) }),
  z.strictObject({ id, op: z.literal('verify'), key: KeyId, epoch, data: base64(limits.data), mac: base64(64) }),
  z.strictObject({ id, op: z.literal('watch'), key: KeyId.optional() }),
  z.strictObject({ id, op: z.literal('consume'), key: KeyId, name: z.string().regex(/^[a-z0-9][a-z0-9-]{0,31}$/) }),
  z.strictObject({ id, op: z.literal('ready'), key: KeyId, epoch, ready: z.boolean().optional() }),
])
type Request = z.infer<typeof Request>

const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64')

interface Client {
  readonly socket: Socket
  watching: 'nothing' | 'everything' | ReadonlySet<string>
  /** Keys that it has registered for as a consumer. */
  readonly consuming: Map<string, Registration>
}

/** What requests are carried out with. */
interface Serving {
  readonly keys: LocalKeys
  readonly consumers: Consumers
  readonly status: () => object
  readonly write: (client: Client, value: object) => void
}

/** What the request asks for, as the fields of the answer. */
const perform = async ({ keys, consumers, status, write }: Serving, client: Client, request: Request): Promise<object> => {
  switch (request.op) {
    case 'status':
      return status()
    case 'list':
      return { keys: keys.list() }
    case 'get': {
      const got = keys.get(request.key, request.epoch)
      return { key: got.key, epoch: got.epoch, algorithm: got.algorithm, material: text(got.material) }
    }
    case 'encrypt': {
      const made = await keys.encrypt(request.key, request.plaintext, request.aad)
      return { epoch: made.epoch, ciphertext: text(made.ciphertext) }
    }
    case 'decrypt': {
      const opened = keys.decrypt(request.key, request.ciphertext, request.aad)
      return { epoch: opened.epoch, run: text(opened.run), counter: opened.counter, plaintext: text(opened.plaintext) }
    }
    case 'used': {
      await keys.count(request.key, request.epoch, request.messages)
      return { counted: request.messages }
    }
    case 'mac': {
      const made = await keys.mac(request.key, request.data)
      return { epoch: made.epoch, mac: text(made.mac) }
    }
    case 'verify':
      return { valid: await keys.verify(request.key, request.epoch, request.data, request.mac) }
    case 'watch': {
      if (request.key === undefined) client.watching = 'everything'
      else if (client.watching !== 'everything')
        client.watching = new Set([...(client.watching === 'nothing' ? [] : client.watching), request.key]).add(request.key)
      return { watching: true, keys: keys.list() }
    }
    case 'consume': {
      const { key, name } = request
      if (client.consuming.has(key)) throw new Problem('conflict', `this connection consumes ${key} already`, { reason: 'consumer.twice' })
      client.consuming.set(
        key,
        consumers.register({ key, name }, (next) => write(client, { event: 'epoch', key, epoch: next })),
      )
      return { consuming: key, epoch: keys.list().find((one) => one.key === key)?.current ?? null }
    }
    case 'ready': {
      const registered = client.consuming.get(request.key)
      if (registered === undefined) throw new Problem('conflict', `this connection does not consume ${request.key}`, { reason: 'consumer.unknown' })
      if (request.ready === false) registered.refuse(request.epoch)
      else registered.ready(request.epoch)
      return { key: request.key, epoch: request.epoch }
    }
  }
}

const idOf = (value: unknown): string | number | undefined => {
  const found: unknown = typeof value === 'object' && value !== null && 'id' in value ? value.id : undefined
  return typeof found === 'number' || (typeof found === 'string' && found.length <= 64) ? found : undefined
}

/** An answer of `{code, detail}`: local applications may read the detail, it never holds key bytes. */
const failed = (id: string | number | undefined, code: ProblemCode, detail: string): object => ({
  ...(id === undefined ? {} : { id }),
  error: { code, detail: detail.slice(0, 300) },
})

const answerTo = async (line: string, serving: Serving, client: Client): Promise<object> => {
  let value: unknown
  try {
    value = JSON.parse(line)
  } catch {
    return failed(undefined, 'malformed', 'not a line of JSON')
  }
  const id = idOf(value)
  const request = Request.safeParse(value)
  if (!request.success) return failed(id, 'malformed', request.error.issues.map(({ path, message }) => `${path.join('.')}: ${message}`).join('; '))
  try {
    return { ...(id === undefined ? {} : { id }), ...(await perform(serving, client, request.data)) }
  } catch (thrown) {
    const problem = toProblem(thrown)
    return failed(id, problem.code, problem.code === 'internal' ? 'the agent failed' : problem.message)
  }
}

/** Whether somebody answers behind this socket file. */
const alive = async (path: string): Promise<boolean> =>
  await new Promise((resolve) => {
    const socket = connect(path)
    socket.once('connect', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })

/**
 * Serves the keys to local applications: a UNIX socket, one JSON object a line in both directions, answers in the order of the requests. Who may
 * connect is the file's mode, owner and group. Lines, connections and what waits for a slow reader are bounded. Throws Problem('conflict') when another agent serves this path.
 */
export const openLocalApi = async (of: {
  readonly path: string
  readonly owner: { readonly mode: number; readonly uid?: number; readonly gid?: number }
  readonly keys: LocalKeys
  readonly consumers: Consumers
  readonly status: () => object
}): Promise<LocalApi> => {
  const { path } = of
  if (Buffer.byteLength(path) > maxSocketPath)
    throw new Problem('malformed', `socket path of more than ${maxSocketPath} bytes: ${path}`, { reason: 'socket.path' })
  if (await alive(path)) throw new Problem('conflict', `another agent serves ${path}`, { reason: 'socket.in-use' })
  await rm(path, { force: true })
  const clients = new Set<Client>()

  const write = (client: Client, value: object): void => {
    client.socket.write(`${JSON.stringify(value)}\n`)
    if (client.socket.writableLength > limits.backlog) client.socket.destroy()
  }

  const leaving = new Set<Socket>()

  /** Says why, and leaves a moment to read it: a peer that keeps its end open holds nothing here. */
  const refuse = (socket: Socket, code: ProblemCode, detail: string): void => {
    const timer = setTimeout(() => socket.destroy(), limits.goodbye)
    leaving.add(socket)
    socket.once('close', () => {
      clearTimeout(timer)
      leaving.delete(socket)
    })
    socket.end(`${JSON.stringify(failed(undefined, code, detail))}\n`)
  }

  const serve = (socket: Socket): void => {
    const client: Client = { socket, watching: 'nothing', consuming: new Map() }
    if (clients.size >= limits.connections) {
      socket.on('error', () => undefined)
      return refuse(socket, 'rate-limited', `more than ${limits.connections} connections`)
    }
    clients.add(client)
    let waiting = Buffer.alloc(0)
    let busy = false
    const close = (): void => {
      clients.delete(client)
      for (const registration of client.consuming.values()) registration.leave()
      client.consuming.clear()
      socket.destroy()
    }
    socket.on('error', close)
    socket.on('close', close)
    /** One request at a time: nothing more is read while one is worked on. */
    const drain = async (): Promise<void> => {
      if (busy) return
      busy = true
      socket.pause()
      for (let end = waiting.indexOf(10); end >= 0 && clients.has(client); end = waiting.indexOf(10)) {
        const line = waiting.subarray(0, end).toString('utf8')
        waiting = waiting.subarray(end + 1)
        if (line.trim() !== '') write(client, await answerTo(line, { ...of, write }, client))
      }
      busy = false
      // Paused for good: nothing more is read, and the client counts until it is gone.
      if (waiting.length > limits.line) refuse(socket, 'malformed', `a line of more than ${limits.line} bytes`)
      else socket.resume()
    }
    socket.on('data', (chunk: Buffer) => {
      waiting = Buffer.concat([waiting, chunk])
      void drain().catch(close)
    })
  }

  const server = await listen(path, serve)
  await chmod(path, of.owner.mode)
  if (of.owner.uid !== undefined || of.owner.gid !== undefined)
    await chown(path, of.owner.uid ?? process.getuid?.() ?? -1, of.owner.gid ?? process.getgid?.() ?? -1)

  const destroy = (): void => {
    for (const { socket } of clients) socket.destroy()
    for (const socket of leaving) socket.destroy()
    clients.clear()
    server.close()
  }
  return {
    path,
    notify(change) {
      for (const client of clients) {
        const { watching } = client
        if (watching === 'everything' || (watching !== 'nothing' && watching.has(change.key))) write(client, { event: 'changed', ...change })
      }
    },
    async close() {
      const closed = new Promise<void>((resolve) => server.once('close', () => resolve()))
      destroy()
      await closed
    },
    destroy,
  }
}

const listen = async (path: string, serve: (socket: Socket) => void): Promise<Server> => {
  const server = createServer(serve)
  // Beyond those that are told so, the rest is dropped without a word.
  server.maxConnections = 2 * limits.connections
  const listening = Promise.withResolvers<void>()
  server.once('error', listening.reject)
  server.once('listening', listening.resolve)
  // Closed to everybody until its mode is set. The file is made within the call: no other file gets this mask.
  const before = process.umask(0o177)
  try {
    server.listen(path)
  } finally {
    process.umask(before)
  }
  await listening.promise
  server.on('error', () => undefined)
  return server
}
