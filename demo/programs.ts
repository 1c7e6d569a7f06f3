// The demo drives the same commands that a person would type, as processes of their own.
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { createWriteStream } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

const entry = {
  fleetkey: fileURLToPath(new URL('../cli/main.ts', import.meta.url)),
  'fleetkey-sim': fileURLToPath(new URL('../firmware-sim/main.ts', import.meta.url)),
} as const
export type Program = keyof typeof entry

const children = new Set<ChildProcess>()

const start = (program: Program, args: readonly string[], stdin: 'ignore' | 'pipe'): ChildProcess => {
  const child = spawn(process.execPath, [entry[program], ...args], { stdio: [stdin, 'pipe', 'pipe'] })
  children.add(child)
  child.once('exit', () => children.delete(child))
  return child
}

/** Ends every process that still runs, in order; resolves when all have ended. */
export const stopAll = async (): Promise<void> => {
  await Promise.all(
    [...children].map(async (child) => {
      const gone = once(child, 'exit')
      child.kill('SIGTERM')
      await gone
    }),
  )
}

const ended = async (child: ChildProcess): Promise<number> =>
  await new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code) => resolve(code ?? 128))
  })

export interface Outcome {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

/** Runs one command to its end. `onLine` hears each line of standard output as it comes. */
export const run = async (program: Program, args: readonly string[], onLine?: (line: string) => void): Promise<Outcome> => {
  const child = start(program, args, 'ignore')
  let [stdout, stderr] = ['', '']
  child.stderr?.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  if (child.stdout !== null)
    createInterface({ input: child.stdout }).on('line', (line) => {
      stdout += `${line}\n`
      onLine?.(line)
    })
  return { code: await ended(child), stdout, stderr: stderr.trim() }
}

/** A process that stays: lines come to `onLine`, its standard error goes to the log file. */
export interface Service {
  write(line: string): void
  /** Asks it to end; its exit code. */
  stop(): Promise<number>
}

export const service = (of: {
  readonly program: Program
  readonly args: readonly string[]
  readonly log: string
  readonly onLine: (line: string) => void
  readonly onEnd: (code: number) => void
}): Service => {
  const child = start(of.program, of.args, 'pipe')
  const log = createWriteStream(of.log, { flags: 'a' })
  child.stderr?.pipe(log)
  if (child.stdout !== null) createInterface({ input: child.stdout }).on('line', of.onLine)
  const over = ended(child)
  void over.then(of.onEnd)
  // It may be gone before a last line reaches it.
  child.stdin?.on('error', () => undefined)
  return {
    write: (line) => void child.stdin?.write(`${line}\n`),
    async stop() {
      child.kill('SIGTERM')
      return await over
    },
  }
}
