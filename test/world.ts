import { createHash, generateKeyPairSync, randomBytes } from 'node:crypto'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createClient, type Client } from '@fleetkey/cli/client.ts'
import { startAgent, type Agent } from '@fleetkey/device-agent/agent.ts'
import { openBoundKeys } from '@fleetkey/device-agent/bound-keys.ts'
import { trustOfBundle, type PasswordFiles, type Settings } from '@fleetkey/device-agent/config.ts'
import { openDocument } from '@fleetkey/device-agent/files.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { softwareSecureElement, type SecureElement } from '@fleetkey/device-agent/secure-element.ts'
import { identityStore, type Identity } from '@fleetkey/device-agent/identity.ts'
import { createBoard, install, type Board } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { startKernel } from '@fleetkey/firmware-sim/board/ima.ts'
import { ekCertificate, makeEkCa, type EkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import type { MakerCa } from '@fleetkey/firmware-sim/factory/certificate.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { detachedSignature, manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import {
  buildRelease,
  measurementsOf,
  referenceValues,
  separatorData,
  simulatedImages,
  stages,
  systemFiles,
  type Release,
  type StageName,
} from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import type { Bundle } from '@fleetkey/protocol/admin.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'
import { readSettings } from '@fleetkey/server/config.ts'
import { startServer, type RunningServer } from '@fleetkey/server/main.ts'
import { alg, ekCertificateIndex, handle } from '@fleetkey/tpm2/constants.ts'
import { eventType, marshalEventLog, replay, type Event } from '@fleetkey/tpm2/event-log.ts'
import { imaPcr } from '@fleetkey/tpm2/ima.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { supervise } from './faults/supervised.ts'
import { startSwtpm } from './swtpm.ts'

export const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const now = (): number => Date.now()

/** Waits for a condition; throws with what was missing. */
export const until = async (what: string, holds: () => boolean | Promise<boolean>, patience = 20_000): Promise<void> => {
  const end = Date.now() + patience
  while (!(await holds())) {
    if (Date.now() > end) throw new Error(`within ${patience / 1000} s: ${what}`)
    await new Promise((resolve) => void setTimeout(resolve, 20))
  }
}

/** A machine that an agent can run on: a TPM, personalised and measured, and its event log. */
export interface Machine {
  readonly serial: string
  /** TPMT_PUBLIC of the EK. */
  readonly ek: Uint8Array
  openTpm(): Promise<Transport>
  eventLog(): Uint8Array
  /** The kernel's list of measured files, where there is one. */
  imaList?(): Uint8Array
  stop(): Promise<void>
}

/** A machine without a TPM: with a secure element, or with no key of its own. */
export interface PlainMachine {
  readonly serial: string
  /** SPKI of the IDevID key. */
  readonly idevid?: Uint8Array
  readonly element?: SecureElement
}

const isPlain = (machine: Machine | PlainMachine): machine is PlainMachine => !('openTpm' in machine)

const release = (model: string, name = '1.0.0', number = 1): Release =>
  buildRelease({ model, name, number }, simulatedImages(`${model}/${name}`, new TextEncoder().encode('agent')))

const digestsOf = (images: Release['images']): Readonly<Record<StageName, Uint8Array>> =>
  Object.fromEntries(stages.map(({ stage }) => [stage, new Uint8Array(createHash('sha256').update(images[stage]).digest())])) as unknown as Readonly<
    Record<StageName, Uint8Array>
  >

/** A board of the simulator. */
const simulated = async (serial: string, ca: EkCa, of: Release): Promise<Machine & { readonly board: Board }> => {
  const tpm = createSoftwareTpm({ random, now })
  const ek = await personalise(tpm, ca, { random, now: now() })
  const board = createBoard({ serial, tpm, flash: new Flash() })
  install(board, of)
  board.boot()
  return {
    serial,
    ek,
    board,
    openTpm: async () => board.transport(),
    eventLog: () => board.eventLog(),
    imaList: () => board.imaList(),
    stop: async () => undefined,
  }
}

