import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { createClient, type Client } from '@fleetkey/cli/client.ts'
import { serverProcess } from '@fleetkey/cli/commands/server.ts'
import { memoryOf } from './cpu.ts'

/** The real server as a process. */
export interface ServerProcess {
  readonly pid: number
  readonly client: Client
  /** Its memory when it was ready. */
  readonly idle: number
  /** Milliseconds from its start until it was ready. */
  readonly startedIn: number
  stop(): Promise<void>
}

/** `flags`: of node, such as `--cpu-prof`. `port`: for devices, any free one unless told. */
export const startServer = async (
  data: string,
  { flags = [], port = 0 }: { readonly flags?: readonly string[]; readonly port?: number } = {},
): Promise<ServerProcess> => {
  const script = fileURLToPath(import.meta.resolve('@fleetkey/server/main.ts'))
  const started = performance.now()
  const words = [...serverProcess.flags, ...flags, script, '--data', data, '--mqtt-port', String(port), '--https-port', '0', '--attached', '--json']
  const child = spawn(process.execPath, words, { stdio: ['pipe', 'pipe', 'ignore'], env: { ...serverProcess.environment, ...process.env } })
  const { pid, stdout } = child
  if (pid === undefined || stdout === null) throw new Error('the server did not start')
  await new Promise<void>((resolve, reject) => {
    createInterface({ input: stdout }).once('line', () => resolve())
    child.once('exit', (code) => reject(new Error(`the server ended with ${code}`)))
  })
  const startedIn = performance.now() - started
  const client = createClient(JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { server: string; token: string; ca: string })
  return {
    pid,
    client,
    idle: memoryOf(pid),
    startedIn,
    async stop() {
      client.close()
      const gone = new Promise((resolve) => child.once('exit', resolve))
      child.kill('SIGTERM')
      await gone
    },
  }
}

/** Waits for a condition; throws when it does not come true in time. */
export const until = async (holds: () => boolean | Promise<boolean>, seconds = 300): Promise<void> => {
  for (const end = performance.now() + seconds * 1_000; !(await holds());) {
    if (performance.now() > end) throw new Error(`it did not come to an end within ${seconds} s`)
    await new Promise((resolve) => void setTimeout(resolve, 10))
  }
}
