import { spawn, type ChildProcess } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { chmodSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Readable, Writable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { FrameReader, frame } from '@fleetkey/protocol/frames.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import type { Kms, Seal } from '../flows/context.ts'
import { kmsClient, sealClient } from './client.ts'
import { Lost, openConnection, type Connection, type ConnectionEvents } from './connection.ts'
import type { Backend, Orders } from './orders.ts'
import { limits, readProblem, readSeal } from './wire.ts'

export interface KmsOptions {
  /** Folder of the keys. */
  readonly folder: string
  /** A file with a secret that it names is read by the KMS process, never here. Default: a key file in the folder. */
  readonly backend?: Backend
  readonly log: (line: string) => void
  /** Called at every durable step inside the KMS process, which waits meanwhile. For fault runs: each costs a round trip. */
  readonly step?: ((name: string) => void) | undefined
  /** Milliseconds that a caller waits for a process that is being started again. Default: 10 s. */
  readonly patience?: number
  /** Told the id of each KMS process that is started. */
  readonly started?: ((pid: number) => void) | undefined
}

export interface SupervisedKms extends Kms {
  readonly health: () => { readonly open: boolean; readonly sealed: boolean; readonly reason: string | null }
  readonly seal: Seal
  /** Resolves once the keys are open; `signal` ends the waiting with its reason. */
  readonly opened: (signal?: AbortSignal) => Promise<void>
}

/** Pauses before a restart, in milliseconds: from the first to the last, doubled in between, from the first again after a minute without one. */
const pauses = { first: 50, last: 5_000, calm: 60_000 } as const
const defaultPatience = 10_000
/** A request that was under way at so many deaths may be their cause: it is not tried again. */
const maxDeaths = 3
const maxWaiting = 4096
const closing = 5_000

const away = (why: string): Problem => new Problem('unavailable', `the KMS process is away: ${why}`, { reason: 'kms.away', retryAfterSeconds: 5 })

/** A folder of this start's own for the socket: short (a path has 107 bytes), 0700 by the way it is made. */
const runtimeFolder = (): string => {
  const base = process.env['RUNTIME_DIRECTORY'] ?? process.env['XDG_RUNTIME_DIR']
  for (const place of [base?.split(':')[0], tmpdir()]) {
    if (place === undefined || place.length > 60) continue
    try {
      return mkdtempSync(join(place, 'fleetkey-'))
    } catch {
      // Not ours to write: the next.
    }
  }
  throw new Problem('unavailable', 'no folder for the socket of the KMS: set RUNTIME_DIRECTORY to a short path', { reason: 'kms.runtime' })
}

interface Running {
  readonly child: ChildProcess
  readonly connection: Connection
  /** What keeps the keys sealed; undefined once they are open. */
  sealed: string | undefined
}

/** What the process says first: nothing when it is ready. Throws its Problem, or that it ended without a word. */
const firstWord = async (child: ChildProcess): Promise<void> => {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const reader = new FrameReader(limits.strangerFrame)
  child.stdout?.on('data', (chunk: Buffer) => {
    try {
      for (const value of reader.push(chunk)) {
        const [ready, problem] = value as readonly [unknown, unknown]
        if (ready === true) resolve()
        else reject(readProblem(problem))
      }
    } catch (thrown) {
      reject(toProblem(thrown))
    }
  })
  child.once('error', (error) => reject(away(error.message)))
  child.once('exit', (code, signal) => reject(away(`it ended with ${signal ?? code} before it was ready`)))
  await promise
}

const start = async (orders: Orders, options: KmsOptions, { onClose, onOpen, onNotice }: ConnectionEvents): Promise<Running> => {
  const { NODE_COMPILE_CACHE: cache } = process.env
  const child = spawn(process.execPath, ['--disable-sigusr1', fileURLToPath(new URL('./process.ts', import.meta.url))], {
    stdio: ['pipe', 'pipe', 'inherit', ...(orders.steps ? (['pipe'] as const) : [])],
    cwd: '/',
    env: cache === undefined ? {} : { NODE_COMPILE_CACHE: cache },
  })
  if (child.pid !== undefined) options.started?.(child.pid)
  for (const stream of [child.stdin, child.stdout]) stream?.on('error', () => undefined)
  const ready = firstWord(child)
  const steps = child.stdio[3] as (Readable & Writable) | undefined
  steps?.on('error', () => undefined)
  steps?.on('data', (chunk: Buffer) => {
    // It waits after each: there is never more than one.
    options.step?.(chunk.toString().trim())
    steps.write('.')
  })
  child.stdin?.write(frame({ ...orders }))
  try {
    await ready
    let ended = false
    const end = (): void => {
      if (ended) return
      ended = true
      // A process that lives and does not answer the socket any more is of no use.
      child.kill('SIGKILL')
      onClose()
    }
    let running: Running | undefined
    let told = false
    const connection = await openConnection(orders.socket, orders.secret, {
      onClose: end,
      onNotice,
      onOpen() {
        told = true
        if (running === undefined) return
        running.sealed = undefined
        onOpen()
      },
    })
    child.once('exit', end)
    const { sealed, reason } = readSeal(connection.state)
    running = { child, connection, sealed: sealed && !told ? (reason ?? 'nothing opens the keys') : undefined }
    return running
  } catch (thrown) {
    child.kill('SIGKILL')
    throw thrown instanceof Lost ? away(thrown.message) : thrown
  }
}

/**
 * Starts the KMS process and keeps it running: when it dies it is started again, and what was asked of it meanwhile is asked again. Whoever cannot be
 * served in time gets Problem('unavailable'): `kms.away`, `kms.slow`, `kms.busy`, `kms.sealed`. Throws the Problem that keeps it from starting the first
 * time; sealed it has started.
 */
export const startKms = async (options: KmsOptions): Promise<SupervisedKms> => {
  mkdirSync(options.folder, { recursive: true, mode: 0o700 })
  chmodSync(options.folder, 0o700)
  const runtime = runtimeFolder()
  const orders = (): Orders => ({
    folder: options.folder,
    backend: options.backend ?? { kind: 'file', passphraseFile: null, keyFile: null },
    socket: join(runtime, 'kms.sock'),
    secret: new Uint8Array(randomBytes(32)),
    steps: options.step !== undefined,
  })
  let running: Running | undefined
  let closed = false
  let reason = 'starting'
  let hindrance: Problem | null = null
  let pause: number = pauses.first
  let startedAt = 0
  let waiting = 0
  let timer: NodeJS.Timeout | undefined
  const woken = new Set<() => void>()
  const wake = (): void => {
    for (const one of woken) one()
    woken.clear()
  }

  const begin = async (): Promise<void> => {
    running = await start(orders(), options, {
      onClose: died,
      onNotice: hindered,
      onOpen() {
        options.log('the keys are open')
        wake()
      },
    })
    hindrance = null
    startedAt = performance.now()
    if (running.sealed !== undefined) options.log(`SEALED: ${running.sealed.slice(0, 500)} (fleetkey seal status)`)
    wake()
  }
  const again = (): void => {
    if (closed) return
    if (performance.now() - startedAt > pauses.calm) pause = pauses.first
    timer = setTimeout(() => {
      begin().then(
        () => options.log(running?.sealed === undefined ? 'the KMS process runs again' : 'ALARM: the KMS process runs again and is sealed'),
        (thrown: unknown) => {
          reason = toProblem(thrown).message
          options.log(`ALARM: the KMS process does not start: ${reason.slice(0, 500)}`)
          again()
        },
      )
    }, pause)
    pause = Math.min(pause * 2, pauses.last)
  }
  const hindered = (problem: Problem | null): void => {
    // It is tried again every second; what stays as it was is said once.
    const isNews = problem?.message !== hindrance?.message
    hindrance = problem
    if (isNews) options.log(problem === null ? 'the KMS has its keys again' : `ALARM: KMS: ${problem.message.slice(0, 500)}`)
  }
  const died = (): void => {
    running = undefined
    if (closed) return
    reason = 'it has ended'
    options.log('ALARM: the KMS process has ended; it is started again')
    again()
  }

  const connected = async (until: number): Promise<Connection> => {
    while (running === undefined) {
      const left = until - performance.now()
      if (closed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
      if (left <= 0) throw away(reason)
      await new Promise<void>((resolve) => {
        const late = setTimeout(resolve, left)
        woken.add(() => {
          clearTimeout(late)
          resolve()
        })
      })
    }
    return running.connection
  }

  const ask = async (op: string, argument: unknown): Promise<unknown> => {
    if (closed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
    if (waiting >= maxWaiting) throw new Problem('unavailable', `${waiting} requests wait for the KMS`, { reason: 'kms.busy', retryAfterSeconds: 1 })
    waiting++
    try {
      const until = performance.now() + (options.patience ?? defaultPatience)
      for (let deaths = 0; ;) {
        try {
          return await (await connected(until)).ask(op, argument)
        } catch (thrown) {
          // Asked a second time, a destruction finds nothing where it was carried out before its answer was lost.
          if (op === 'destroy' && deaths > 0 && toProblem(thrown).reason === 'kms.no-key') return null
          if (!(thrown instanceof Lost)) throw thrown
          if (++deaths >= maxDeaths) throw away(`it ended ${deaths} times under this request`)
          // `onClose` comes in the same turn as the loss; the next look finds no connection and waits for the new one.
        }
      }
    } finally {
      waiting--
    }
  }

  for (let deaths = 0; running === undefined;) {
    try {
      await begin()
    } catch (thrown) {
      if (toProblem(thrown).reason === 'kms.away' && ++deaths < maxDeaths) continue
      rmSync(runtime, { recursive: true, force: true })
      throw thrown
    }
  }
  return {
    ...kmsClient(ask),
    seal: sealClient(ask),
    health() {
      if (running === undefined) return { open: false, sealed: false, reason: `KMS: ${reason}` }
      if (running.sealed !== undefined) return { open: false, sealed: true, reason: `sealed: ${running.sealed}` }
      return hindrance === null ? { open: true, sealed: false, reason: null } : { open: false, sealed: false, reason: `KMS: ${hindrance.message}` }
    },
    async opened(signal) {
      while (running === undefined || running.sealed !== undefined) {
        if (closed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
        signal?.throwIfAborted()
        await new Promise<void>((resolve) => {
          woken.add(resolve)
          signal?.addEventListener('abort', () => resolve(), { once: true })
        })
      }
    },
    async close() {
      if (closed) return
      const last = running
      closed = true
      clearTimeout(timer)
      wake()
      if (last !== undefined) {
        const ended = new Promise<void>((resolve) => void last.child.once('exit', () => resolve()))
        const late = setTimeout(() => last.child.kill('SIGKILL'), closing)
        // Its counts are exact then; without an answer they are bounds.
        await last.connection.ask('close', null).catch(() => undefined)
        last.child.stdin?.end()
        await ended
        clearTimeout(late)
        last.connection.close()
      }
      rmSync(runtime, { recursive: true, force: true })
    },
  }
}