/** The same on swtpm: the EK certificate is written as a factory would, the boot is measured by extending its PCRs. */
const onSwtpm = async (serial: string, ca: EkCa, of: Release): Promise<Machine & { readonly spec: string; readonly tcti: string }> => {
  const running = await startSwtpm()
  const transport = await openTransport(running.spec)
  const tpm = new Tpm(transport, { random })
  const ek = await tpm.createPrimary(handle.endorsement, templates.ekEcc)
  await tpm.flush(ek.handle)
  await tpm.nvStore(ekCertificateIndex.ecc, ekCertificate(ca, spkiOf(ek.public), now()))
  const events: Event[] = []
  for (const { pcr, kind, digest, description } of measurementsOf(digestsOf(of.images))) {
    await tpm.pcrExtend(pcr, [{ hash: alg.sha256, digest }])
    const data = kind === 'separator' ? separatorData : new TextEncoder().encode(description)
    events.push({ pcr, type: kind === 'separator' ? eventType.separator : eventType.postCode, digests: new Map([[alg.sha256, digest]]), data })
  }
  const measured: Uint8Array[] = []
  const kernel = startKernel(replay(events, alg.sha256), (_pcr, digest) => void measured.push(digest))
  for (const { path, stage } of systemFiles) kernel.measure(path, of.images[stage])
  for (const digest of measured) await tpm.pcrExtend(imaPcr, [{ hash: alg.sha256, digest }])
  await tpm.close()
  await transport.close()
  const log = marshalEventLog(events)
  return {
    serial,
    ek: ek.public,
    spec: running.spec,
    tcti: running.tcti,
    openTpm: async () => await openTransport(running.spec),
    eventLog: () => log,
    imaList: () => kernel.list(),
    stop: running.stop,
  }
}

/** The server in a process of its own: of many connections, only their one end counts against what this process may open. */
const serverApart = async (args: readonly string[], fault: NodeJS.ProcessEnv, lines: string[]): Promise<RunningServer> => {
  let ready: Omit<RunningServer, 'cliFile' | 'stop'> & { readonly cli: string } = { mqttPort: 0, httpsPort: 0, httpPort: null, estPort: null, cli: '' }
  const process_ = await supervise({
    script: './server-process.ts',
    args: [...args, '--json'],
    fault,
    isReady: (line) => line.startsWith('{"ready":true'),
    onLine: (line) => void (line.startsWith('{"ready":true') && (ready = JSON.parse(line) as typeof ready)),
    onError: (text) => void lines.push(text),
  })
  return { ...ready, cliFile: ready.cli, stop: process_.stop }
}

/** One server with its operator, and what a factory needs to give it devices. */
export interface World {
  readonly folder: string
  readonly server: RunningServer
  readonly client: Client
  readonly bundle: Bundle
  readonly lines: string[]
  simulated(serial: string): Promise<Machine & { readonly board: Board }>
  onSwtpm(serial: string): Promise<Machine & { readonly spec: string; readonly tcti: string }>
  /** A board with a secure element whose maker's CA is imported when it is first needed. */
  withSecureElement(serial: string): Promise<PlainMachine>
  /** The CA of the secure elements. */
  readonly idevidCa: MakerCa
  /** Imports a signed batch of these machines, and puts them into a group. The name of the batch. */
  enlist(machines: readonly (Machine | PlainMachine)[], group: string): Promise<string>
  /** A token for a board of this batch. */
  token(batch: string, of?: { readonly device?: string; readonly validFor?: number }): Promise<string>
  /** Where an agent looks for its token. */
  tokenFile(machine: PlainMachine): string
  /** Runs an agent on a machine; ended with the world. */
  agent(
    machine: Machine | PlainMachine,
    of?: {
      /** The token that is laid beside a machine without a key of its own. */
      readonly token?: string
      readonly serial?: string
      readonly outputs?: Settings['outputs']
      readonly socket?: string
      readonly tpmAuth?: PasswordFiles
      /** What its clock shows, milliseconds since 1970. */
      readonly now?: () => number
      /** Nobody answers where it looks for its server. */
      readonly offline?: boolean
      /** Called at every named durable step. */
      readonly step?: (name: string) => void
    },
  ): Agent
  /** Builds another release of the boards' firmware. */
  build(name: string, number: number): Release
  /** `files`: hex SHA-256 of files that may run under it, besides its own. */
  importRelease(release: Release, files?: readonly string[]): Promise<void>
  /** Ends the server process's work and starts it again on the same data and ports. */
  restart(): Promise<void>
  stop(): Promise<void>
}

