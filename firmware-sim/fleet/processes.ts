import { spawn, type ChildProcess } from 'node:child_process'
import { closeSync, openSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { Counts, sumOf } from './counts.ts'
import type { Order } from './control.ts'

/** Boards that one process of a fleet runs: with more its single thread is what everything waits for. */
export const boardsPerProcess = 2_500

/** Many boards do much at once that is forgotten soon: with room for it, less of it is taken for long-lived, which is dear to collect (MiB). */
const youngGeneration = 64

export interface FleetProcessesOptions {
  /** A factory's folder, the server's bundle as JSON text, and where devices and logs are kept. */
  readonly factory: string
  readonly bundle: string
  readonly data: string
  readonly serials: readonly string[]
  readonly processes: number
  /** Further words for each process, such as its mix. */
  readonly words?: readonly string[]
}

/** A fleet in several processes. An order goes to all of them; it is done when each of them has done its part. */
export interface FleetProcesses {
  readonly pids: readonly number[]
  on(serials?: readonly string[]): Promise<void>
  off(serials?: readonly string[]): Promise<void>
  unplug(serials?: readonly string[]): Promise<void>
  /** Switches all on and lets them live by their habits. */
  live(): Promise<void>
  counts(): Promise<Counts>
  stop(): Promise<void>
}

type WithoutId<O> = O extends unknown ? Omit<O, 'id'> : never

/** One process that takes orders. Rejects, and every order with it, when the process ends by itself. */
const openProcess = (child: ChildProcess) => {
  const { stdin, stdout } = child
  if (stdin === null || stdout === null || child.pid === undefined) throw new Error('a process of the fleet did not start')
  const waiting = new Map<number, { resolve(value: object): void; reject(why: Error): void }>()
  let next = 0
  let ended: Error | undefined
  const ready = Promise.withResolvers<void>()
  ready.promise.catch(() => undefined)
  createInterface({ input: stdout }).on('line', (line) => {
    const said = JSON.parse(line) as { event?: string; reply?: number; error?: { message: string } }
    if (said.event === 'ready') return ready.resolve()
    const order = waiting.get(said.reply ?? -1)
    if (order === undefined) return
    waiting.delete(said.reply ?? -1)
    if (said.error === undefined) order.resolve(said)
    else order.reject(new Error(said.error.message))
  })
  stdin.on('error', () => undefined)
  const gone = new Promise<void>((resolve) => {
    child.once('exit', (code, signal) => {
      ended = new Error(`a process of the fleet ended (${code ?? signal})`)
      ready.reject(ended)
      for (const { reject } of waiting.values()) reject(ended)
      resolve()
    })
  })
  return {
    pid: child.pid,
    ready: ready.promise,
    order: async (order: WithoutId<Order>): Promise<object> =>
      await new Promise((resolve, reject) => {
        if (ended !== undefined) return reject(ended)
        const id = next++
        waiting.set(id, { resolve, reject })
        stdin.write(`${JSON.stringify({ id, ...order })}\n`)
      }),
    async stop(): Promise<void> {
      stdin.end()
      await gone
    },
  }
}

/** Starts the processes; resolves when all of them take orders. What their agents log goes to `DATA/process-N.log`. */
export const startFleetProcesses = async (options: FleetProcessesOptions): Promise<FleetProcesses> => {
  const program = fileURLToPath(new URL('../main.ts', import.meta.url))
  const bundle = join(options.data, 'bundle.json')
  writeFileSync(bundle, options.bundle, { mode: 0o600 })
  const parts = Array.from({ length: Math.min(options.processes, options.serials.length) }, (_, part) => {
    const log = openSync(join(options.data, `process-${part + 1}.log`), 'a', 0o600)
    try {
      const words = ['--factory', options.factory, '--bundle', bundle, '--data', join(options.data, 'boards'), '--control', '--quiet', ...(options.words ?? [])]
      const child = spawn(process.execPath, [`--max-semi-space-size=${youngGeneration}`, program, 'run', ...words], { stdio: ['pipe', 'pipe', log] })
      return { ...openProcess(child), serials: options.serials.filter((_serial, at) => at % options.processes === part) }
    } finally {
      closeSync(log)
    }
  })
  const each = async (what: 'on' | 'off' | 'unplug' | 'live', of: readonly string[] = options.serials): Promise<void> => {
    const wanted = new Set(of)
    await Promise.all(parts.map(async ({ serials, order }) => await order({ do: what, serials: serials.filter((serial) => wanted.has(serial)) })))
  }
  const stop = async (): Promise<void> => {
    await Promise.all(parts.map(async (part) => await part.stop()))
  }
  try {
    await Promise.all(parts.map(async ({ ready }) => await ready))
  } catch (error) {
    await stop()
    throw error
  }
  return {
    pids: parts.map(({ pid }) => pid),
    on: async (serials) => await each('on', serials),
    off: async (serials) => await each('off', serials),
    unplug: async (serials) => await each('unplug', serials),
    live: async () => await each('live'),
    counts: async () =>
      sumOf(
        await Promise.all(
          parts.map(async ({ order }) => {
            const said = await order({ do: 'counts' })
            return Counts.parse((said as { counts?: unknown }).counts)
          }),
        ),
      ),
    stop,
  }
}
