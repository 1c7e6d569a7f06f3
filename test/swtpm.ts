import { spawn, type ChildProcess } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync, existsSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export interface RunningSwtpm {
  /** For `openTransport`: `unix:PATH`. */
  readonly spec: string
  /** For the tools' `-T`: `swtpm:path=PATH`. Only one client at a time. */
  readonly tcti: string
  /** Power cycle: the process ends and starts again on the same state. */
  restart(): Promise<void>
  stop(): Promise<void>
}

const until = async (ready: () => boolean | Promise<boolean>, what: string): Promise<void> => {
  for (let waited = 0; !(await ready()); waited += 10) {
    if (waited > 10_000) throw new Error(`${what} within 10 s`)
    await new Promise((resolve) => void setTimeout(resolve, 10))
  }
}

/** Debian's swtpm on UNIX sockets in a folder of its own. */
export const startSwtpm = async (): Promise<RunningSwtpm> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-swtpm-'))
  const [path, control, state] = [join(folder, 's'), join(folder, 's.ctrl'), join(folder, 'state')]
  mkdirSync(state)
  let child: ChildProcess | undefined
  const start = async (): Promise<void> => {
    rmSync(path, { force: true })
    rmSync(control, { force: true })
    child = spawn(
      'swtpm',
      [
        'socket',
        '--tpm2',
        '--tpmstate',
        `dir=${state}`,
        '--server',
        `type=unixio,path=${path}`,
        '--ctrl',
        `type=unixio,path=${control}`,
        '--flags',
        'not-need-init,startup-clear',
      ],
      { stdio: 'ignore' },
    )
    await until(() => existsSync(path) && existsSync(control), 'swtpm did not listen')
  }
  const end = async (): Promise<void> => {
    const running = child
    child = undefined
    if (running === undefined || running.exitCode !== null) return
    const gone = new Promise((resolve) => running.once('exit', resolve))
    running.kill('SIGTERM')
    await gone
  }
  await start()
  return {
    spec: `unix:${path}`,
    tcti: `swtpm:path=${path}`,
    async restart() {
      await end()
      await start()
    },
    async stop() {
      await end()
      rmSync(folder, { recursive: true, force: true })
    },
  }
}

/** swtpm without its own `--terminate` serves one client after the other: whoever comes next waits until the last has gone. */
export const socketFree = async (path: string): Promise<void> =>
  await until(
    async () =>
      await new Promise<boolean>((resolve) => {
        const socket = connect(path, () => {
          socket.destroy()
          resolve(true)
        })
        socket.on('error', () => resolve(false))
      }),
    'the TPM socket was not free',
  )
