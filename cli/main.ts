#!/usr/bin/env node
import { resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { createClient, Refused, resolveConnection, resolveSealed, Unreachable, type Client } from './client.ts'
import { commonOptions, exit, UsageError, type Command } from './command.ts'
import { commands } from './commands/index.ts'
import { createOutput } from './output.ts'

const overview = (): string =>
  [
    'fleetkey: provisions devices and distributes keys to them',
    '',
    ...commands.map(({ name, usage, summary }) => `  ${`fleetkey ${name} ${usage}`.trimEnd().padEnd(68)} ${summary}`),
    '',
    'Connection: --server URL --token-file F --ca F, or FLEETKEY_SERVER, FLEETKEY_TOKEN_FILE, FLEETKEY_CA, or cli.json in --data DIR (default: data).',
    '--json prints JSON, also of errors (on standard error: {"error": {"code", "message"}, "exit"}). Exit codes: 0 ok, 1 usage, 2 remote, 3 refused, 4 partial, 5 not ready.',
  ].join('\n')

/** The command whose name is the longest start of the words, and the words that follow it. */
const find = (words: readonly string[]): { command: Command; rest: readonly string[] } | undefined => {
  for (const length of [3, 2, 1]) {
    const command = commands.find(({ name }) => name === words.slice(0, length).join(' '))
    if (command !== undefined && words.length >= length) return { command, rest: words.slice(length) }
  }
  return undefined
}

/** What was meant, perhaps: commands that begin as these words do, else those that speak of the first one. At most sixteen. */
const meant = ([word = '']: readonly string[]): string => {
  const begin = commands.filter(({ name }) => name.startsWith(`${word} `))
  const speak = commands.filter(({ name, summary }) => name.split(' ').includes(word) || new RegExp(`\\b${RegExp.escape(word)}`, 'i').test(summary))
  const found = (begin.length > 0 ? begin : word === '' ? [] : speak).map(({ name }) => name)
  const more = found.length > 16 ? ', …' : ''
  return found.length === 0 ? 'fleetkey --help lists them' : `${begin.length > 0 ? 'there are' : 'see'}: ${found.slice(0, 16).join(', ')}${more}`
}

const usageOf = ({ name, usage, summary }: Command): string => `${`usage: fleetkey ${name} ${usage}`.trimEnd()}\n${summary}`

/** Of node's words on an option what concerns it. */
const said = ({ message }: Error): string => message.replace(/\. To specify a positional argument .*$/s, '')

/** What went wrong, for a person and for a program: codes are those of the server's refusals, `usage`, `unreachable` and `failed`. */
interface Failure {
  readonly code: string
  readonly message: string
  readonly exit: number
}

const refusedExit = (code: string): number => {
  if (code === 'unavailable') return exit.notReady
  return code === 'internal' || code === 'rate-limited' ? exit.remote : exit.refused
}

const unknownToken = 'the server knows no such token: it was taken back, or is for another server (--token-file, or the token in cli.json)'

const failureOf = (error: unknown): Failure => {
  if (error instanceof UsageError || (error instanceof TypeError && 'code' in error && String(error.code).startsWith('ERR_PARSE_ARGS')))
    return { code: 'usage', message: said(error), exit: exit.usage }
  if (error instanceof Refused) {
    const { code, message } = error
    return { code, message: code === 'unauthenticated' && message === code ? unknownToken : message, exit: refusedExit(code) }
  }
  if (error instanceof Unreachable) return { code: 'unreachable', message: error.message, exit: exit.remote }
  const debug = process.env['FLEETKEY_DEBUG'] !== undefined
  return { code: 'failed', message: error instanceof Error ? ((debug ? error.stack : undefined) ?? error.message) : String(error), exit: exit.remote }
}

/** Tells on standard error what went wrong: one line and the usage, or with `--json` one object; the exit code. */
const failed = (error: unknown, of: { readonly json: boolean; readonly command?: Command }): number => {
  const { code, message, exit: status } = failureOf(error)
  const usage = of.command === undefined ? undefined : `fleetkey ${of.command.name} ${of.command.usage}`.trimEnd()
  const lines = of.json
    ? [JSON.stringify({ error: { code, message, ...(code === 'usage' && usage !== undefined ? { usage } : {}) }, exit: status })]
    : [
        `fleetkey: ${code === 'usage' || code === 'unreachable' || code === 'failed' ? '' : `${code}: `}${message}`,
        ...(code === 'usage' && usage !== undefined ? [`usage: ${usage}`] : []),
      ]
  process.stderr.write(`${lines.join('\n')}\n`)
  return status
}

/** Common options may stand before the command: they are moved behind it. */
const commandFirst = (argv: readonly string[]): readonly string[] => {
  let at = 0
  for (let word = argv[0]; word?.startsWith('--') === true; word = argv[at]) {
    const name = word.slice(2).split('=', 1)[0] ?? ''
    if (!Object.hasOwn(commonOptions, name) || name === 'help') break
    at += commonOptions[name as keyof typeof commonOptions].type === 'string' && !word.includes('=') ? 2 : 1
  }
  return [...argv.slice(at), ...argv.slice(0, at)]
}

/** Runs one command line; the exit code comes back. */
export const main = async (line: readonly string[], env: NodeJS.ProcessEnv = process.env): Promise<number> => {
  const argv = commandFirst(line)
  const json = line.includes('--json')
  const words = argv.filter((word, at) => !word.startsWith('-') && argv.slice(0, at).every((before) => !before.startsWith('-')))
  const found = find(words)
  if (found === undefined) {
    const help = argv.length === 0 || argv.some((word) => word === '--help' || word === '-h')
    if (!help) return failed(new UsageError(`there is no command '${words.slice(0, 3).join(' ')}'; ${meant(words)}`), { json })
    const family = commands.filter(({ name }) => words.length > 0 && `${name} `.startsWith(`${words.join(' ')} `))
    process.stdout.write(`${family.length === 0 ? overview() : family.map(usageOf).join('\n\n')}\n`)
    return argv.length === 0 ? exit.usage : exit.ok
  }
  const { command } = found
  let client: Client | undefined
  let sealedClient: Client | undefined
  try {
    const { values, positionals } = parseArgs({
      args: argv.slice(command.name.split(' ').length),
      options: { ...commonOptions, ...command.options },
      allowPositionals: true,
    })
    const options = values as Readonly<Record<string, string | boolean | string[] | undefined>>
    if (options['help'] === true) {
      process.stdout.write(`${usageOf(command)}\n`)
      return exit.ok
    }
    const [least, most] = command.args
    if (positionals.length < least || positionals.length > most)
      throw new UsageError(positionals.length < least ? 'an argument is missing' : `'${positionals[most]}' is one argument too many`)
    const data = resolve(typeof options['data'] === 'string' ? options['data'] : (env['FLEETKEY_DATA'] ?? 'data'))
    const string = (name: string): string | undefined => (typeof options[name] === 'string' ? options[name] : undefined)
    return await command.run({
      args: positionals,
      options,
      data,
      out: createOutput(options['json'] === true, process.stdout, process.stderr),
      client: () => (client ??= createClient(resolveConnection({ server: string('server'), tokenFile: string('token-file'), ca: string('ca'), data }, env))),
      sealedClient: () => (sealedClient ??= createClient(resolveSealed({ server: string('server'), sealing: string('sealing'), ca: string('ca'), data }, env))),
    })
  } catch (error) {
    return failed(error, { json, command })
  } finally {
    client?.close()
    sealedClient?.close()
  }
}

process.stdout.on('error', () => process.exit(0))
if (import.meta.main) process.exitCode = await main(process.argv.slice(2))
