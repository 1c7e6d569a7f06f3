import { spawn, type ChildProcess } from 'node:child_process'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

/** A process that is started again when it was killed; any other end is an error. */
export interface Supervised {
  /** How often it was killed. */
  readonly kills: number
  /** When it was last ready again, milliseconds since 1970. */
  readonly restartedAt: number
  readonly errors: string
  readonly pid: number
  /** Of the last start; null while it runs, or when a signal ended it. */
  readonly exitCode: number | null
  write(line: string): void
  stop(): Promise<void>
}

/** Starts `script` (in this folder) with the fault in its environment; after the kill without. `ready` is called at each start. */
export const supervise = async (of: {
  readonly script: string
  readonly args: readonly string[]
  readonly fault: NodeJS.ProcessEnv
  /** At every start. */
  readonly env?: NodeJS.ProcessEnv
  readonly onLine: (line: string) => void
  /** What it says on standard error, as it comes. */
  readonly onError?: (text: string) => void
  readonly isReady: (line: string) => boolean
  readonly onReady?: () => void
}): Promise<Supervised> => {
  let child: ChildProcess
  let [kills, restartedAt, errors, stopping] = [0, 0, '', false]
  const first = Promise.withResolvers<void>()
  const start = (env: NodeJS.ProcessEnv): void => {
    child = spawn(process.execPath, [fileURLToPath(new URL(of.script, import.meta.url)), ...of.args], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...of.env, ...env },
    })
    child.stdin?.on('error', () => undefined)
    child.stderr?.on('data', (chunk: Buffer) => {
      errors = (errors + chunk.toString()).slice(-20_000)
      of.onError?.(chunk.toString())
    })
    if (child.stdout !== null)
      createInterface({ input: child.stdout }).on('line', (line) => {
        if (of.isReady(line)) {
          restartedAt = Date.now()
          first.resolve()
          of.onReady?.()
        }
        of.onLine(line)
      })
    child.once('exit', (code, signal) => {
      if (stopping) return
      if (signal === 'SIGKILL') {
        kills++
        start({})
      } else first.reject(new Error(`${of.script} ended with ${code}: ${errors}`))
    })
  }
  start(of.fault)
  await first.promise
  return {
    get kills() {
      return kills
    },
    get restartedAt() {
      return restartedAt
    },
    get errors() {
      return errors
    },
    get pid() {
      return child.pid ?? 0
    },
    get exitCode() {
      return child.exitCode
    },
    write: (line) => void child.stdin?.write(`${line}\n`),
    async stop() {
      stopping = true
      if (child.exitCode !== null || child.signalCode !== null) return
      const gone = new Promise((resolve) => child.once('exit', resolve))
      child.kill('SIGTERM')
      await gone
    },
  }
}
