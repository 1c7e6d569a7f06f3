#!/usr/bin/env node
import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { connect } from 'node:net'
import { resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { openTransport } from '@fleetkey/tpm2/transport.ts'
import { defaultEventLog, defaultImaList, readSettings, SettingsError, type Settings } from './config.ts'
import { nodeFileSystem } from './filesystem.ts'

const usage = `usage: fleetkey-agent run    --config FILE
       fleetkey-agent status --config FILE
       fleetkey-agent unit   [--config FILE] [--user USER]
       fleetkey-agent doctor [--config FILE | --tpm TPM [--event-log FILE] [--ima-list FILE]] [--json]
       fleetkey-agent crypt  encrypt|decrypt --key KEY [--aad TEXT] [--in FILE] [--out FILE] (--config FILE | --socket PATH)
       fleetkey-agent tpm reset-lockout [--config FILE | --tpm TPM] [--lockout-auth-file FILE]

run     attests this device, keeps its keys current and serves them to local applications
status  asks the running agent (JSON); exit code 5 while it has no identity or is not running
crypt   protects or opens data of any length with a key of the running agent: stdin to stdout, or files; exit code 3 when it is refused
unit    prints a systemd unit for this installation
doctor  says what TPM it finds, what is missing, and what this board protects and what not; exit code 5 when the agent cannot run
tpm     reset-lockout: ends a lockout after wrong passwords; exit code 3 when the TPM refuses

TPM is device:/dev/tpmrm0 (the default), unix:PATH or tcp:HOST:PORT.
FILE is JSON; in the place of "tpm" a device without one has "idevid": {"key": "…", "certificates": "…"} or "token": "…":
{"bundle": "bundle.json", "data": "/var/lib/fleetkey-agent", "tpm": "device:/dev/tpmrm0",
"serial": "…", "eventLog": "…" or null, "imaList": "…" or null, "socket": "/run/fleetkey-agent/agent.sock", "outputs": [{"key": "…", "path": "…"}]}`

/** Exit codes: what scripts can rely on. */
const exit = { ok: 0, usage: 1, remote: 2, refused: 3, notReady: 5 } as const

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
  // Loaded when it is asked for: the other commands start without it.
  const { startAgent } = await import('./agent.ts')
  const agent = startAgent({
    settings,
    openTpm: async () => await openTransport(tpmOf(settings.tpm)),
    files: nodeFileSystem,
    now: () => Date.now(),
    random,
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
    else if (state === 'opening' && problem !== null) say(hint)
  })
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => ended.resolve(exit.ok))
  const code = await ended.promise
  await agent.stop()
  return code
}

const hint = 'the TPM, the secure element or the data folder cannot be opened yet; "fleetkey-agent doctor" says what is missing'

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

/** Options of the commands that look at a TPM. */
interface TpmOptions {
  readonly config?: string | undefined
  readonly tpm?: string | undefined
  readonly 'event-log'?: string | undefined
  readonly 'ima-list'?: string | undefined
  readonly 'lockout-auth-file'?: string | undefined
  readonly root?: string | undefined
  readonly json?: boolean | undefined
}

interface CryptOptions {
  readonly key?: string | undefined
  readonly aad?: string | undefined
  readonly in?: string | undefined
  readonly out?: string | undefined
  readonly socket?: string | undefined
}

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

const tpmOf = (tpm: string | null): string => {
  if (tpm === null) throw new SettingsError('this configuration names no TPM')
  return tpm
}

/** The TPM that is meant: of the configuration, or named on the command line. */
const patientOf = (
  values: TpmOptions,
): Pick<Settings, 'eventLog'> & {
  readonly tpm: string
  readonly data: string | null
  readonly imaList: string | null
  readonly tpmAuth: NonNullable<Settings['tpmAuth']>
} => {
  if (values.config !== undefined && values.tpm !== undefined) throw new SettingsError('--config or --tpm, not both')
  if (values.config !== undefined) {
    const { tpm, tpmAuth, eventLog, imaList, data } = readSettings(values.config)
    return { tpm: tpmOf(tpm), data, tpmAuth: tpmAuth ?? {}, eventLog: values['event-log'] ?? eventLog, imaList: values['ima-list'] ?? imaList ?? null }
  }
  const tpm = values.tpm ?? 'device:/dev/tpmrm0'
  if (!/^(?:device|unix|tcp):./.test(tpm)) throw new SettingsError(`--tpm ${tpm}: expected device:PATH, unix:PATH or tcp:HOST:PORT`)
  return { tpm, data: null, tpmAuth: {}, eventLog: values['event-log'] ?? defaultEventLog, imaList: values['ima-list'] ?? defaultImaList }
}

