// From a factory's batch to a revoked device, on loopback, with the real server, the real agent and the real commands.
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { BoardRefused, startBoards, type Boards } from './boards.ts'
import { startPlant } from './plant.ts'
import { stopAll, run, service, type Service } from './programs.ts'

const usage = 'usage: npm run demo -- [--devices N] [--data DIR] [--json]'
const least = 8

interface Campaign {
  readonly id: string
  readonly state: string
  readonly wave: number
  readonly waves: number
  readonly targets: number
  readonly counts: Readonly<Record<string, number>>
}

interface Options {
  readonly devices: number
  readonly folder: string
  readonly json: boolean
}

/** One condition of the demo: it holds, or the demo has failed. */
const must = (holds: boolean, what: string): void => {
  if (!holds) throw new Error(what)
}

const seconds = (milliseconds: number): string => `${(milliseconds / 1000).toFixed(1)} s`
const base64 = (text: string): string => Buffer.from(text).toString('base64')

/** Prints what happens: steps with their time, facts below them, progress that is rewritten in place on a terminal. */
const narrator = (out: NodeJS.WriteStream) => {
  const started = Date.now()
  let live = false
  const clear = (): void => {
    if (live) out.write('\r\x1B[2K')
    live = false
  }
  return {
    started,
    step(title: string) {
      clear()
      out.write(`\n${seconds(Date.now() - started).padStart(7)}  ${title}\n`)
    },
    fact(text: string) {
      clear()
      out.write(`         ${text}\n`)
    },
    progress(text: string) {
      if (!out.isTTY) return
      out.write(`\r\x1B[2K         ${text.slice(0, (out.columns ?? 80) - 10)}`)
      live = true
    },
  }
}

