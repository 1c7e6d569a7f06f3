import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { serveSoftwareTpm } from '@fleetkey/firmware-sim/tpm/serve.ts'
import { isAlive } from './processes.ts'
import { hasProgram } from './programs.ts'
import { openWorld, until, type Machine, type World } from './world.ts'

const program = fileURLToPath(new URL('../device-agent/main.ts', import.meta.url))

/** The agent as it is installed: a process, its configuration file, a TPM behind a socket, applications that ask. One setting tells the TPMs apart. */
describe.each(['simulator', 'swtpm'] as const)('fleetkey-agent run on %s', (kind) => {
  const here = kind === 'simulator' || hasProgram('swtpm')
  const folder = mkdtempSync(join(tmpdir(), 'fk-agent-'))
  const at = (name: string): string => join(folder, name)
  let world: World
  let machine: Machine
  let served: { stop(): Promise<void> } | undefined
  let agent: ChildProcess
  let said = ''

  const start = (): void => {
    agent = spawn(process.execPath, [program, 'run', '--config', at('agent.json')], { stdio: ['ignore', 'ignore', 'pipe'] })
    agent.stderr?.on('data', (chunk: Buffer) => (said += chunk.toString()))
  }
  const end = async (signal: 'SIGKILL' | 'SIGTERM'): Promise<number | null> => {
    const gone = once(agent, 'exit')
    agent.kill(signal)
    return ((await gone) as [number | null])[0]
  }
  /** One question of a local application. */
  const ask = async (question: object): Promise<Record<string, unknown>> =>
    await new Promise((resolve, reject) => {
      const socket = connect(at('a.sock'), () => socket.write(`${JSON.stringify(question)}\n`))
      let text = ''
      socket.on('error', reject)
      socket.on('data', (chunk: Buffer) => {
        text += chunk.toString()
        if (!text.endsWith('\n')) return
        socket.destroy()
        resolve(JSON.parse(text) as Record<string, unknown>)
      })
    })
  const epochOf = async (key: string): Promise<unknown> => (await ask({ op: 'get', key }).catch(() => ({}) as Record<string, unknown>))['epoch']

  beforeAll(async () => {
    if (!here) return
    world = await openWorld()
    let tpm: string
    if (kind === 'swtpm') {
      const made = await world.onSwtpm('GW-1')
      ;[machine, tpm] = [made, made.spec]
    } else {
      const made = await world.simulated('GW-1')
      served = await serveSoftwareTpm(made.board.tpm, { path: at('tpm') })
      ;[machine, tpm] = [made, `unix:${at('tpm')}`]
    }
    await world.enlist([machine], 'plant')
    writeFileSync(at('event.log'), machine.eventLog())
    writeFileSync(at('ima.list'), machine.imaList?.() ?? '')
    writeFileSync(at('bundle.json'), JSON.stringify({ ...world.bundle, server: `mqtts://127.0.0.1:${world.server.mqttPort}` }))
    const hook = [
      '/bin/sh',
      '-c',
      `test -e '${at('refuse')}' && exit 1; test -e '${at('hang')}' && { echo $$ > '${at('hung')}'; sleep 600; }; cat '${at('telemetry.key')}' >> '${at('taken')}'; echo >> '${at('taken')}'`,
    ]
    const outputs = [{ key: 'telemetry', path: 'telemetry.key', format: 'base64', mode: '0640', hook }]
    const measured = { eventLog: 'event.log', imaList: 'ima.list' }
    const config = { bundle: 'bundle.json', data: 'data', tpm, serial: 'GW-1', ...measured, socket: { path: 'a.sock', mode: '0600' }, outputs }
    writeFileSync(at('agent.json'), JSON.stringify(config))
    await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await world.client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
    for (const key of ['telemetry', 'command-auth']) await world.client.call('key.grant', { params: { id: key }, body: { group: 'plant' } })
    start()
  }, 60_000)
  afterAll(async () => {
    if (here) {
      if (agent.exitCode === null && agent.signalCode === null) await end('SIGKILL')
      await served?.stop()
      await world.stop()
    }
    rmSync(folder, { recursive: true, force: true })
  })
  // oxlint-disable-next-line vitest/expect-expect, vitest/valid-title -- the titles and assertions are below
  const on = (name: string, work: () => Promise<void>): void => test.skipIf(!here)(name, work, 60_000)
  const stage = async (key: string, epoch: number): Promise<string | undefined> =>
    (await world.client.call('device.show', { params: { id: 'gw-1' } })).holdings.find((one) => one.key === key && one.epoch === epoch)?.stage

  on('enrols, and gives its keys to applications: by socket, file and hook', async () => {
    await until('both keys are proven', async () => (await stage('telemetry', 1)) === 'active' && (await stage('command-auth', 1)) === 'active', 40_000)
    const { material } = await ask({ op: 'get', key: 'telemetry' })
    expect(readFileSync(at('telemetry.key'), 'utf8').trim()).toBe(material)
    expect(readFileSync(at('taken'), 'utf8').trim()).toBe(material)
    expect([statSync(at('telemetry.key')).mode & 0o777, statSync(at('a.sock')).mode & 0o777]).toEqual([0o640, 0o600])
    const data = Buffer.from('close valve 7').toString('base64')
    const { mac, epoch } = await ask({ op: 'mac', key: 'command-auth', data })
    expect(await ask({ op: 'verify', key: 'command-auth', epoch, data, mac })).toMatchObject({ valid: true })
    expect(await ask({ op: 'get', key: 'command-auth' })).toMatchObject({ error: expect.anything() })
  })

  on('shows what its kernel has measured when the group needs that', async () => {
    const { policy } = await world.client.call('group.show', { params: { id: 'plant' } })
    await world.client.call('group.policy.set', { params: { id: 'plant' }, body: { ima: 'listed' } })
    const shown = async () => await world.client.call('device.show', { params: { id: 'gw-1' } })
    await until('the list is proven', async () => (await shown()).ima !== null)
    expect(await shown()).toMatchObject({ state: 'enrolled', verdict: 'affirming', ima: { entries: 3, pending: 0, unlisted: 0 } })
    // swtpm serves one connection, which the agent has.
    if (kind === 'simulator') {
      const doctor = spawn(process.execPath, [program, 'doctor', '--config', at('agent.json'), '--json'], { stdio: ['ignore', 'pipe', 'ignore'] })
      let stdout = ''
      doctor.stdout.on('data', (chunk: Buffer) => (stdout += chunk.toString()))
      await once(doctor, 'close')
      const { findings } = JSON.parse(stdout) as { findings: object[] }
      expect(findings).toContainEqual(expect.objectContaining({ check: 'IMA list', grade: 'ok', found: expect.stringContaining('3 lead to PCR 10') }))
    }
    await world.client.call('group.policy.set', { params: { id: 'plant' }, body: policy })
  })

  on('a rotation waits for its consumers: active only after the hook has succeeded', async () => {
    writeFileSync(at('refuse'), '')
    await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: { deadline: 60_000 } })
    await until('the hook has refused', () => said.includes('hook'))
    expect(await stage('telemetry', 2)).toBe('installed')
    rmSync(at('refuse'))
    await until('it is proven', async () => (await stage('telemetry', 2)) === 'active', 30_000)
    expect(readFileSync(at('taken'), 'utf8').trim().split('\n').at(-1)).toBe((await ask({ op: 'get', key: 'telemetry' }))['material'])
  })

  on('killed with -9 while a hook runs: the hook ends with it', async () => {
    writeFileSync(at('hang'), '')
    await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: { deadline: 60_000 } })
    await until('the hook hangs', () => existsSync(at('hung')) && readFileSync(at('hung'), 'utf8').endsWith('\n'))
    const hook = Number(readFileSync(at('hung'), 'utf8'))
    expect(isAlive(hook)).toBe(true)
    await end('SIGKILL')
    await until('the hook has ended', () => !isAlive(hook))
    rmSync(at('hang'))
    start()
    await until('the consumers have taken it', async () => (await stage('telemetry', 3)) === 'active', 40_000)
  })

  on('killed with -9 and without a server, it serves its keys from the cache', async () => {
    const { material } = await ask({ op: 'get', key: 'telemetry' })
    const { ciphertext } = await ask({ op: 'encrypt', key: 'telemetry', plaintext: Buffer.from('4.2 bar').toString('base64') })
    await end('SIGKILL')
    await world.server.stop()
    start()
    const started = Date.now()
    await until('the key is there', async () => (await epochOf('telemetry')) === 3)
    process.stdout.write(`${kind}: first key from the cache after ${Date.now() - started} ms\n`)
    expect(await ask({ op: 'get', key: 'telemetry' })).toMatchObject({ material, epoch: 3 })
    const { plaintext } = await ask({ op: 'decrypt', key: 'telemetry', ciphertext })
    expect(Buffer.from(String(plaintext), 'base64').toString()).toBe('4.2 bar')
    expect(await ask({ op: 'mac', key: 'command-auth', data: '' })).toMatchObject({ epoch: 1 })
    expect(await ask({ op: 'status' })).toMatchObject({ device: 'gw-1', connected: false })
  })

  on('it is told to stop: exit code 0, the socket is gone, nothing of a key in its log', async () => {
    const { material } = await ask({ op: 'get', key: 'telemetry' })
    expect(await end('SIGTERM')).toBe(0)
    expect(existsSync(at('a.sock'))).toBe(false)
    expect(said).not.toContain(material)
    expect(said).not.toMatch(/\n\s+at /)
  })
})