const doctor = async (values: TpmOptions): Promise<number> => {
  const patient = patientOf(values)
  // Loaded when it is asked for: the agent itself starts without it.
  const [{ examine }, { examinationText }] = await Promise.all([import('./doctor/examine.ts'), import('./doctor/text.ts')])
  const found = await examine({ ...patient, root: values.root ?? '/', open: async () => await openTransport(patient.tpm), random, now: Date.now() })
  const json = values.json === true || !process.stdout.isTTY
  process.stdout.write(json ? `${JSON.stringify(found, null, 2)}\n` : `${examinationText(found, process.stdout.columns)}\n`)
  return found.ready ? exit.ok : exit.notReady
}

const tpmCommand = async (what: string | undefined, values: TpmOptions): Promise<number> => {
  if (what !== 'reset-lockout') throw new SettingsError(what === undefined ? 'tpm: reset-lockout is missing' : `unknown command tpm ${what}`)
  const { tpm, tpmAuth } = patientOf(values)
  const { resetLockout } = await import('./tpm-command.ts')
  const file = values['lockout-auth-file']
  const named = file === undefined ? tpmAuth : { ...tpmAuth, lockout: file }
  const { done, text } = await resetLockout({ open: async () => await openTransport(tpm), random, tpmAuth: named })
  say(text)
  return done ? exit.ok : exit.refused
}

const cryptCommand = async (what: string | undefined, values: TpmOptions & CryptOptions): Promise<number> => {
  if (what !== 'encrypt' && what !== 'decrypt')
    throw new SettingsError(what === undefined ? 'crypt: encrypt or decrypt is missing' : `unknown command crypt ${what}`)
  if (values.key === undefined) throw new SettingsError('--key KEY is missing')
  const path = values.socket ?? settingsOf(values.config).socket?.path
  if (path === undefined) throw new SettingsError('the configuration has no "socket": there is nobody to ask')
  const [{ connectAgent }, { crypt }] = await Promise.all([import('./client.ts'), import('./crypt-command.ts')])
  const agent = connectAgent(path)
  try {
    await crypt({ what, agent, key: values.key, aad: new TextEncoder().encode(values.aad ?? ''), input: values.in, output: values.out })
    return exit.ok
  } catch (error) {
    if (!(error instanceof Problem)) throw error
    say(`${error.code}: ${error.message}`)
    return error.reason === 'agent.away' ? exit.notReady : exit.refused
  } finally {
    agent.close()
  }
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
      options: {
        config: { type: 'string' },
        user: { type: 'string' },
        tpm: { type: 'string' },
        'event-log': { type: 'string' },
        'ima-list': { type: 'string' },
        'lockout-auth-file': { type: 'string' },
        // A folder in the place of `/`, where board and IMA list are looked for: for tests, and for the files of another machine.
        root: { type: 'string' },
        json: { type: 'boolean' },
        key: { type: 'string' },
        aad: { type: 'string' },
        in: { type: 'string' },
        out: { type: 'string' },
        socket: { type: 'string' },
        help: { type: 'boolean', short: 'h' },
      },
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
  if (command === 'crypt' && rest.length <= 1) return await cryptCommand(rest[0], values)
  if (command === 'tpm' && rest.length <= 1) return await tpmCommand(rest[0], values)
  if (rest.length > 0) throw new SettingsError(`unexpected ${rest.join(' ')}`)
  switch (command) {
    case 'run':
      return await run(settingsOf(values.config), around)
    case 'status':
      return await status(settingsOf(values.config))
    case 'doctor':
      return await doctor(values)
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
