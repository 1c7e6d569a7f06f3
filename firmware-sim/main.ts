#!/usr/bin/env node
import { randomBytes } from 'node:crypto'
import { existsSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { SettingsError } from '@fleetkey/device-agent/config.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { z } from 'zod'
import { stateFile } from './board/state-file.ts'
import { boardMethods, makeBatch, openFactory, writeBatch } from './factory/factory.ts'
import { leave, run } from './fleet/run.ts'
import { optionsOf, parsed, required, UsageError } from './options.ts'
import { serveSoftwareTpm } from './tpm/serve.ts'

const usage = `usage: fleetkey-sim factory --out DIR [--method tpm2|idevid|token] [--devices N] [--model NAME] [--batch NAME] [--station NAME]
       fleetkey-sim run --factory DIR --bundle FILE --data DIR [--tokens FILE] [--tamper SERIAL[:STAGE]]… [--claim SERIAL=OTHER]… [--starting N] [--control]
       fleetkey-sim run --devices N --data DIR (--server URL --token-file FILE --ca FILE | --server-data DIR | --bundle FILE --factory DIR)
                    [--group NAME] [--profile HABIT=SHARE,…] [--seed N] [--processes N] [--starting N] [--for SECONDS] [--json]
       fleetkey-sim board --factory DIR --serial SERIAL --data DIR (--unix PATH | --port N)

factory  makes boards with TPMs and EK certificates of its own EK CA (--method idevid: with secure elements and IDevIDs of its
         own CA; token: with no key at all), the firmware they leave with, and writes what a server imports: station.pem, station.csr,
         ek-ca.pem or idevid-ca.pem, batch.json, batch.csv and release.json, each with its .sig
run      runs the real agent on every board of a batch, in this process; JSON lines on standard output.
         --tokens FILE has a token a line, for the boards without a key, in their order;
         --tamper changes a byte of a boot stage (kernel unless named); --claim makes a board claim another's serial;
         --control takes orders as JSON lines on standard input (on, off, unplug, live, counts, status, stop, measure, encrypt,
         decrypt, mac, verify), --quiet says nothing else
         --devices: a fleet in several processes, its boards made at the first run and kept in DIR, so that the next one starts
         enrolled. With a token it hands its batch to the server itself (--server-data: the cli.json of a server's data folder);
         without one, import the batch of --factory first. --profile: what is not steady, of duty-cycled, flaky, dead, slow-tpm,
         wrong-clock, power-cuts; --seed decides who. A table on a terminal, else progress lines; --json one object a line
board    boots one board of a batch and serves its TPM on swtpm's protocol, for an agent of its own ("tpm": "unix:PATH",
         "eventLog": "DIR/event.log", "imaList": "DIR/ima.list") and for tpm2-tools; SIGUSR2 measures one more file

Everything here is a simulation in software: no secret in it is protected from whoever runs it.`

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const now = (): number => Date.now()
const say = (line: string): void => void process.stderr.write(`fleetkey-sim: ${line}\n`)
const print = (value: object): void => void process.stdout.write(`${JSON.stringify(value)}\n`)

const Name = z.string().regex(/^[a-z0-9][a-z0-9-]{0,31}$/)

const factory = async (argv: readonly string[]): Promise<void> => {
  const text = { type: 'string' } as const
  const values = optionsOf(argv, { out: text, method: text, devices: text, model: text, batch: text, station: text })
  const out = resolve(required(values.out, '--out DIR'))
  if (existsSync(join(out, 'batch.json'))) throw new UsageError(`${out} holds a batch already`)
  const devices = parsed(z.coerce.number().int().min(1).max(100_000), values.devices ?? '25', '--devices')
  const order = {
    batch: parsed(Name, values.batch ?? 'batch-1', '--batch'),
    model: parsed(Name, values.model ?? 'gateway', '--model'),
    station: parsed(Name, values.station ?? 'line-1', '--station'),
    devices,
    release: { name: '1.0.0', number: 1 },
    method: parsed(z.enum(boardMethods), values.method ?? 'tpm2', '--method'),
  }
  const live = process.stderr.isTTY
  const batch = await makeBatch(order, {
    random,
    now,
    ...(live ? { progress: (done: number) => void process.stderr.write(`\r${done}/${devices} boards${done === devices ? '\n' : ''}`) } : {}),
  })
  await writeBatch(out, batch)
  print({
    out,
    method: order.method,
    batch: order.batch,
    model: order.model,
    station: order.station,
    devices,
    serials: batch.boards.slice(0, 3).map(({ serial }) => serial),
  })
}

const board = async (argv: readonly string[]): Promise<void> => {
  const text = { type: 'string' } as const
  const values = optionsOf(argv, { factory: text, serial: text, data: text, unix: text, port: text })
  if ((values.unix === undefined) === (values.port === undefined)) throw new UsageError('one of --unix PATH and --port N')
  const open = await openFactory(resolve(required(values.factory, '--factory DIR')))
  const serial = required(values.serial, '--serial SERIAL')
  if (!open.serials.includes(serial)) throw new UsageError(`no board ${serial} in this batch`)
  if (open.methodOf(serial) !== 'tpm2') throw new UsageError(`board ${serial} has no TPM`)
  const folder = resolve(required(values.data, '--data DIR'))
  await nodeFileSystem.makeFolder(folder, 0o700)
  const state = stateFile(join(folder, 'tpm.state'))
  const made = await open.board(serial, { random, now, state: state.read(), save: state.write })
  const boot = (): void => {
    made.boot()
    writeFileSync(join(folder, 'event.log'), made.eventLog())
    writeFileSync(join(folder, 'ima.list'), made.imaList())
  }
  boot()
  let measured = 0
  // As if a program was started that had not run since the boot.
  process.on('SIGUSR2', () => {
    made.measureFile(`/usr/local/bin/tool-${++measured}`, random(32))
    writeFileSync(join(folder, 'ima.list'), made.imaList())
  })
  const where =
    values.unix === undefined
      ? { host: '127.0.0.1', port: parsed(z.coerce.number().int().min(1).max(65_534), values.port, '--port') }
      : { path: resolve(values.unix) }
  // INIT on the control channel is a reset of the whole board: its ROM measures again.
  const served = await serveSoftwareTpm({ ...made.tpm, powerCycle: boot }, where)
  print({
    event: 'ready',
    serial,
    tpm: 'path' in where ? `unix:${where.path}` : `tcp:${where.host}:${where.port}`,
    eventLog: join(folder, 'event.log'),
    imaList: join(folder, 'ima.list'),
  })
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.once(signal, () => void served.stop().then(leave))
}

// Whoever read what it says has gone.
process.stdout.on('error', () => process.exit(0))
const commands: Readonly<Record<string, (argv: readonly string[]) => Promise<void>>> = { factory, run, board }

const [name = '', ...argv] = process.argv.slice(2)
const command = Object.hasOwn(commands, name) ? commands[name] : undefined
if (name === '--help' || name === '-h') process.stdout.write(`${usage}\n`)
else
  try {
    if (command === undefined) throw new UsageError(name === '' ? 'a command is missing' : `unknown command ${name}`)
    await command(argv)
  } catch (error) {
    const wrong = error instanceof UsageError || error instanceof SettingsError
    say(error instanceof Error ? error.message : String(error))
    if (wrong) process.stderr.write(`${usage}\n`)
    process.exitCode = wrong ? 1 : 2
  }
