import { execFile } from 'node:child_process'
import { dirname } from 'node:path'
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
  /** Program and arguments, run without a shell; null: nothing to run. */
  readonly hook: readonly string[] | null
}

/** A key as its consumers are to see it. `secret` null: it never leaves the TPM. */
export interface OutputKey {
  readonly key: string
  readonly algorithm: KeyAlgorithm
  readonly current: number
  readonly epochs: readonly { readonly epoch: number; readonly secret: Secret | null }[]
}

export interface Outputs {
  /** Writes every file of the key and runs its hooks. Rejects with Problem('unavailable'), reason `hook.failed` or `output.format`, when a consumer did not take it. */
  give(key: OutputKey, abort: AbortSignal): Promise<void>
  /** Removes the files of a key that was withdrawn and runs the hooks. */
  remove(key: string, abort: AbortSignal): Promise<void>
}

const hookDeadline = 30_000

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

const runHook = async (hook: readonly string[], env: Readonly<Record<string, string>>, abort: AbortSignal): Promise<void> => {
  const [program = '', ...args] = hook
  await new Promise<void>((resolve, reject) => {
    const options = { timeout: hookDeadline, signal: abort, maxBuffer: 64 << 10, env: { PATH: process.env['PATH'] ?? '/usr/bin:/bin', ...env } }
    execFile(program, args, options, (error, _stdout, stderr) => {
      if (error === null) return resolve()
      const why =
        error.killed === true ? `took longer than ${hookDeadline / 1000} s` : `${error.message.split('\n')[0] ?? ''} ${stderr.slice(0, 200).trim()}`.trim()
      reject(new Problem('unavailable', `hook ${program}: ${why}`, { reason: 'hook.failed', cause: error }))
    })
  })
}

/** Keeps the configured files in step with the keys. */
export const openOutputs = (of: { readonly outputs: readonly Output[]; readonly files: FileSystem; readonly step: (name: string) => void }): Outputs => {
  const { files, step } = of
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
        await files.write(`${output.path}.new`, content, output.owner)
        content.fill(0)
        await files.rename(`${output.path}.new`, output.path)
        await files.syncFolder(dirname(output.path))
        // A crash here: the file is new, the hook did not run; the next start writes it again and runs it.
        step('output.written')
        if (output.hook !== null) await runHook(output.hook, environment(output, 'changed', String(key.current)), abort)
      })
    },
    async remove(key, abort) {
      await each(key, async (output) => {
        await files.remove(output.path)
        // Written and not renamed before a crash.
        await files.remove(`${output.path}.new`)
        await files.syncFolder(dirname(output.path))
        step('output.removed')
        if (output.hook !== null) await runHook(output.hook, environment(output, 'withdrawn', ''), abort)
      })
    },
  }
}