const demo = async ({ devices, folder, json }: Options): Promise<Record<string, unknown>> => {
  const say = narrator(json ? process.stderr : process.stdout)
  const server = join(folder, 'server')
  const factory = join(folder, 'factory')
  const patience = 60_000 + devices * 500
  const summary: Record<string, unknown> = { devices }

  /** One command of the operator; its JSON. */
  const fleetkey = async (...args: readonly string[]): Promise<unknown> => {
    const { code, stdout, stderr } = await run('fleetkey', [...args, '--data', server, '--json'])
    must(code === 0, `fleetkey ${args.join(' ')}: exit code ${code}: ${stderr}`)
    return stdout.trim() === '' ? null : JSON.parse(stdout)
  }

  say.step('factory: boards with a TPM, firmware and an EK certificate each')
  const made = await run('fleetkey-sim', ['factory', '--out', factory, '--devices', String(devices), '--batch', 'batch-1'])
  must(made.code === 0, `fleetkey-sim factory: ${made.stderr}`)
  const serial = (number: number): string => `GATEWAY-BATCH-1-${String(number).padStart(4, '0')}`
  const idOf = (of: string): string => of.toLowerCase()
  const [impostor, tampered] = [serial(devices - 1), serial(devices)]
  const honest = Array.from({ length: devices - 2 }, (_, index) => serial(index + 1))
  const [alice = '', bob = ''] = honest
  say.fact(`${devices} boards; batch.json and release.json signed by station line-1`)

  say.step('server: first start makes root and issuing CA, the KEK and the first token')
  const listening = Promise.withResolvers<{ mqttPort: number; httpsPort: number }>()
  const running: Service = service({
    program: 'fleetkey',
    args: ['server', 'start', '--data', server, '--mqtt-port', '0', '--https-port', '0', '--attached', '--json'],
    log: join(folder, 'server.log'),
    onLine: (line) => listening.resolve(JSON.parse(line) as { mqttPort: number; httpsPort: number }),
    onEnd: (code) => listening.reject(new Error(`the server ended with ${code}; see ${join(folder, 'server.log')}`)),
  })
  const ports = await listening.promise
  say.fact(`devices mqtts://127.0.0.1:${ports.mqttPort}, operators https://127.0.0.1:${ports.httpsPort}, data in ${server}`)
  await fleetkey('station', 'add', 'line-1', join(factory, 'station.pem'))
  await fleetkey('endorsement', 'import', join(factory, 'ek-ca.pem'), '--test')
  await fleetkey('release', 'import', join(factory, 'release.json'), '--station', 'line-1')
  await fleetkey('batch', 'import', join(factory, 'batch.json'), '--station', 'line-1')
  const bundle = join(folder, 'bundle.json')
  await run('fleetkey', ['server', 'bundle', '--out', bundle, '--data', server])
  say.fact(`batch and reference values imported; the simulator's EK CA is trusted as a TEST endorsement only`)

  say.step('enrolment: attested over MQTT with TLS')
  const enrolling = Date.now()
  const boards: Boards = await startBoards(
    ['--factory', factory, '--bundle', bundle, '--data', join(folder, 'boards'), '--tamper', tampered, '--claim', `${impostor}=${alice}`],
    join(folder, 'boards.log'),
  )
  const connected = (): number => honest.filter((one) => boards.status.get(one)?.connected === true).length
  const everyone = [...honest, impostor, tampered]
  const ticking = setInterval(() => say.progress(`${connected()} of ${honest.length} connected`), 250)
  try {
    const on = boards.ask({ do: 'on', serials: everyone })
    // When the wait below gives up, what becomes of this order is of no interest.
    on.catch(() => undefined)
    await boards.until(`${honest.length} devices connected`, () => connected() === honest.length, patience)
    await boards.until('two boards refused', () => [impostor, tampered].every((one) => boards.status.get(one)?.lastRefusal === 'attestation-failed'), patience)
    await on
  } finally {
    clearInterval(ticking)
  }
  must(
    [impostor, tampered].every((one) => boards.status.get(one)?.device === null),
    'a board that had to be refused has an identity',
  )
  const enrolment = Date.now() - enrolling
  say.fact(`${honest.length} admitted in ${seconds(enrolment)}; 2 refused, told only "attestation-failed". Why, from the server's record:`)
  const refusals: Record<string, string> = {}
  for (const [one, why] of [
    [tampered, 'reference.pcr-4'],
    [impostor, 'manifest.serial-mismatch'],
  ] as const) {
    const { lastRefusal, state } = (await fleetkey('device', 'show', idOf(one))) as { lastRefusal: { reason: string } | null; state: string }
    must(state === 'registered' && lastRefusal?.reason === why, `${one} was refused for ${String(lastRefusal?.reason)}, not ${why}`)
    refusals[idOf(one)] = why
    say.fact(`  ${idOf(one)}  ${why}${one === tampered ? '  (its kernel is not the one of the release)' : `  (claimed to be ${alice})`}`)
  }
  summary['admitted'] = honest.length
  summary['refused'] = refusals
  summary['enrolmentSeconds'] = enrolment / 1000

  say.step('keys: telemetry (sealed) and command-auth (inside each TPM), granted to a group')
  await fleetkey('group', 'create', 'plant')
  await fleetkey('group', 'add', 'plant', '--batch', 'batch-1')
  await fleetkey('key', 'create', 'telemetry', '--protection', 'sealed', '--recipient-usage', '2s')
  await fleetkey('key', 'create', 'command-auth', '--protection', 'tpm')
  await fleetkey('key', 'grant', 'telemetry', 'plant')
  await fleetkey('key', 'grant', 'command-auth', 'plant')
  const using = (key: string, epoch: number, of: readonly string[]): boolean => of.every((one) => boards.status.get(one)?.current[key] === epoch)
  await boards.until('every device uses both keys', () => using('telemetry', 1, honest) && using('command-auth', 1, honest), patience)
  say.fact(`${honest.length} devices have opened both in their TPM and proven it`)

  say.step(`exchange: ${idOf(alice)} to ${idOf(bob)} through the plant's own plain MQTT broker`)
  const plant = await startPlant()
  const text = 'pressure 4.2 bar'
  const sealed = (await boards.ask({ do: 'encrypt', serial: alice, key: 'telemetry', data: base64(text) })) as { data: string }
  const arrived = await plant.carry(Buffer.from(sealed.data, 'base64'))
  const opened = (await boards.ask({ do: 'decrypt', serial: bob, key: 'telemetry', data: arrived.toString('base64') })) as { data: string }
  must(Buffer.from(opened.data, 'base64').toString() === text, 'the message did not open to what was sent')
  const command = 'valve 7 close'
  const tag = (await boards.ask({ do: 'mac', serial: alice, key: 'command-auth', data: base64(command) })) as { mac: string; epoch: number }
  const heard = await plant.carry(Buffer.concat([Buffer.from(tag.mac, 'base64'), Buffer.from(command)]))
  const check = { do: 'verify', serial: bob, key: 'command-auth', epoch: tag.epoch, mac: heard.subarray(0, 32).toString('base64') }
  const genuine = (await boards.ask({ ...check, data: heard.subarray(32).toString('base64') })) as { valid: boolean }
  const forged = (await boards.ask({ ...check, data: base64('valve 7 open') })) as { valid: boolean }
  must(genuine.valid && !forged.valid, 'the command was not told from a forged one')
  must(plant.seen.length === 2 && !plant.seen[0]?.includes(text), 'the broker saw the message in the clear')
  await plant.stop()
  say.fact(`"${text}" arrived and was opened; the broker saw ${arrived.length} bytes of ciphertext`)
  say.fact(`"${command}" verified, a forged command did not`)

  const away = honest.slice(-3)
  say.step(`rotation of telemetry in waves of 20 % and the rest, while ${away.map(idOf).join(', ')} are switched off`)
  await boards.ask({ do: 'off', serials: away })
  const deadline = 4_000 + devices * 60
  let campaign: Campaign | undefined
  let shown = ''
  const rotating = Date.now()
  const rotated = await run(
    'fleetkey',
    ['key', 'rotate', 'telemetry', '--waves', '0.2,1', '--success-threshold', '0.9', '--deadline', `${deadline}ms`, '--watch', '--data', server, '--json'],
    (line) => {
      campaign = JSON.parse(line) as Campaign
      const { state, wave, waves, counts } = campaign
      const stages = Object.entries(counts)
        .filter(([, count]) => count > 0)
        .map(([stage, count]) => `${stage} ${count}`)
        .join(', ')
      say.progress(`${state} wave ${wave + 1}/${waves}: ${stages}`)
      if (`${state} ${wave}` !== shown) say.fact(`${seconds(Date.now() - rotating).padStart(6)}  ${state.padEnd(10)} wave ${wave + 1}/${waves}: ${stages}`)
      shown = `${state} ${wave}`
    },
  )
  must(rotated.code === 4 && campaign !== undefined, `the rotation ended with ${rotated.code}, not as partial: ${rotated.stderr}`)
  const { id = '', counts: afterwards = {} } = campaign ?? {}
  // Whoever lost its connection meanwhile has erased the old epoch already.
  const proven = (afterwards['active'] ?? 0) + (afterwards['retired'] ?? 0)
  must(proven === honest.length - 3 && afterwards['timed-out'] === 3, `not as expected: ${JSON.stringify(afterwards)}`)
  must(using('telemetry', 2, honest.slice(0, -3)), 'a device says it does not use epoch 2')
  say.fact(`${honest.length - 3} devices have used epoch 2; 3 are counted as timed out, not as done`)
  summary['rotationSeconds'] = (Date.now() - rotating) / 1000

  say.step('they come back, and converge')
  const returning = Date.now()
  await boards.ask({ do: 'on', serials: away })
  await boards.until('the three use epoch 2', () => using('telemetry', 2, away), patience)
  say.fact(`epoch 2 in use on all three after ${seconds(Date.now() - returning)}`)
  const retired = await run('fleetkey', ['campaign', 'watch', id, '--retired', '--for', '60s', '--data', server, '--json'])
  must(retired.code === 0, `the rotation did not end well (${retired.code}): ${retired.stderr}`)
  const { epochs } = (await fleetkey('key', 'show', 'telemetry')) as { epochs: readonly { epoch: number; state: string }[] }
  must(epochs.some(({ epoch, state }) => epoch === 1 && state === 'destroyed') && epochs.length === 2, `epoch 1 is not destroyed: ${JSON.stringify(epochs)}`)
  say.fact(`all ${honest.length} have retired epoch 1; the server has destroyed it`)
  summary['converged'] = true

  say.step(`revocation of ${idOf(bob)}`)
  const others = honest.filter((one) => one !== bob)
  await fleetkey('device', 'revoke', idOf(bob), '--reason', 'stolen')
  await boards.until('its session is closed', () => boards.status.get(bob)?.connected === false, patience)
  const { items } = { items: (await fleetkey('audit', 'list', '--subject', idOf(bob), '--limit', '1000')) as readonly { action: string; at: number }[] }
  const revokedAt = items.find(({ action }) => action === 'device.revoke')?.at
  const cut = (boards.lostAt.get(bob) ?? 0) - (revokedAt ?? Number.NaN)
  say.fact(`its session was closed ${cut} ms after the revocation was durable`)
  await boards.until('the others use epoch 3', () => using('telemetry', 3, others) && using('command-auth', 2, others), patience)
  await boards.until('it is refused', () => boards.status.get(bob)?.lastRefusal !== null, patience)
  const next = (await boards.ask({ do: 'encrypt', serial: alice, key: 'telemetry', data: base64('pressure 4.4 bar') })) as { data: string; epoch: number }
  const read = await boards.ask({ do: 'decrypt', serial: bob, key: 'telemetry', data: next.data }).catch((thrown: unknown) => thrown)
  must(next.epoch === 3 && read instanceof BoardRefused && read.code === 'not-found', 'the revoked device has read a message of the next epoch')
  const still = (await boards.ask({ do: 'decrypt', serial: honest[2] ?? '', key: 'telemetry', data: next.data })) as { data: string }
  must(Buffer.from(still.data, 'base64').toString() === 'pressure 4.4 bar', 'an admitted device could not read epoch 3')
  say.fact(`both keys were rotated: ${others.length} devices use the new epochs, the revoked one cannot read them and may not connect`)
  summary['sessionCutMilliseconds'] = cut

  say.step('audit: exported and derived again, offline')
  const log = join(folder, 'audit.jsonl')
  must((await run('fleetkey', ['audit', 'export', '--out', log, '--data', server])).code === 0, 'the audit log could not be exported')
  const verdict = (await fleetkey('audit', 'verify', log)) as { ok: boolean; entries: number }
  must(verdict.ok, 'the audit log is not authentic')
  say.fact(`${verdict.entries} entries: hash chain, tree and signed checkpoint agree`)
  summary['auditEntries'] = verdict.entries

  await boards.stop()
  must((await running.stop()) === 0, 'the server did not stop in order')
  const took = Date.now() - say.started
  summary['seconds'] = took / 1000
  summary['ok'] = true
  say.step(`all of it happened: ${honest.length} enrolled, 2 refused, 1 rotation proven by use, 1 device revoked, ${verdict.entries} audit entries`)
  return summary
}

