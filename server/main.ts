#!/usr/bin/env node
import { existsSync, readFileSync } from 'node:fs'
import type { AddressInfo, Server } from 'node:net'
import { join } from 'node:path'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { refusalCounter } from './access/refusals.ts'
import { alertService } from './api/alerts.ts'
import { adminHandlers, adminStreams, currentCheckpoint, type ServerFacts } from './api/admin/handlers.ts'
import { adminServer, type Served } from './api/admin/router.ts'
import { sealHandlers } from './api/admin/seal.ts'
import { embeddedBus, type EmbeddedBus } from './api/broker/embedded.ts'
import { clock } from './api/clock.ts'
import { deviceHandler } from './api/device.ts'
import { estServer, type EstServer } from './api/est.ts'
import { statusPlaces, statusService, type StatusService } from './api/status.ts'
import type { Deadline } from './ca/alerts.ts'
import { checkProfiles } from './ca/check-profiles.ts'
import { profilesOf } from './ca/profile-settings.ts'
import { readSettings, SettingsError, type Settings } from './config.ts'
import { openDataFolder } from './data-folder.ts'
import { approveReleases } from './flows/approvals.ts'
import { openAuthority, serverTls } from './flows/authority.ts'
import { ownCertificates } from './flows/calendar.ts'
import { admitConnection } from './flows/connect.ts'
import type { Base, Context, SealStatus } from './flows/context.ts'
import { sweepEnrolments } from './flows/enrol.ts'
import { firstToken } from './flows/first-token.ts'
import { sweepIntents } from './flows/issue.ts'
import { liveSessions } from './flows/sessions.ts'
import { isDue } from './flows/own-certificates.ts'
import { perform } from './flows/perform.ts'
import { settleAll } from './flows/settle.ts'
import { removeSuperseded } from './flows/superseded.ts'
import { openVault } from './flows/vault.ts'
import { replaceFile } from './kms/durable.ts'
import type { Backend } from './kms/orders.ts'
import { startKms } from './kms/supervisor.ts'
import { systemRandom } from './random.ts'
import { openSealing } from './sealing.ts'
import { openSqliteStore } from './store/sqlite.ts'
import { diskRoom } from './store/sqlite/disk.ts'

const version = '0.1.0'
type AdminServer = ReturnType<typeof adminServer>
/** Seconds between the reports of a device that stays connected. */
const reportEvery = 300
const minute = 60_000

export interface RunningServer {
  readonly mqttPort: number
  readonly httpsPort: number
  /** Of revocation lists and OCSP; null when they are not offered. */
  readonly httpPort: number | null
  /** Of EST; null when it is not offered. */
  readonly estPort: number | null
  /** Where the first operator's token is. */
  readonly cliFile: string
  stop(): Promise<void>
}

/** What a test or a fault run puts in the place of the real thing. */
export interface Surroundings {
  /** Called at every named durable step. */
  readonly step?: (name: string) => void
  readonly log?: (line: string) => void
  /** Told the process id of each KMS process, which a fault run may end. */
  readonly kmsStarted?: (pid: number) => void
  /** Milliseconds since 1970. */
  readonly now?: () => number
  /** Stands between the broker and everything else. */
  readonly bus?: (bus: EmbeddedBus) => EmbeddedBus
  /** Told that the server waits for what opens its keys. */
  readonly sealed?: (state: SealedServer) => void
  /** Ends that waiting. */
  readonly signal?: AbortSignal
}

/** A server that serves nothing but being unsealed. */
export interface SealedServer {
  readonly httpsPort: number
  readonly reason: string
  /** SHA-256 of the certificate that it shows. */
  readonly fingerprint: string
}

const tokenIn = (path: string): string | undefined => {
  if (!existsSync(path)) return undefined
  try {
    const { token } = JSON.parse(readFileSync(path, 'utf8')) as { token?: unknown }
    return typeof token === 'string' ? token : undefined
  } catch {
    return undefined
  }
}