/** Starts a server on a temporary folder, with a station, a test endorsement and a release imported. */
export const openWorld = async (
  of: {
    readonly step?: (name: string) => void
    readonly kmsStarted?: (pid: number) => void
    readonly folder?: string
    readonly args?: readonly string[]
    /** Environment of the server; empty unless told. */
    readonly env?: NodeJS.ProcessEnv
    readonly now?: () => number
    readonly bus?: (bus: EmbeddedBus) => EmbeddedBus
    /** In a process of its own; what is put around a server does not reach it there. */
    readonly apart?: boolean
    /** For a server apart: where it is killed (faults/kill-at.ts); it is started again, on ports that `args` has to fix. */
    readonly fault?: NodeJS.ProcessEnv
  } = {},
): Promise<World> => {
  const folder = of.folder ?? mkdtempSync(join(tmpdir(), 'fk-world-'))
  const lines: string[] = []
  const start = async (mqtt: number, https: number): Promise<RunningServer> => {
    const args = ['--data', join(folder, 'server'), '--mqtt-port', String(mqtt), '--https-port', String(https), ...(of.args ?? [])]
    if (of.apart === true) return await serverApart(args, of.fault ?? {}, lines)
    return await startServer(readSettings(args, of.env ?? {}), {
      log: (line) => void lines.push(line),
      ...(of.step === undefined ? {} : { step: of.step }),
      ...(of.kmsStarted === undefined ? {} : { kmsStarted: of.kmsStarted }),
      ...(of.now === undefined ? {} : { now: of.now }),
      ...(of.bus === undefined ? {} : { bus: of.bus }),
    })
  }
  let server = await start(0, 0)
  const connection = JSON.parse(readFileSync(server.cliFile, 'utf8')) as { server: string; token: string; ca: string }
  let client = createClient(connection)
  const ca = makeEkCa(now())
  const idevidCa = makeIdevidCa(now())
  let idevidTrusted: Promise<unknown> | undefined
  const station = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const model = 'gateway'
  const firmware = release(model)
  const signed = (content: string) => ({
    content: Buffer.from(content).toString('base64'),
    signature: detachedSignature(content, station.privateKey).trim(),
    station: 'line-1',
  })
  await client.call('station.add', { body: { id: 'line-1', publicKey: station.publicKey.export({ format: 'pem', type: 'spki' }) as string } })
  await client.call('endorsement.import', { body: { certificate: toPem('CERTIFICATE', ca.certificate), test: true } })
  await client.call('release.import', { body: signed(referenceValues(firmware.manifest)) })
  const bundle = await client.call('bundle')
  const tokenFile = ({ serial }: PlainMachine): string => join(folder, 'agents', `${serial}.token`)
  const machines: Machine[] = []
  const agents: Agent[] = []
  let batches = 0
  return {
    folder,
    get server() {
      return server
    },
    get client() {
      return client
    },
    bundle,
    lines,
    async simulated(serial) {
      const machine = await simulated(serial, ca, firmware)
      machines.push(machine)
      return machine
    },
    async onSwtpm(serial) {
      const machine = await onSwtpm(serial, ca, firmware)
      machines.push(machine)
      return machine
    },
    idevidCa,
    async withSecureElement(serial) {
      idevidTrusted ??= client.call('endorsement.import', { body: { certificate: toPem('CERTIFICATE', idevidCa.certificate), test: true, for: 'idevid' } })
      await idevidTrusted
      const { key, spki, certificate } = makeElement(idevidCa, serial, now())
      return { serial, idevid: spki, element: softwareSecureElement(key, [certificate]) }
    },
    async token(batch, { device, validFor = 3_600_000 } = {}) {
      const { tokens } = await client.call('token.create', { body: { batch, validFor, ...(device === undefined ? {} : { device: DeviceId.parse(device) }) } })
      return tokens[0]?.token ?? ''
    },
    tokenFile,
    async enlist(enlisted, group) {
      const batch = `batch-${++batches}`
      const body = { ...signed(manifestJson({ batch, model, station: 'line-1' }, enlisted)), format: 'json' as const }
      await client.call('batch.import', { body })
      if (batches === 1 || (await client.call('group.list')).items.every(({ id }) => id !== group)) await client.call('group.create', { body: { id: group } })
      await client.call('group.add', { params: { id: group }, body: { batch } })
      return batch
    },
    agent(machine, with_ = {}) {
      const data = join(folder, 'agents', machine.serial)
      mkdirSync(data, { recursive: true })
      const settings: Settings = {
        ...trustOfBundle({ ...bundle, server: `mqtts://127.0.0.1:${with_.offline === true ? 1 : server.mqttPort}` }),
        data,
        tpm: isPlain(machine) ? null : 'in-process',
        ...(isPlain(machine) && machine.element === undefined ? { token: tokenFile(machine) } : {}),
        ...(with_.tpmAuth === undefined ? {} : { tpmAuth: with_.tpmAuth }),
        serial: with_.serial ?? machine.serial,
        eventLog: null,
        socket: with_.socket === undefined ? null : { path: with_.socket, owner: { mode: 0o660 } },
        outputs: with_.outputs ?? [],
      }
      if (isPlain(machine) && with_.token !== undefined) writeFileSync(tokenFile(machine), `${with_.token}\n`, { mode: 0o600 })
      const hardware = isPlain(machine)
        ? machine.element === undefined
          ? {}
          : { secureElement: machine.element }
        : {
            openTpm: machine.openTpm,
            readEventLog: async () => machine.eventLog(),
            ...(machine.imaList === undefined
              ? {}
              : {
                  readImaList: async function* () {
                    yield machine.imaList?.() ?? new Uint8Array(0)
                  },
                }),
          }
      const agent = startAgent({
        settings,
        ...hardware,
        files: nodeFileSystem,
        now: with_.now ?? now,
        random,
        log: (line) => void lines.push(`${machine.serial}: ${line}`),
        step: with_.step ?? (() => undefined),
      })
      agents.push(agent)
      return agent
    },
    build: (name, number) => release(model, name, number),
    importRelease: async (of, files) => void (await client.call('release.import', { body: signed(referenceValues(of.manifest, files)) })),
    async restart() {
      const { mqttPort, httpsPort } = server
      await server.stop()
      server = await start(mqttPort, httpsPort)
      client.close()
      client = createClient(connection)
    },
    async stop() {
      for (const agent of agents) await agent.stop()
      for (const machine of machines) await machine.stop()
      client.close()
      await server.stop()
      // What an agent was writing when it ended may come into its folder once more.
      rmSync(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 50 })
    },
  }
}

