import { randomBytes } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join, resolve } from 'node:path'
import { createClient, resolveConnection, type Client } from '@fleetkey/cli/client.ts'
import { UsageError as WrongWords } from '@fleetkey/cli/command.ts'
import { trustOfBundle } from '@fleetkey/device-agent/config.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { Bundle } from '@fleetkey/protocol/admin.ts'
import { z } from 'zod'
import { simulatedFiles } from '../board/files.ts'
import { makeBatch, openFactory, writeBatch } from '../factory/factory.ts'
import { optionsOf, required, UsageError, whole } from '../options.ts'
import { stages, type StageName } from '../release/release.ts'
import { admitBatch } from './admission.ts'
import { serveControl } from './control.ts'
import { openFleet } from './fleet.ts'
import { habitNames, habitOf, parseMix, type Habit } from './habits.ts'
import { livingAs } from './life.ts'
import { boardsPerProcess, startFleetProcesses } from './processes.ts'
import { progressTo } from './progress.ts'

const text = { type: 'string' } as const
const many = { type: 'string', multiple: true } as const
const flag = { type: 'boolean' } as const

const options = {
  factory: text,
  bundle: text,
  data: text,
  tokens: text,
  tamper: many,
  claim: many,
  starting: text,
  control: flag,
  quiet: flag,
  profile: text,
  seed: text,
  devices: text,
  processes: text,
  group: text,
  for: text,
  json: flag,
  server: text,
  'token-file': text,
  ca: text,
  'server-data': text,
} as const

type Values = ReturnType<typeof optionsOf<typeof options>>

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const now = (): number => Date.now()
const say = (line: string): void => void process.stderr.write(`fleetkey-sim: ${line}\n`)
const print = (value: object): void => void process.stdout.write(`${JSON.stringify(value)}\n`)

/** Ends once everything that was said is out: the last words of a thousand boards do not fit into a pipe at once. */
export const leave = (): void => void process.stdout.write('', () => process.exit(0))

const tamperedOf = (texts: readonly string[]): ReadonlyMap<string, StageName> =>
  new Map(
    texts.map((text) => {
      const [serial = '', name = 'kernel'] = text.split(':')
      const found = stages.find(({ stage }) => stage === name)
      if (found === undefined) throw new UsageError(`--tamper: no boot stage ${name}`)
      return [serial, found.stage]
    }),
  )

const claimsOf = (texts: readonly string[]): ReadonlyMap<string, string> =>
  new Map(
    texts.map((text) => {
      const [serial, other, ...more] = text.split('=')
      if (serial === undefined || other === undefined || more.length > 0) throw new UsageError('--claim SERIAL=OTHER')
      return [serial, other]
    }),
  )