/**
 * Builds every part and joins them by hand. A first start makes the CA, the KEK and the first token; every start finishes what a crash has left. While what
 * opens the keys is missing only the HTTPS port listens, for that alone. Whatever was started is stopped when something after it fails.
 */
export const startServer = async (settings: Settings, around: Surroundings = {}): Promise<RunningServer> => {
  const step = around.step ?? (() => undefined)
  const log = around.log ?? ((line: string) => void process.stderr.write(`${new Date().toISOString()} ${line}\n`))
  const now = around.now ?? ((): number => Date.now())
  const random = systemRandom()
  const profiles = profilesOf(settings.profiles)
  checkProfiles(profiles, now())
  openDataFolder(settings.data)
  /** Stopped in the opposite order. */
  await using started = new AsyncDisposableStack()
  // The store's lock is what keeps a second process out: it comes first.
  const store = await openSqliteStore(join(settings.data, 'store'), { now, log, step })
  started.defer(async () => await store.close())
  const kms = await startKms({
    folder: join(settings.data, 'kms'),
    backend: settings.backend,
    log,
    step: around.step,
    started: around.kmsStarted,
  })
  started.defer(async () => await kms.close())
  let lastCheckpoint = async (): Promise<void> => await Promise.resolve()
  started.defer(async () => await lastCheckpoint())
  const base: Base = { tenant: settings.tenant, store, kms, refusals: refusalCounter(), now, random, log, step }
  await tenantIs(base)
  const names = [...new Set([...settings.names, ...(settings.host === '0.0.0.0' || settings.host === '::' ? [] : [settings.host])])]
  const sealing = openSealing(settings.data, { tenant: settings.tenant, names, now: now(), random, log })
  const ready: Served['ready'] = () => {
    const keys = kms.health()
    return { ready: false, sealed: keys.sealed, reason: keys.reason ?? 'starting' }
  }
  let served: Served = { handlers: sealHandlers(base, kms.seal), ready }
  let admin: AdminServer | undefined
  let httpsPort: number | undefined
  const listenAdmin = async (tls: { readonly key: string; readonly cert: string }): Promise<number> => {
    const server = adminServer(base, tls, () => served)
    const port = await listen(server, settings.httpsPort, settings.host)
    started.defer(async () => await closed(server))
    admin = server
    return port
  }
  if (kms.health().sealed) {
    httpsPort = await listenAdmin(sealing)
    around.sealed?.({ httpsPort, reason: kms.health().reason ?? '', fingerprint: sealing.fingerprint })
    await kms.opened(around.signal)
  }
  await sweepIntents(base)
  const { statusUrl } = settings
  const places = statusUrl === null ? undefined : (key: string) => statusPlaces(statusUrl, key)
  const authority = await openAuthority(base, { profiles, places })
  const vault = await openVault(base, authority.kek)
  const auditKey = await kms.create('audit-signing', 'audit-signing')
  let tls = await serverTls(base, authority, names)
  const bell = clock()
  const broker = await embeddedBus({
    host: settings.host,
    port: settings.mqttPort,
    tls,
    admit: async (connect) => await admitConnection(ctx, connect),
    now,
    log,
  })
  const bus = around.bus?.(broker) ?? broker
  started.defer(async () => await bus.stop())
  let status: StatusService | undefined
  /** Of the CA that is active now. */
  let est: EstServer | undefined
  const ctx: Context = {
    ...base,
    authority,
    vault,
    bus,
    sessions: liveSessions(),
    recoveries: settings.recoveries,
    wake: bell.wake,
    certificatesChanged(rows) {
      est?.cut(rows)
      status?.changed(rows)
      // Its CONNECT would be refused with a ticket as well: so that nothing rests on that alone.
      if (rows.some((row) => row.status !== 'valid')) bus.forgetTickets()
    },
  }
  const name = settings.names[0] ?? (settings.host === '0.0.0.0' || settings.host === '::' ? 'localhost' : settings.host)
  // Lists name each other by URL: where nobody has said what it is, by one that only tells them apart.
  if (settings.httpPort !== null) {
    const service = statusService(ctx, settings.statusUrl ?? `http://${name}`)
    started.defer(async () => await service.stop())
    status = service
  }
  await sweepEnrolments(ctx)
  await approveReleases(ctx)
  await bus.start(deviceHandler(ctx, { policy: { requireEkCertificate: false }, reportEvery }))
  const renewTls = async (): Promise<void> => {
    const fresh = await serverTls(base, authority, names)
    tls = fresh
    bus.renew(fresh)
    est?.renew(fresh)
    admin?.renew(fresh)
  }
  let signedBy = authority.key
  authority.onChange(async () => {
    bus.forgetTickets()
    if (authority.key === signedBy) return
    await renewTls()
    signedBy = authority.key
  })
  await settleAll(ctx)
  const ticking = bell.start(ctx, {
    'TLS certificate': async () => {
      if (isDue(tls, authority, now())) await renewTls()
    },
    'superseded certificates': async () => await removeSuperseded(ctx, settings.retention),
  })
  started.defer(async () => await ticking.stop())

  const deadlines = async (): Promise<readonly Deadline[]> => [
    ...(await ownCertificates(ctx)),
    { name: 'server', kind: 'tls', begins: tls.notBefore, at: tls.notAfter },
    ...(status?.lists() ?? []).map(({ name: list, thisUpdate, nextUpdate }): Deadline => ({ name: list, kind: 'crl', begins: thisUpdate, at: nextUpdate })),
  ]
  const alerts = alertService(ctx, { ...settings.alerts, deadlines })
  const facts: ServerFacts = {
    version,
    store: 'sqlite',
    kms: spokenKms(settings.backend, await kms.seal.status()),
    seal: kms.seal,
    bundle: () => ({
      server: `mqtts://${name}:${bus.port}`,
      tenant: settings.tenant,
      trust: [toPem('CERTIFICATE', authority.root)],
      chain: [toPem('CERTIFICATE', authority.issuing)],
      keys: Object.values(authority.roles).map(({ certificate }) => toPem('CERTIFICATE', certificate)),
    }),
    certificates: () => [{ name: 'server', notAfter: tls.notAfter }],
    deadlines,
    alerts,
    around: {
      tls: () => tls,
      names,
      lists: () => status?.lists() ?? null,
      statusUrl,
      retention: settings.retention,
      est: () => (settings.estPort === null ? null : { listening: est?.listening === true }),
      webhook: alerts.health,
      disk: () => diskRoom(join(settings.data, 'store')),
    },
    log: { origin: `fleetkey/${settings.tenant}`, key: 'audit-signing', spki: auditKey.spki ?? new Uint8Array() },
  }
  status?.start()
  alerts.start()
  started.defer(async () => await alerts.stop())
  served = {
    handlers: adminHandlers(ctx, facts),
    streams: adminStreams(ctx, facts),
    ready: () => {
      const [{ writable, reason }, keys] = [store.health(), kms.health()]
      return { ready: writable && keys.open && bus.health().listening, sealed: keys.sealed, reason: reason ?? keys.reason }
    },
  }
  // Who is connected has seen the certificate of a sealed server, and shall send no token over that.
  if (httpsPort === undefined) httpsPort = await listenAdmin(tls)
  else {
    admin?.renew(tls)
    admin?.closeIdleConnections()
  }
  const httpPort = status === undefined || settings.httpPort === null ? null : await listen(status.server, settings.httpPort, settings.host)

  const enrolling = settings.estPort === null ? undefined : estServer(ctx, tls)
  est = enrolling
  const estPort = enrolling === undefined || settings.estPort === null ? null : await listen(enrolling, settings.estPort, settings.host)
  if (enrolling !== undefined) started.defer(async () => await closed(enrolling))

  const cliFile = join(settings.data, 'cli.json')
  const writeCli = (token: string): void =>
    replaceFile(
      cliFile,
      Buffer.from(`${JSON.stringify({ server: `https://${name}:${httpsPort}`, token, ca: toPem('CERTIFICATE', authority.root) }, null, 2)}\n`),
    )
  const known = tokenIn(cliFile)
  await firstToken(base, known, writeCli)
  // The ports may have changed since.
  if (known !== undefined) writeCli(known)
  authority.onChange(async () => {
    const token = tokenIn(cliFile)
    if (token !== undefined) writeCli(token)
  })

  const keepCheckpoint = async (): Promise<void> => {
    try {
      replaceFile(join(settings.data, 'checkpoint.txt'), Buffer.from((await currentCheckpoint(ctx, facts.log)).note))
    } catch (thrown) {
      log(`checkpoint: ${toProblem(thrown).message.slice(0, 200)}`)
    }
  }
  lastCheckpoint = keepCheckpoint
  const checkpoints = setInterval(() => void keepCheckpoint(), minute)
  let writable = true
  const alarm = setInterval(() => {
    const health = store.health()
    if (health.writable !== writable) log(health.writable ? 'the store can be written again' : `ALARM: the store is read-only: ${health.reason ?? 'unknown'}`)
    writable = health.writable
  }, 1000)

  started.defer(() => {
    for (const timer of [checkpoints, alarm]) clearInterval(timer)
  })
  const running = started.move()
  return { mqttPort: bus.port, httpsPort, httpPort, estPort, cliFile, stop: async () => await running.disposeAsync() }
}

const closed = async (server: Server & { closeAllConnections(): void }): Promise<void> =>
  await new Promise<void>((resolve) => {
    server.close(() => resolve())
    server.closeAllConnections()
  })

const listen = async (server: Server, port: number, host: string): Promise<number> => {
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(port, host, () => resolve())
  })
  return (server.address() as AddressInfo).port
}