const optionsOf = (): Options => {
  const { values } = parseArgs({ options: { devices: { type: 'string', default: '25' }, data: { type: 'string' }, json: { type: 'boolean', default: false } } })
  const devices = Number(values.devices)
  if (!Number.isInteger(devices) || devices < least || devices > 10_000) throw new Error(`--devices takes a whole number from ${least} to 10000`)
  if (values.data === undefined) return { devices, folder: mkdtempSync(join(tmpdir(), 'fleetkey-demo-')), json: values.json }
  const folder = resolve(values.data)
  if (existsSync(folder) && readdirSync(folder).length > 0) throw new Error(`${folder} is not empty`)
  mkdirSync(folder, { recursive: true, mode: 0o700 })
  return { devices, folder, json: values.json }
}

let options: Options
try {
  options = optionsOf()
} catch (error) {
  process.stderr.write(`demo: ${error instanceof Error ? error.message : String(error)}\n${usage}\n`)
  process.exit(1)
}
const keep = process.argv.some((word) => word.startsWith('--data'))
const remove = (): void => {
  if (!keep) rmSync(options.folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 50 })
}
// Nothing that it has started stays, and no folder that nobody has asked for. Killed with -9 it leaves the folder only: its processes end with it.
let interrupted = false
for (const signal of ['SIGINT', 'SIGTERM'] as const)
  process.once(signal, () => {
    interrupted = true
    void stopAll().then(() => {
      remove()
      process.exit(130)
    })
  })
try {
  const summary = await demo(options)
  if (options.json) process.stdout.write(`${JSON.stringify(summary)}\n`)
  if (keep) process.stderr.write(`data kept in ${options.folder}\n`)
  remove()
  process.exitCode = 0
} catch (error) {
  // Its programs end under it: that is no news.
  if (interrupted) await new Promise(() => undefined)
  const why = error instanceof Error ? error.message : String(error)
  if (options.json) process.stdout.write(`${JSON.stringify({ ok: false, why })}\n`)
  process.stderr.write(`\ndemo failed: ${why}\nlogs and data: ${options.folder} (server.log, boards.log)\n`)
  process.exitCode = 1
} finally {
  await stopAll()
}
