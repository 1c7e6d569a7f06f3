import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { testServer } from './test-server.ts'

const main = fileURLToPath(new URL('main.ts', import.meta.url))
const { source } = testServer()
const pems = (list: readonly Uint8Array[]): readonly string[] => list.map((der) => toPem('CERTIFICATE', der))

let folder: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-main-'))
  const bundle = { server: 'mqtts://127.0.0.1:1', tenant: 'plant', trust: pems(source.trust), chain: pems(source.chain), keys: pems(source.keys) }
  writeFileSync(join(folder, 'bundle.json'), JSON.stringify(bundle))
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))

const configure = (more: object = {}): string => {
  const file = join(folder, 'agent.json')
  writeFileSync(file, JSON.stringify({ bundle: 'bundle.json', data: 'data', tpm: 'unix:none.sock', serial: 'SN-1', socket: 'a.sock', ...more }))
  return file
}
const run = (...args: readonly string[]) => spawnSync(process.execPath, [main, ...args], { encoding: 'utf8', timeout: 20_000 })

describe('the command', () => {
  const cases: readonly (readonly [string, readonly string[], number, RegExp])[] = [
    ['help', ['--help'], 0, /^usage: fleetkey-agent run/],
    ['nothing', [], 1, /a command is missing\nusage:/],
    ['an unknown command', ['start'], 1, /unknown command start\nusage:/],
    ['an unknown option', ['run', '--verbose'], 1, /Unknown option '--verbose'/],
    ['too much', ['status', 'now', 'please'], 1, /unexpected now please/],
    ['doctor of two TPMs', ['doctor', '--config', 'a.json', '--tpm', 'unix:b'], 1, /--config or --tpm, not both\nusage:/],
    ['doctor of something else', ['doctor', '--tpm', '/dev/tpmrm0'], 1, /--tpm \/dev\/tpmrm0: expected device:PATH, unix:PATH or tcp:HOST:PORT\nusage:/],
    ['tpm and nothing', ['tpm'], 1, /tpm: reset-lockout is missing\nusage:/],
    ['tpm and something else', ['tpm', 'clear'], 1, /unknown command tpm clear\nusage:/],
    ['tpm reset-lockout without a TPM', ['tpm', 'reset-lockout', '--tpm', 'unix:/nonexistent/tpm'], 2, /TPM unix:\/nonexistent\/tpm: connect ENOENT/],
    ['doctor with a password file that is not there', ['doctor', '--config', '/nonexistent/agent.json'], 1, /configuration \/nonexistent\/agent\.json: ENOENT/],
    ['run without configuration', ['run'], 1, /--config FILE is missing/],
    ['a configuration that is not there', ['status', '--config', '/nonexistent/agent.json'], 1, /configuration \/nonexistent\/agent\.json: ENOENT/],
  ]
  test.each(cases)('%s', (_name, args, code, want) => {
    const { status, stdout, stderr } = run(...args)
    expect([status, `${stdout}${stderr}`]).toEqual([code, expect.stringMatching(want)])
  })

  test('unit: a service for this installation', () => {
    const { status, stdout } = run('unit', '--config', 'here/agent.json', '--user', 'key$&per')
    expect(status).toBe(0)
    expect(stdout).toMatch(/^User=key\$&per$/m)
    expect(stdout).toContain(`ExecStart=${process.execPath} ${main} run --config ${join(process.cwd(), 'here/agent.json')}\n`)
  })
})

describe('status', () => {
  test('nobody is running: exit code 5', () => {
    const { status, stderr } = run('status', '--config', configure())
    expect([status, stderr]).toEqual([5, expect.stringMatching(/a\.sock: .*ENOENT.*; is the agent running\?/)])
  })

  test('a configuration without socket', () => {
    const { status, stderr } = run('status', '--config', configure({ socket: null }))
    expect([status, stderr]).toEqual([1, expect.stringContaining('there is nobody to ask')])
  })

  test('somebody who answers nonsense: an error, not a stack', async () => {
    const server = createServer((socket) => void socket.end('nonsense\n')).listen(join(folder, 'a.sock'))
    await once(server, 'listening')
    const child = spawn(process.execPath, [main, 'status', '--config', configure()])
    let said = ''
    child.stderr.on('data', (chunk: Buffer) => {
      said += chunk.toString()
    })
    const [code] = (await once(child, 'close')) as [number]
    server.close()
    expect([code, said]).toEqual([2, expect.stringMatching(/^fleetkey-agent: [^]*JSON\n$/)])
  })
})

describe('run', () => {
  const started = async (config: string, until: RegExp) => {
    const child = spawn(process.execPath, [main, 'run', '--config', config])
    let said = ''
    child.stderr.on('data', (chunk: Buffer) => {
      said += chunk.toString()
    })
    const closed = once(child, 'close') as Promise<[number | null, string | null]>
    await expect.poll(() => said, { timeout: 20_000 }).toMatch(until)
    return { child, closed, said: () => said }
  }

  test('without a TPM: says so, answers its socket, tries again, and ends when it is told to', async () => {
    const config = configure()
    const { child, closed, said } = await started(config, /cannot be opened yet/)
    const { status, stdout } = run('status', '--config', config)
    expect([status, JSON.parse(stdout)]).toMatchObject([5, { device: null, state: 'opening', connected: false, problem: expect.stringContaining('ENOENT') }])
    child.kill('SIGTERM')
    expect(await closed).toEqual([0, null])
    expect(said()).toMatch(/not ready, trying again in 5 s/)
    expect(existsSync(join(folder, 'a.sock'))).toBe(false)
  })

  test('a second one on the same socket is told, and ends with code 5', async () => {
    const config = configure()
    const first = await started(config, /cannot be opened yet/)
    const second = run('run', '--config', config)
    expect([second.status, second.stderr]).toEqual([5, expect.stringMatching(/another agent serves/)])
    first.child.kill('SIGTERM')
    await first.closed
  })

  test('a folder for the socket that cannot be made: code 5', () => {
    writeFileSync(join(folder, 'file'), '')
    chmodSync(join(folder, 'file'), 0o600)
    const { status, stderr } = run('run', '--config', configure({ socket: 'file/a.sock' }))
    expect([status, stderr]).toEqual([5, expect.stringMatching(/cannot start: (ENOTDIR|EEXIST)/)])
  })
})