/** A data folder belongs to one tenant for good: its name is in every certificate and ciphertext. */
const tenantIs = async (ctx: Base): Promise<void> => {
  const known = await ctx.store.get('setting', 'tenant')
  const name = known === undefined ? undefined : new TextDecoder().decode(known.value)
  if (name !== undefined && name !== ctx.tenant) throw new SettingsError(`this data folder belongs to tenant ${name}, not ${ctx.tenant}`)
  if (name !== undefined) return
  await perform(ctx, { caller: { kind: 'system', id: 'setup', from: 'server' }, action: 'server.setup', subject: `tenant ${ctx.tenant}` }, (tx) =>
    tx.insert('setting', { id: 'tenant', value: new TextEncoder().encode(ctx.tenant) }),
  )
  ctx.step('setup.tenant')
}

/** The process: one line when ready (JSON with --json), orderly stop on SIGINT and SIGTERM, with --attached also at the end of standard input. Exit code 1 for a wrong setting, 5 when it cannot start. */
export const runServer = async (argv: readonly string[], around: Surroundings = {}): Promise<void> => {
  // Whatever it makes, database and its journal included, is for its own user alone.
  process.umask(0o077)
  let settings: Settings
  let running: RunningServer | undefined
  const stopped = new AbortController()
  const end = (): void => {
    running?.stop().then(
      () => process.exit(0),
      (thrown: unknown) => {
        process.stderr.write(`fleetkey server: ${readable(thrown)}\n`)
        process.exit(5)
      },
    )
  }
  const stop = (): void => {
    // While it starts, only the waiting for what opens the keys is cut short; what has started is stopped.
    if (stopped.signal.aborted) return
    stopped.abort()
    end()
  }
  process.on('SIGINT', stop)
  process.on('SIGTERM', stop)
  try {
    settings = readSettings(argv, process.env)
    if (settings.attached) for (const event of ['end', 'error'] as const) process.stdin.resume().once(event, stop)
    running = await startServer(settings, { sealed: (state) => saySealed(settings, state), signal: stopped.signal, ...around })
  } catch (thrown) {
    if (stopped.signal.aborted && thrown === stopped.signal.reason) process.exit(0)
    const usage = thrown instanceof SettingsError
    const [message, exit] = usage ? [thrown.message, 1] : [readable(thrown), 5]
    const error = { code: usage ? 'usage' : toProblem(thrown).code, message }
    process.stderr.write(argv.includes('--json') ? `${JSON.stringify({ error, exit })}\n` : `fleetkey server: ${message}\n`)
    process.exit(exit)
  }
  const { mqttPort, httpsPort, httpPort, estPort, cliFile } = running
  if (settings.json) process.stdout.write(`${JSON.stringify({ ready: true, mqttPort, httpsPort, httpPort, estPort, data: settings.data, cli: cliFile })}\n`)
  else
    process.stdout.write(
      [
        `fleetkey ${version}: ready`,
        `  devices    mqtts://${settings.host}:${mqttPort}`,
        `  operators  https://${settings.host}:${httpsPort}`,
        ...(httpPort === null ? [] : [`  status     http://${settings.host}:${httpPort} (revocation lists, OCSP)`]),
        ...(estPort === null ? [] : [`  EST        https://${settings.host}:${estPort}/.well-known/est/`]),
        `  data       ${settings.data} (store/, kms/)`,
        `  KEK        ${kekPlace(settings)}`,
        `  token      ${cliFile} (the first operator's; keep it, mode 0600)`,
        '',
      ].join('\n'),
    )
  if (stopped.signal.aborted) end()
}

