import { spawn, spawnSync, type ChildProcess } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
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

/** Whether somebody listens there: a socket has its file before that. Asked of the kernel (Linux), for whoever connects takes the place of swtpm's one client. */
const isListening = (path: string): boolean =>
  readFileSync('/proc/net/unix', 'utf8')
    .split('\n')
    .some((line) => line.endsWith(` ${path}`) && line.split(' ')[3] === '00010000')

/** What swtpm_setup is told besides folders: it makes a TPM as a maker would, its EK certificates by a CA of its own in `folder`. */
const setup = (folder: string, state: string, options: readonly string[]): void => {
  const ca = join(folder, 'ca')
  mkdirSync(ca)
  const lines = ['signkey.pem', 'issuercert.pem', 'certserial'].map((file, at) => `${['signingkey', 'issuercert', 'certserial'][at] ?? ''} = ${join(ca, file)}`)
  writeFileSync(join(folder, 'ca.conf'), [`statedir = ${ca}`, ...lines, ''].join('\n'))
  const tool = ['create_certs_tool = /usr/bin/swtpm_localca', `create_certs_tool_config = ${join(folder, 'ca.conf')}`]
  writeFileSync(join(folder, 'setup.conf'), [...tool, 'create_certs_tool_options = /etc/swtpm-localca.options', ''].join('\n'))
  const done = spawnSync('swtpm_setup', ['--tpm2', '--tpmstate', state, '--config', join(folder, 'setup.conf'), ...options], { encoding: 'utf8' })
  if (done.status !== 0) throw new Error(`swtpm_setup: ${done.stdout}${done.stderr}`)
}

/** Debian's swtpm on UNIX sockets in a folder of its own. `setup`: options of swtpm_setup, which makes the TPM's state; without them it starts empty. */
export const startSwtpm = async (of: { readonly setup?: readonly string[] } = {}): Promise<RunningSwtpm> => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-swtpm-'))
  const [path, control, state] = [join(folder, 's'), join(folder, 's.ctrl'), join(folder, 'state')]
  mkdirSync(state)
  if (of.setup !== undefined) setup(folder, state, of.setup)
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
    await until(() => isListening(path) && isListening(control), 'swtpm did not listen')
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
