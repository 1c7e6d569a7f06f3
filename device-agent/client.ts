import { connect, type Socket } from 'node:net'
import { createInterface } from 'node:readline'
import { Problem, type ProblemCode } from '@fleetkey/protocol/problem.ts'

/** For applications on a device: keys from the agent's socket (docs/operations.md, "The agent"). Every method throws Problem with the agent's code; `unavailable` while it does not run. */
export interface AgentClient {
  list(): Promise<
    readonly {
      readonly key: string
      readonly algorithm: string
      readonly protection: string
      readonly current: number | null
      readonly epochs: readonly number[]
    }[]
  >
  /** Key bytes of the epoch in use, or of one that is held: `sealed` keys only. Tell `used` what was protected with them. */
  get(key: string, epoch?: number): Promise<{ readonly epoch: number; readonly material: Uint8Array }>
  used(key: string, epoch: number, messages: number): Promise<void>
  /** COSE_Encrypt0 under the epoch in use; at most 64 KiB. `aad` has to be the same when it is opened. */
  encrypt(key: string, plaintext: Uint8Array, aad?: Uint8Array): Promise<Uint8Array>
  /**
   * Opens it under whichever epoch it names, as long as the device is entitled to that. `once`: a message that this client has opened before is refused (`conflict`). What came before
   * this client began it cannot know: freshness that must outlive it needs a time or a challenge in the plaintext.
   */
  decrypt(
    key: string,
    ciphertext: Uint8Array,
    options?: { readonly aad?: Uint8Array; readonly once?: boolean },
  ): Promise<{ readonly epoch: number; readonly plaintext: Uint8Array }>
  /** HMAC-SHA256 by a `tpm` key, inside the TPM. */
  mac(key: string, data: Uint8Array): Promise<{ readonly epoch: number; readonly mac: Uint8Array }>
  verify(of: { readonly key: string; readonly epoch: number; readonly data: Uint8Array; readonly mac: Uint8Array }): Promise<boolean>
  /**
   * Registers this client as a consumer of a key: the agent proves the use of a new epoch to the server only after `take` has resolved for it. `take` is called with the epoch in use at
   * once, again with each new one, and after every reconnection. When it throws, the agent hears that this consumer is not ready, and asks again later.
   */
  consume(key: string, name: string, take: (epoch: number) => Promise<void> | void): Promise<void>
  close(): void
}

type Answer = Readonly<Record<string, unknown>>

/** Longest a request may take: the TPM may be slow. */
const patience = 150_000
const reconnect = { first: 100, most: 5_000 } as const
/** Writers whose messages are remembered for `once`, and messages of each that may come out of order. */
const replay = { runs: 4_096, window: 1_024 } as const

const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64')
const bytesOf = (value: unknown): Uint8Array => new Uint8Array(Buffer.from(String(value), 'base64'))

/** Which messages were seen, per run of a writer: the newest `window` exactly, older ones count as seen. */
export const replayGuard = (): { accept(run: string, counter: number): boolean } => {
  const runs = new Map<string, { highest: number; readonly seen: Set<number> }>()
  return {
    accept(run, counter) {
      const known = runs.get(run) ?? { highest: -1, seen: new Set<number>() }
      if (known.seen.has(counter) || counter <= known.highest - replay.window) return false
      known.seen.add(counter)
      known.highest = Math.max(known.highest, counter)
      if (known.seen.size > 2 * replay.window) for (const old of known.seen) if (old <= known.highest - replay.window) known.seen.delete(old)
      // The writer heard last stands last: the one that was silent for longest is forgotten first.
      runs.delete(run)
      runs.set(run, known)
      const [oldest] = runs.keys()
      if (runs.size > replay.runs && oldest !== undefined) runs.delete(oldest)
      return true
    },
  }
}

interface Link {
  readonly socket: Socket
  readonly waiting: Map<number, (answer: Answer) => void>
}