/** Every holding of this key at its newest epoch is active. */
export const using = (agents: readonly Agent[], key: string, epoch: number): boolean => agents.every((agent) => agent.status().current[key] === epoch)

/** What lies encrypted on a device's disk, opened with its own TPM. Its agent must have stopped. */
export const storedIdentity = async (world: World, machine: Machine): Promise<Identity> => {
  const transport = await machine.openTpm()
  const folder = join(world.folder, 'agents', machine.serial)
  const document = (name: string) => openDocument({ files: nodeFileSystem, folder, name, step: () => undefined })
  const options = { blobs: document('tpm-keys'), approvals: document('approvals'), step: () => undefined, log: () => undefined }
  const bound = await openBoundKeys({ tpm: new Tpm(transport, { random }), ...options })
  const [pair] = bound.pairs
  const storage = pair === undefined ? undefined : await bound.open(pair)
  if (storage === undefined) throw new Error(`${machine.serial} is locked`)
  const store = identityStore({
    document: document('identity'),
    storage,
    tenant: world.bundle.tenant,
    random,
    onLoss: (why) => {
      throw new Error(why)
    },
  })
  const identity = await store.load()
  await bound.keys.close()
  await transport.close()
  if (identity === undefined) throw new Error(`${machine.serial} has no identity`)
  return identity
}