const saySealed = (settings: Settings, { httpsPort, reason, fingerprint }: SealedServer): void => {
  const copy = join(settings.data, 'sealing.crt')
  process.stdout.write(
    settings.json
      ? `${JSON.stringify({ ready: false, sealed: true, httpsPort, reason, data: settings.data, certificate: copy })}\n`
      : [
          `fleetkey ${version}: ${reason}`,
          `  unseal     fleetkey seal unseal --server https://${settings.host}:${httpsPort} --sealing ${copy} < SHARE`,
          `  shows      the certificate in ${copy}, SHA-256 ${fingerprint}`,
          `  waits      for that, and for what is missing to come`,
          '',
        ].join('\n'),
  )
}

/** Where the keys are, and every way that opens them: `file, key file`, `file, passphrase, shares`. */
const spokenKms = (backend: Backend, { ways, sets }: SealStatus): string => {
  if (backend.kind === 'pkcs11') return `PKCS#11, token ${backend.token}`
  if (backend.kind === 'aws') return `AWS KMS, ${backend.region}`
  return ['file', ...ways.map((way) => (way === 'file' ? 'key file' : 'passphrase')), ...(sets.length === 0 ? [] : ['shares'])].join(', ')
}

const kekPlace = ({ backend, data }: Settings): string => {
  if (backend.kind === 'pkcs11') return `token ${backend.token} (pkcs11)`
  if (backend.kind === 'aws') return `AWS KMS, ${backend.region}`
  return backend.passphraseFile === null ? join(data, 'kms', 'master.key') : 'from your passphrase'
}

const readable = (thrown: unknown): string => {
  // The system's refusals (a port in use, a folder that may not be written) say it in one line; a stack would only hide it.
  if (thrown instanceof Error && 'syscall' in thrown) return thrown.message
  const problem = toProblem(thrown)
  return problem.code === 'internal' && problem.reason === undefined
    ? problem.message
    : `${problem.message}${problem.reason === undefined ? '' : ` (${problem.reason})`}`
}

if (import.meta.main) await runServer(process.argv.slice(2))
