#!/usr/bin/env node
import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { openTransport } from '@fleetkey/tpm2/transport.ts'
import { startAgent } from './agent.ts'
import { readSettings, SettingsError, type Settings } from './config.ts'
import { nodeFileSystem } from './filesystem.ts'

const usage = `usage: fleetkey-agent run    --config FILE
       fleetkey-agent status --config FILE
       fleetkey-agent unit   [--config FILE] [--user USER]

run     attests this device, keeps its keys current and serves them to local applications
status  asks the running agent (JSON); exit code 5 while it has no identity or is not running
unit    prints a systemd unit for this installation

FILE is JSON: {"bundle": "bundle.json", "data": "/var/lib/fleetkey-agent", "tpm": "device:/dev/tpmrm0",
"serial": "…", "eventLog": "…" or null, "socket": "/run/fleetkey-agent/agent.sock", "outputs": [{"key": "…", "path": "…"}]}`

/** Exit codes: what scripts can rely on. */
const exit = { ok: 0, usage: 1, remote: 2, notReady: 5 } as const

const say = (line: string): void => void process.stderr.write(`fleetkey-agent: ${line}\n`)

const settingsOf = (config: string | undefined): Settings => {
  if (config === undefined) throw new SettingsError('--config FILE is missing')
  return readSettings(config)
}

/** What a fault run puts in the place of the real thing. */
export interface Surroundings {
  /** Called at every named durable step. */
  readonly step?: (name: string) => void
}

/** Runs until it is told to stop. */
const run = async (settings: Settings, around: Surroundings): Promise<number> => {
  const agent = startAgent({
    settings,
    openTpm: async () => await openTransport(settings.tpm),
    files: nodeFileSystem,
    now: () => Date.now(),
    random: (length) => new Uint8Array(randomBytes(length)),
    log: say,
    step: around.step ?? (() => undefined),
  })
  const ended = Promise.withResolvers<number>()
  let last = ''
  agent.onChange(({ state, device, connected, problem }) => {
    const line = `${state}${device === null ? '' : ` as ${device}`}${connected ? ', connected' : ''}`
    if (line !== last) say(line)
    last = line
    if (state === 'failed') ended.resolve(exit.notReady)
    else if (state === 'opening' && problem !== null) say(hintOf(settings, problem))
  })
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => ended.resolve(exit.ok))
  const code = await ended.promise
  await agent.stop()
  return code
}

const hintOf = (settings: Settings, problem: string): string => {
  if (settings.tpm.startsWith('device:') && /ENOENT/.test(problem)) return `${settings.tpm.slice(7)} is not there: is the TPM's overlay or driver enabled?`
  if (settings.tpm.startsWith('device:') && /EACCES|EPERM/.test(problem)) return `no permission for ${settings.tpm.slice(7)}: run as a member of the group tss`
  return 'the TPM or the data folder cannot be opened yet'
}

/** One question to the running agent. */
const status = async (settings: Settings): Promise<number> => {
  const path = settings.socket?.path
  if (path === undefined) throw new SettingsError('the configuration has no "socket": there is nobody to ask')
  const answer = await new Promise<string>((resolveAnswer, reject) => {
    const socket = connect(path, () => socket.write('{"op":"status"}\n'))
    let text = ''
    socket.setTimeout(5_000, () => socket.destroy(new Error('no answer within 5 s')))
    socket.on('error', reject)
    socket.on('data', (chunk: Buffer) => {
      text += chunk.toString('utf8')
      if (!text.includes('\n') && text.length < 1 << 20) return
      socket.destroy()
      resolveAnswer(text)
    })
    socket.on('close', () => resolveAnswer(text))
  }).catch((error: unknown) => {
    say(`${path}: ${error instanceof Error ? error.message : String(error)}; is the agent running?`)
    return ''
  })
  if (answer === '') return exit.notReady
  const value = JSON.parse(answer) as { device?: string | null }
  process.stdout.write(`${JSON.stringify(value, null, 2)}\n`)
  return typeof value.device === 'string' ? exit.ok : exit.notReady
}

const unit = (config: string, user: string): number => {
  const template = readFileSync(new URL('fleetkey-agent.service', import.meta.url), 'utf8')
  const command = `${process.execPath} ${fileURLToPath(import.meta.url)} run --config ${resolve(config)}`
  process.stdout.write(template.replace(/^ExecStart=.*$/m, () => `ExecStart=${command}`).replace(/^User=.*$/m, () => `User=${user}`))
  return exit.ok
}

const main = async (argv: readonly string[], around: Surroundings): Promise<number> => {
  let parsed
  try {
    parsed = parseArgs({
      args: [...argv],
      allowPositionals: true,
      options: { config: { type: 'string' }, user: { type: 'string' }, help: { type: 'boolean', short: 'h' } },
    })
  } catch (error) {
    throw new SettingsError(error instanceof Error ? error.message : String(error))
  }
  const { values, positionals } = parsed
  const [command, ...rest] = positionals
  if (values.help === true) {
    process.stdout.write(`${usage}\n`)
    return exit.ok
  }
  if (rest.length > 0) throw new SettingsError(`unexpected ${rest.join(' ')}`)
  switch (command) {
    case 'run':
      return await run(settingsOf(values.config), around)
    case 'status':
      return await status(settingsOf(values.config))
    case 'unit':
      return unit(values.config ?? '/etc/fleetkey-agent/agent.json', values.user ?? 'fleetkey')
    default:
      throw new SettingsError(command === undefined ? 'a command is missing' : `unknown command ${command}`)
  }
}

/** The command `fleetkey-agent`; its exit code. */
export const runAgentCommand = async (argv: readonly string[], around: Surroundings = {}): Promise<number> => {
  try {
    return await main(argv, around)
  } catch (error) {
    const wrong = error instanceof SettingsError
    say(error instanceof Error ? error.message : String(error))
    if (wrong) process.stderr.write(`${usage}\n`)
    return wrong ? exit.usage : exit.remote
  }
}

if (import.meta.main) process.exitCode = await runAgentCommand(process.argv.slice(2))
