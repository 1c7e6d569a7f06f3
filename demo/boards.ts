// The boards of the demo, behind `fleetkey-sim run --control`.
import { service, type Service } from './programs.ts'

export interface BoardStatus {
  readonly serial: string
  readonly device: string | null
  readonly state: string
  readonly connected: boolean
  readonly current: Readonly<Record<string, number>>
  readonly lastRefusal: string | null
}

export interface Boards {
  readonly status: ReadonlyMap<string, BoardStatus>
  /** When a board was last seen to lose its connection, milliseconds since 1970. */
  readonly lostAt: ReadonlyMap<string, number>
  ask(order: { readonly do: string; readonly [field: string]: unknown }): Promise<Record<string, unknown>>
  /** Resolves as soon as this holds; throws after `patience` milliseconds, saying `what`. */
  until(what: string, holds: () => boolean, patience: number): Promise<void>
  stop(): Promise<void>
}

interface Reply {
  readonly reply?: number
  readonly event?: string
  readonly error?: { readonly code: string; readonly message: string }
}

/** An order was refused by the board: `code` says why. */
export class BoardRefused extends Error {
  readonly code: string

  constructor(code: string, message: string) {
    super(message)
    this.code = code
  }
}

export const startBoards = async (args: readonly string[], log: string): Promise<Boards> => {
  const status = new Map<string, BoardStatus>()
  const lostAt = new Map<string, number>()
  const replies = new Map<number, { resolve(value: Record<string, unknown>): void; reject(error: Error): void }>()
  const watchers = new Set<() => void>()
  const ready = Promise.withResolvers<void>()
  let last = 0
  const heard = (line: string): void => {
    let message: Reply & BoardStatus
    try {
      message = JSON.parse(line) as Reply & BoardStatus
    } catch {
      // The boards' process ended in the middle of a line; how it ended is told by its exit code.
      return
    }
    if (message.event === 'ready') return ready.resolve()
    if (message.event === 'status') {
      if (status.get(message.serial)?.connected === true && !message.connected) lostAt.set(message.serial, Date.now())
      status.set(message.serial, message)
      for (const look of watchers) look()
      return
    }
    if (message.reply === undefined) return
    const waiting = replies.get(message.reply)
    replies.delete(message.reply)
    if (message.error === undefined) waiting?.resolve({ ...message })
    else waiting?.reject(new BoardRefused(message.error.code, message.error.message))
  }
  const over = (code: number): void => {
    const error = new Error(`the boards' process ended with ${code}; see ${log}`)
    ready.reject(error)
    for (const { reject } of replies.values()) reject(error)
  }
  const process_: Service = service({ program: 'fleetkey-sim', args: ['run', '--control', ...args], log, onLine: heard, onEnd: over })
  await ready.promise
  return {
    status,
    lostAt,
    async ask(order) {
      const id = ++last
      return await new Promise((resolve, reject) => {
        replies.set(id, { resolve, reject })
        process_.write(JSON.stringify({ id, ...order }))
      })
    },
    async until(what, holds, patience) {
      if (holds()) return
      const done = Promise.withResolvers<void>()
      const look = (): void => {
        if (holds()) done.resolve()
      }
      const timer = setTimeout(() => done.reject(new Error(`within ${Math.round(patience / 1000)} s: ${what}`)), patience)
      watchers.add(look)
      await done.promise.finally(() => {
        clearTimeout(timer)
        watchers.delete(look)
      })
    },
    async stop() {
      await process_.stop()
    },
  }
}