const textIn = (path: string, option: string): string => {
  try {
    return readFileSync(path, 'utf8')
  } catch (error) {
    throw new UsageError(`${option} ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

const bundleIn = (path: string): z.infer<typeof Bundle> => {
  try {
    return Bundle.parse(JSON.parse(textIn(path, '--bundle')))
  } catch (error) {
    throw error instanceof UsageError ? error : new UsageError(`--bundle ${path}: ${error instanceof Error ? error.message : String(error)}`)
  }
}

const linesIn = (path: string): readonly string[] =>
  textIn(path, '--tokens')
    .split('\n')
    .filter((line) => line !== '')

/** How each board behaves; the same for the same words. */
const habitsOf = (values: Values): ((serial: string) => Habit) => {
  const mix = values.profile === undefined ? {} : parseMix(values.profile)
  if (mix === undefined) throw new UsageError(`--profile takes shares such as flaky=0.1,dead=0.02 of ${habitNames.join(', ')}`)
  const seed = whole(z.int().min(0), values.seed, 1, '--seed')
  const known = new Map<string, Habit>()
  return (serial) => {
    const habit = known.get(serial) ?? habitOf(mix, seed, serial)
    known.set(serial, habit)
    return habit
  }
}

/** The folder that `--data` names, made when it is not there. */
const folderOf = async (values: Values): Promise<string> => {
  const path = resolve(required(values.data, '--data DIR'))
  await nodeFileSystem.makeFolder(path, 0o700).catch((error: unknown) => {
    throw new UsageError(`--data ${path}: ${error instanceof Error ? error.message : String(error)}`)
  })
  return path
}

/** Boards of a factory's folder in this process. */
const runHere = async (values: Values): Promise<void> => {
  const open = await openFactory(resolve(required(values.factory, '--factory DIR')))
  const habitFor = habitsOf(values)
  const said = new Map<string, string>()
  const connected = new Set<string>()
  let connections = 0
  const fleet = openFleet(
    {
      factory: open,
      trust: trustOfBundle(bundleIn(required(values.bundle, '--bundle FILE'))),
      data: await folderOf(values),
      files: simulatedFiles,
      random,
      now,
      log: say,
      tokens: values.tokens === undefined ? [] : linesIn(values.tokens),
      tampered: tamperedOf(values.tamper ?? []),
      claims: claimsOf(values.claim ?? []),
      starting: whole(z.int().min(1).max(1_000), values.starting, 16, '--starting'),
      habit: habitFor,
    },
    (serial, status) => {
      if (!status.connected) connected.delete(serial)
      else if (!connected.has(serial)) {
        connected.add(serial)
        connections++
      }
      if (values.quiet === true) return
      const line = JSON.stringify({ event: 'status', serial, ...status })
      if (said.get(serial) === line) return
      said.set(serial, line)
      process.stdout.write(`${line}\n`)
    },
  )
  const life = livingAs(fleet, habitFor)
  for (const signal of ['SIGTERM', 'SIGINT'] as const)
    process.once(signal, () => {
      life.stop()
      void fleet.stop().then(leave)
    })
  if (values.control === true) {
    print({ event: 'ready', boards: open.serials.length })
    await serveControl({ fleet, life, habitFor, connections: () => connections }, process.stdin, print)
    // Whatever is still under way: who gave the orders has told it to stop, or has gone.
    return leave()
  }
  await life.begin(open.serials)
  print({ event: 'started', boards: open.serials.length })
}

const Count = z.int().min(1).max(100_000)

/** The boards of a fleet: made when there are none yet in this folder. The folder of their factory, and their serials. */
const boardsOf = async (values: Values, data: string): Promise<{ readonly factory: string; readonly serials: readonly string[] }> => {
  const factory = resolve(values.factory ?? join(data, 'factory'))
  const devices = whole(Count, values.devices, 1, '--devices')
  if (!existsSync(join(factory, 'batch.json'))) {
    if (values.factory !== undefined) throw new UsageError(`--factory ${factory}: no batch.json`)
    // Several fleets may meet at one server: batch, station and model are of this one alone.
    const name = randomBytes(3).toString('hex')
    const [batch, model] = [`fleet-${name}`, `board-${name}`]
    say(`making ${devices} boards`)
    await writeBatch(factory, await makeBatch({ batch, model, station: batch, devices, release: { name: '1.0.0', number: 1 } }, { random, now }))
  }
  const { serials } = await openFactory(factory)
  if (serials.length < devices) throw new UsageError(`${factory} has ${serials.length} boards, not ${devices}`)
  return { factory, serials: serials.slice(0, devices) }
}

/** One process for each core, more when one would have too many boards. */
const processesFor = (values: Values): number => Math.min(64, Math.max(availableParallelism(), Math.ceil(Number(values.devices ?? '1') / boardsPerProcess)))

const clientOf = (values: Values, data: string): Client => {
  const given = { server: values.server, tokenFile: values['token-file'], ca: values.ca, data: resolve(values['server-data'] ?? data) }
  try {
    return createClient(resolveConnection(given, process.env))
  } catch (error) {
    throw error instanceof WrongWords ? new UsageError(error.message) : error
  }
}

/** A fleet in several processes, against any server: it hands its batch over itself where it is given a token. */
const runFleet = async (values: Values): Promise<void> => {
  const data = await folderOf(values)
  const processes = whole(z.int().min(1).max(64), values.processes, processesFor(values), '--processes')
  const seconds = values.for === undefined ? undefined : whole(z.number().positive(), values.for, 0, '--for')
  habitsOf(values)
  const { factory, serials } = await boardsOf(values, data)
  let bundle: string
  if (values.bundle !== undefined) bundle = JSON.stringify(bundleIn(values.bundle))
  else {
    const client = clientOf(values, data)
    try {
      await admitBatch(client, factory, values.group)
      bundle = JSON.stringify(await client.call('bundle'))
    } finally {
      client.close()
    }
  }
  const words = ['--starting', values.starting ?? '16', ...(values.profile === undefined ? [] : ['--profile', values.profile]), '--seed', values.seed ?? '1']
  const fleet = await startFleetProcesses({ factory, bundle, data, serials, processes, words })
  const ended = Promise.withResolvers<void>()
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => ended.resolve())
  const progress = progressTo(process.stdout, { json: values.json === true, processes: fleet.pids.length, counts: fleet.counts })
  void fleet.live().catch(ended.reject)
  const timer = seconds === undefined ? undefined : setTimeout(() => ended.resolve(), seconds * 1_000)
  try {
    await Promise.race([ended.promise, progress.failed])
  } finally {
    clearTimeout(timer)
    await progress.stop()
    await fleet.stop()
  }
}

/** `fleetkey-sim run`: one batch in this process, or (`--devices`) a fleet in several. */
export const run = async (argv: readonly string[]): Promise<void> => {
  const values = optionsOf(argv, options)
  if (values.devices === undefined) return await runHere(values)
  await runFleet(values)
  leave()
}