/** A client of the agent behind this socket. Connects when it is first needed, and again after the agent was away. */
export const connectAgent = (path: string): AgentClient => {
  const consumers = new Map<string, { readonly name: string; readonly take: (epoch: number) => Promise<void> | void }>()
  const guard = replayGuard()
  let link: Promise<Link> | undefined
  let closed = false
  let next = 0
  let pause: number = reconnect.first
  let timer: NodeJS.Timeout | undefined

  const away = (why: string): Problem => new Problem('unavailable', `the agent at ${path}: ${why}`, { reason: 'agent.away' })

  const open = async (): Promise<Link> => {
    const socket = connect(path)
    const waiting = new Map<number, (answer: Answer) => void>()
    const opened: Link = { socket, waiting }
    const { promise, resolve, reject } = Promise.withResolvers<Link>()
    socket.once('connect', () => resolve(opened))
    socket.on('error', (error) => reject(away(error.message)))
    socket.once('close', () => {
      link = undefined
      for (const settle of waiting.values()) settle({ error: { code: 'unavailable', detail: 'the agent went away' } })
      waiting.clear()
      comeBack()
    })
    const lines = createInterface({ input: socket })
    // The socket's own errors, which are dealt with above.
    lines.on('error', () => undefined)
    lines.on('line', (line) => {
      const message = JSON.parse(line) as Answer
      if (message['event'] === 'epoch') return void handOver(opened, String(message['key']), Number(message['epoch']))
      const settle = waiting.get(Number(message['id']))
      waiting.delete(Number(message['id']))
      settle?.(message)
    })
    return await promise
  }

  /** Consumers are there again as soon as the agent is. */
  const comeBack = (): void => {
    if (closed || consumers.size === 0 || timer !== undefined) return
    timer = setTimeout(
      () => {
        timer = undefined
        pause = Math.min(pause * 2, reconnect.most)
        linked().catch(comeBack)
      },
      pause * (0.5 + Math.random() / 2),
    )
  }

  const linked = async (): Promise<Link> => {
    if (closed) throw away('this client is closed')
    if (link === undefined) {
      link = open()
      link.then(
        async (opened) => {
          pause = reconnect.first
          for (const [key, { name }] of consumers) await register(opened, key, name).catch(() => undefined)
        },
        () => (link = undefined),
      )
    }
    return await link
  }

  const askOn = async ({ socket, waiting }: Link, request: Answer): Promise<Answer> => {
    const id = ++next
    const { promise, resolve } = Promise.withResolvers<Answer>()
    waiting.set(id, resolve)
    const late = setTimeout(() => resolve({ error: { code: 'unavailable', detail: `no answer within ${patience / 1000} s` } }), patience)
    socket.write(`${JSON.stringify({ id, ...request })}\n`)
    const answer = await promise
    clearTimeout(late)
    waiting.delete(id)
    const failed = answer['error'] as { code: ProblemCode; detail: string } | undefined
    if (failed !== undefined) throw new Problem(failed.code, failed.detail)
    return answer
  }
  const ask = async (request: Answer): Promise<Answer> => await askOn(await linked(), request)

  const handOver = async (on: Link, key: string, epoch: number): Promise<void> => {
    const ready = await Promise.resolve(consumers.get(key)?.take(epoch)).then(
      () => true,
      () => false,
    )
    await askOn(on, { op: 'ready', key, epoch, ready }).catch(() => undefined)
  }
  const register = async (on: Link, key: string, name: string): Promise<void> => {
    const { epoch } = await askOn(on, { op: 'consume', key, name })
    if (typeof epoch === 'number') await handOver(on, key, epoch)
  }

  return {
    list: async () => (await ask({ op: 'list' }))['keys'] as Awaited<ReturnType<AgentClient['list']>>,
    async get(key, epoch) {
      const got = await ask({ op: 'get', key, ...(epoch === undefined ? {} : { epoch }) })
      return { epoch: Number(got['epoch']), material: bytesOf(got['material']) }
    },
    used: async (key, epoch, messages) => void (await ask({ op: 'used', key, epoch, messages })),
    async encrypt(key, plaintext, aad) {
      return bytesOf((await ask({ op: 'encrypt', key, plaintext: base64(plaintext), ...(aad === undefined ? {} : { aad: base64(aad) }) }))['ciphertext'])
    },
    async decrypt(key, ciphertext, { aad, once = false } = {}) {
      const opened = await ask({ op: 'decrypt', key, ciphertext: base64(ciphertext), ...(aad === undefined ? {} : { aad: base64(aad) }) })
      if (once && !guard.accept(`${key}/${Number(opened['epoch'])}/${String(opened['run'])}`, Number(opened['counter'])))
        throw new Problem('conflict', 'this message was opened before', { reason: 'ciphertext.replayed' })
      return { epoch: Number(opened['epoch']), plaintext: bytesOf(opened['plaintext']) }
    },
    async mac(key, data) {
      const made = await ask({ op: 'mac', key, data: base64(data) })
      return { epoch: Number(made['epoch']), mac: bytesOf(made['mac']) }
    },
    verify: async ({ key, epoch, data, mac }) => (await ask({ op: 'verify', key, epoch, data: base64(data), mac: base64(mac) }))['valid'] === true,
    async consume(key, name, take) {
      if (consumers.has(key)) throw new Problem('conflict', `${key} is consumed already`)
      const on = await linked()
      consumers.set(key, { name, take })
      await register(on, key, name)
    },
    close() {
      closed = true
      clearTimeout(timer)
      void link?.then(
        ({ socket }) => socket.destroy(),
        () => undefined,
      )
    },
  }
}
