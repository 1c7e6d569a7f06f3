import { closeSync, openSync, writeSync } from 'node:fs'
import { once } from 'node:events'
import { createPublicKey } from 'node:crypto'
import { exit, number, readInput, text, UsageError, type Command, type Invocation } from '../command.ts'
import { verifyExport, type LogVerdict } from '../offline/audit.ts'
import { table, when } from '../output.ts'

/** The key that checkpoints must be signed with: a PEM file, else asked of the server. */
const checkpointKey = async (call: Invocation): Promise<Uint8Array> => {
  const path = text(call, 'key')
  if (path === undefined)
    try {
      return Buffer.from((await call.client().call('audit.key')).spki, 'base64')
    } catch (error) {
      // Whoever has the log and no server means to have the key as well.
      if (error instanceof UsageError && call.args.length > 0)
        throw new UsageError(`--key PUBLIC-KEY.pem is missing, and nobody can be asked for it: ${error.message}`)
      throw error
    }
  try {
    return createPublicKey(readInput(path)).export({ type: 'spki', format: 'der' })
  } catch (error) {
    throw new UsageError(`--key ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

/** A file for the export: it may name devices and people. */
const opened = (path: string): number => {
  try {
    return openSync(path, 'w', 0o600)
  } catch (error) {
    throw new UsageError(`--out ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

const say = (verdict: LogVerdict): string =>
  verdict.ok
    ? `${verdict.entries} entries: chain, tree and checkpoint agree`
    : `NOT AUTHENTIC${verdict.sequence === null ? '' : ` at entry ${verdict.sequence}`}: ${verdict.what}`

export const auditCommands: readonly Command[] = [
  {
    name: 'audit list',
    usage: '[--after SEQUENCE] [--limit N] [--subject DEVICE]',
    summary: 'who did what, on whom, why, with what result',
    args: [0, 0],
    options: { after: { type: 'string' }, limit: { type: 'string' }, subject: { type: 'string' } },
    async run(call) {
      const query = {
        after: number(call, 'after', 0, Number.MAX_SAFE_INTEGER) ?? 0,
        limit: number(call, 'limit', 1, 1000) ?? 100,
        device: text(call, 'subject'),
      }
      const { items } = await call.client().call('audit.list', { query })
      call.out.result(items, () =>
        table([
          ['#', 'WHEN', 'WHO', 'ACTION', 'ON', 'RESULT', 'DETAIL'],
          ...items.map((row) => [
            String(row.sequence),
            when(row.at),
            row.caller,
            row.action,
            row.subject,
            row.outcome === 'done' ? 'done' : `refused (${row.code})`,
            row.detail,
          ]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'audit export',
    usage: '[--out FILE]',
    summary: 'the whole log as JSON lines with its newest signed checkpoint',
    args: [0, 0],
    options: { out: { type: 'string' } },
    async run(call) {
      const path = text(call, 'out')
      if (path === undefined) {
        await call.client().stream('/api/1/audit/export', async (chunk) => {
          if (!process.stdout.write(chunk)) await once(process.stdout, 'drain')
        })
        return exit.ok
      }
      const file = opened(path)
      try {
        await call.client().stream('/api/1/audit/export', (chunk) => void writeSync(file, chunk))
      } finally {
        closeSync(file)
      }
      return exit.ok
    },
  },
  {
    name: 'audit verify',
    usage: '[FILE] [--key PUBLIC-KEY.pem] [--checkpoint FILE]',
    summary: 'derive the log again, offline for a FILE, and find any edit, gap or truncation; exit 3 when there is one',
    args: [0, 1],
    options: { key: { type: 'string' }, checkpoint: { type: 'string' } },
    async run(call) {
      const [path] = call.args
      let content = ''
      if (path === undefined) await call.client().stream('/api/1/audit/export', (chunk) => void (content += chunk))
      else content = readInput(path).toString('utf8')
      const kept = text(call, 'checkpoint')
      const checkpoints = kept === undefined ? [] : [readInput(kept).toString('utf8')]
      const verdict = verifyExport(content, await checkpointKey(call), checkpoints)
      call.out.result(verdict, () => say(verdict))
      return verdict.ok ? exit.ok : exit.refused
    },
  },
]
