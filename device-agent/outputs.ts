import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { constants } from 'node:os'
import { dirname } from 'node:path'
import type { Duplex, Readable } from 'node:stream'
import type { KeyAlgorithm } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import type { FileOwner, FileSystem } from './filesystem.ts'

/** A file that an application reads its key from, and what to run after it changed. */
export interface Output {
  readonly key: string
  readonly path: string
  /** `raw`: the bytes of the epoch in use; `base64`: the same as one line; `json`: all epochs, and for keys inside the TPM their numbers only. */
  readonly format: 'raw' | 'base64' | 'json'
  readonly owner: FileOwner
  /** Program and arguments, which no shell reads; null: nothing to run. */
  readonly hook: readonly string[] | null
  /** Milliseconds that the hook may take; 30 s when left out. */
  readonly hookTimeout?: number
}

/** A key as its consumers are to see it. `secret` null: it never leaves the TPM. */
export interface OutputKey {
  readonly key: string
  readonly algorithm: KeyAlgorithm
  readonly current: number
  readonly epochs: readonly { readonly epoch: number; readonly secret: Secret | null }[]
}

export interface Outputs {
  /** Writes every file of the key and runs its hooks. Rejects with Problem('unavailable'), reason `hook.failed`, `hook.timeout` or `output.format`, when a consumer did not take it. */
  give(key: OutputKey, abort: AbortSignal): Promise<void>
  /** Removes the files of a key that was withdrawn and runs the hooks. */
  remove(key: string, abort: AbortSignal): Promise<void>
}

const defaultHookTimeout = 30_000
/** Of what a hook says about its failure. */
const maxWords = 200
/** Milliseconds that are waited for it. */
const lastWords = 200

const contentOf = (output: Output, key: OutputKey): Buffer => {
  const base64 = (secret: Secret): string => Buffer.from(secret.bytes()).toString('base64')
  if (output.format === 'json') {
    const epochs = key.epochs.map(({ epoch, secret }) => ({ epoch, ...(secret === null ? {} : { material: base64(secret) }) }))
    return Buffer.from(`${JSON.stringify({ key: key.key, algorithm: key.algorithm, epoch: key.current, epochs })}\n`)
  }
  const secret = key.epochs.find(({ epoch }) => epoch === key.current)?.secret ?? null
  if (secret === null)
    throw new Problem('unavailable', `${output.path}: ${key.key} never leaves the TPM, only format json can name it`, { reason: 'output.format' })
  return output.format === 'raw' ? Buffer.from(secret.bytes()) : Buffer.from(`${base64(secret)}\n`)
}

/**
 * Runs the hook that follows, without reading it, and ends the group if the agent ends first, however: its end of descriptor 3 is closed then. `exec` runs
 * programs only, none of the shell's own commands.
 */
const keeper = `exec 4>&2 2>/dev/null
{ read -r _ <&3; kill -s KILL -- "-$$"; } 4>&- &
(exec "$@" 2>&4 3<&- 4>&-)
code=$?
kill "$!"
exit "$code"`

const signalOf = (code: number): string | undefined => Object.entries(constants.signals).find(([, number]) => number === code - 128)?.[0]

/**
 * Runs a hook in a process group of its own. What it starts and leaves behind does not hold the agent up: the hook's own end counts, and at its time-out, or when
 * the agent is killed before that, the whole group is killed.
 */
const runHook = async (
  { hookTimeout = defaultHookTimeout }: Output,
  hook: readonly string[],
  env: Readonly<Record<string, string>>,
  abort: AbortSignal,
): Promise<void> => {
  const [program = '', ...args] = hook
  abort.throwIfAborted()
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const failed = (reason: string, why: string, cause?: unknown): void => reject(new Problem('unavailable', `hook ${program}: ${why}`, { reason, cause }))
  const child = spawn('/bin/sh', ['-c', keeper, 'hook', program, ...args], {
    detached: true,
    stdio: ['ignore', 'ignore', 'pipe', 'pipe'],
    env: { PATH: process.env['PATH'] ?? '/usr/bin:/bin', ...env },
  })
  const [, , stderr, held] = child.stdio as unknown as readonly [null, null, Readable, Duplex]
  held.on('error', () => undefined)
  let words = ''
  stderr.setEncoding('utf8').on('data', (text: string) => (words = (words + text).slice(0, maxWords)))
  const kill = (): void => {
    try {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL')
    } catch {
      // It has ended.
    }
  }
  const timer = setTimeout(() => {
    kill()
    failed('hook.timeout', `took longer than ${hookTimeout / 1000} s`)
  }, hookTimeout)
  const stop = (): void => {
    kill()
    failed('hook.failed', 'the agent stops')
  }
  abort.addEventListener('abort', stop, { once: true })
  child.once('error', (error) => failed('hook.failed', error.message, error))
  child.once('exit', (code, signal) => {
    if (code === 0) return resolve()
    const end = signal ?? signalOf(code ?? 0)
    const told = (): void => failed('hook.failed', `${end === undefined ? `exit code ${code ?? '?'}` : `ended by ${end}`} ${words.trim()}`.trim())
    // What it has written to say why may arrive after its end; what it left behind may hold the pipe for ever.
    stderr.once('close', told)
    setTimeout(told, lastWords).unref()
  })
  try {
    await promise
  } finally {
    clearTimeout(timer)
    abort.removeEventListener('abort', stop)
    stderr.destroy()
    held.destroy()
  }
}

/** Keeps the configured files in step with the keys. */
export const openOutputs = (of: { readonly outputs: readonly Output[]; readonly files: FileSystem; readonly step: (name: string) => void }): Outputs => {
  const { files, step } = of
  /** What each file's consumer has taken in this run, hook included: a digest. */
  const given = new Map<string, string>()
  const ofKey = (key: string): readonly Output[] => of.outputs.filter((output) => output.key === key)
  /** One consumer's trouble does not keep the others from theirs; the first trouble is thrown in the end. */
  const each = async (key: string, run: (output: Output) => Promise<void>): Promise<void> => {
    const failures: unknown[] = []
    for (const output of ofKey(key)) await run(output).catch((thrown: unknown) => failures.push(thrown))
    if (failures.length > 0) throw failures[0]
  }
  const environment = (output: Output, event: string, epoch: string) => ({
    FLEETKEY_EVENT: event,
    FLEETKEY_KEY: output.key,
    FLEETKEY_EPOCH: epoch,
    FLEETKEY_PATH: output.path,
  })
  return {
    async give(key, abort) {
      await each(key.key, async (output) => {
        const content = contentOf(output, key)
        const digest = createHash('sha256').update(`${key.current}:`).update(content).digest('hex')
        // It has taken this already: another consumer's trouble is why it is given again.
        if (given.get(output.path) === digest) return void content.fill(0)
        given.delete(output.path)
        await files.write(`${output.path}.new`, content, output.owner)
        content.fill(0)
        await files.rename(`${output.path}.new`, output.path)
        await files.syncFolder(dirname(output.path))
        // A crash here: the file is new, the hook did not run; the next start writes it again and runs it.
        step('output.written')
        if (output.hook !== null) await runHook(output, output.hook, environment(output, 'changed', String(key.current)), abort)
        given.set(output.path, digest)
      })
    },
    async remove(key, abort) {
      await each(key, async (output) => {
        given.delete(output.path)
        await files.remove(output.path)
        // Written and not renamed before a crash.
        await files.remove(`${output.path}.new`)
        await files.syncFolder(dirname(output.path))
        step('output.removed')
        if (output.hook !== null) await runHook(output, output.hook, environment(output, 'withdrawn', ''), abort)
      })
    },
  }
}
