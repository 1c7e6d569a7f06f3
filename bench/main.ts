// Figures, each as a ratio to a floor measured in the same run: `npm run bench -- [NAME]… [--devices N] [--members N] [--json]`.
import { createPublicKey, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import type { Client } from '@fleetkey/cli/client.ts'
import { trustOfBundle } from '@fleetkey/device-agent/config.ts'
import { simulatedFiles } from '@fleetkey/firmware-sim/board/files.ts'
import { createBoard, install } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeBatch, type Batch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { detachedSignature, manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { referenceValues } from '@fleetkey/firmware-sim/release/release.ts'
import { openFleet, type Fleet } from '@fleetkey/firmware-sim/fleet/fleet.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { defaultProfiles } from '@fleetkey/server/ca/profiles.ts'
import { certificateOf, tbsOf } from '@fleetkey/server/ca/tbs.ts'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { installPrograms } from '../test/judges.ts'
import { around } from './around.ts'
import { measureAtSize, perDevice } from './at-size.ts'
import { cpuOf, memoryOf } from './cpu.ts'
import { measureFloor, type Floor } from './floor.ts'
import { measureEvidence } from './evidence.ts'
import { measureEvictionFlow } from './evict-flow.ts'
import { measureEviction, measureNaive } from './eviction.ts'
import { measureInventory } from './inventory.ts'
import { measureLedger } from './ledger.ts'
import { boundOf, measureIssuance } from './issuance.ts'
import { measureAnswers, measureLists, measureRevocation, median } from './revocation.ts'
import { openLiveFleet } from './live-fleet.ts'
import { measureMosquitto } from './mosquitto.ts'
import { measureListPauses, measurePauses } from './pause.ts'
import { measureRotation } from './rotation.ts'
import { startServer, until } from './server.ts'
import { measureSoftHsm } from './softhsm.ts'
import { measureSoftwareTpm } from './software-tpm.ts'
import { measureWraps } from './wraps.ts'
import { measureStorms } from './storm.ts'
import { measureWireBytes } from './wire-bytes.ts'

const names = [
  'enrolment',
  'start',
  'rotation',
  'storm',
  'memory',
  'software-tpm',
  'evidence',
  'issuance',
  'revocation',
  'crl',
  'ocsp',
  'inventory',
  'ledger',
  'eviction',
  'wraps',
  'pause',
  'softhsm',
] as const
type Name = (typeof names)[number]

interface Figure {
  readonly bench: Name
  readonly metric: string
  readonly value: number
  readonly unit: string
  readonly floor?: number
  readonly ratio?: number
}

const { random, now } = around
const rounded = (value: number): number => Number(value.toPrecision(4))

/** A self-signed pair, as TLS needs it for the floor: the same key type and profile as the real ones. */
const pair = (profile: 'server-tls' | 'device-tls'): { key: string; cert: string } => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const issuer = { subject: nameOf('floor'), spki, until: Infinity }
  const order = { profile, subject: 'floor', spki, ...(profile === 'server-tls' ? { names: ['localhost'] } : {}) }
  const tbs = tbsOf(defaultProfiles[profile], order, issuer, {
    tenant: 'bench',
    serial: `40${randomBytes(15).toString('hex')}`,
    notBefore: now() - 3_600_000,
    notAfter: now() + 86_400_000,
  })
  return {
    key: privateKey.export({ format: 'pem', type: 'pkcs8' }) as string,
    cert: toPem('CERTIFICATE', certificateOf(tbs, new Uint8Array(sign('sha256', tbs, privateKey)))),
  }
}

/** The real server as a process, with a batch imported and the boards of the batch in this one. */
interface Bench {
  readonly pid: number
  readonly client: Client
  readonly fleet: Fleet
  readonly serials: readonly string[]
  /** Memory of the server before a device was there. */
  readonly idle: number
  stop(): Promise<void>
}

const openBench = async (folder: string, devices: number): Promise<Bench> => {
  const batch: Batch = await makeBatch(
    { batch: 'batch-1', model: 'gateway', station: 'line-1', devices, release: { name: '1.0.0', number: 1 } },
    { random, now },
  )
  const data = join(folder, 'server')
  const server = await startServer(data)
  const { client, pid } = server
  const signed = (content: string) => ({
    content: Buffer.from(content).toString('base64'),
    signature: detachedSignature(content, batch.station).trim(),
    station: 'line-1',
  })
  await client.call('station.add', { body: { id: 'line-1', publicKey: createPublicKey(batch.station).export({ format: 'pem', type: 'spki' }) as string } })
  await client.call('endorsement.import', { body: { certificate: toPem('CERTIFICATE', batch.ca.certificate), test: true } })
  await client.call('release.import', { body: signed(referenceValues(batch.release.manifest)) })
  await client.call('batch.import', { body: { ...signed(manifestJson(batch.order, batch.boards)), format: 'json' } })
  await client.call('group.create', { body: { id: 'plant' } })
  await client.call('group.add', { params: { id: 'plant' }, body: { batch: 'batch-1' } })
  const tpms = new Map(batch.boards.map(({ serial, tpm }) => [serial, tpm]))
  const fleet = openFleet(
    {
      factory: {
        serials: [...tpms.keys()],
        release: batch.release,
        methodOf: () => 'tpm2',
        element: async (serial) => await Promise.reject(new Error(`board ${serial} has no secure element`)),
        async board(serial) {
          const tpm = tpms.get(serial)
          if (tpm === undefined) throw new Error(`no board ${serial}`)
          const board = createBoard({ serial, tpm, flash: new Flash() })
          install(board, batch.release)
          return board
        },
      },
      trust: trustOfBundle(await client.call('bundle')),
      data: join(folder, 'boards'),
      files: simulatedFiles,
      random,
      now,
      log: () => undefined,
      tampered: new Map(),
      claims: new Map(),
      starting: 16,
    },
    () => undefined,
  )
  return {
    pid,
    client,
    fleet,
    serials: [...tpms.keys()],
    idle: server.idle,
    async stop() {
      await fleet.stop()
      await server.stop()
    },
  }
}

/** Wall time and server CPU of `work`, milliseconds. */
const measured = async (pid: number, work: () => Promise<void>): Promise<{ wall: number; cpu: number }> => {
  const [started, before] = [performance.now(), cpuOf(pid)]
  await work()
  return { wall: performance.now() - started, cpu: cpuOf(pid) - before }
}

/**
 * Public-key work that one enrolment asks of the server: both connections, hello and answer (two signatures by LDevID each: transcript and presented key),
 * EK certificate, quote, three certifications, two requests, the binding, the connection proof; challenge, two certificates, identity and welcome signed;
 * one credential made.
 */
const enrolmentFloor = (of: Floor): number => of.handshake + of.mutualHandshake + 13 * of.verify + 5 * of.sign + of.agree

/** Certificates that are revoked before the ones that are measured. */
const alreadyRevoked = 100_000
const inventorySize = 1_000_000
const ledgerDevices = 100_000

/** One rotation: delivery and activation signed, the key sealed, two statements verified, one proof of use. */
const rotationFloor = (of: Floor): number => 2 * of.sign + of.seal + 2 * of.verify + of.mac

const run = async (wanted: readonly Name[], devices: number, print: (figure: Figure) => void): Promise<void> => {
  const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-'))
  try {
    const floor = await measureFloor(folder, { server: pair('server-tls'), device: pair('device-tls') }, Math.min(devices, 200))
    const bench = await openBench(folder, devices)
    try {
      const enrolment = await measured(bench.pid, async () => {
        await bench.fleet.on(bench.serials)
        await until(() => [...bench.fleet.status().values()].every((status) => status?.connected === true))
      })
      if (wanted.includes('enrolment')) {
        const cpu = enrolment.cpu / devices
        print({ bench: 'enrolment', metric: 'rate', value: rounded((devices / enrolment.wall) * 1000), unit: '1/s' })
        print({
          bench: 'enrolment',
          metric: 'server-cpu',
          value: rounded(cpu),
          unit: 'ms',
          floor: rounded(enrolmentFloor(floor)),
          ratio: rounded(cpu / enrolmentFloor(floor)),
        })
      }
      if (wanted.includes('memory')) {
        await new Promise((resolve) => void setTimeout(resolve, 2_000))
        const each = (memoryOf(bench.pid) - bench.idle) / devices
        print({
          bench: 'memory',
          metric: 'per-device',
          value: Math.round(each),
          unit: 'bytes',
          floor: Math.round(floor.connection),
          ratio: rounded(each / floor.connection),
        })
      }
      if (wanted.includes('revocation')) {
        const { durable, whole, floor: write } = await measureRevocation(folder, alreadyRevoked)
        print({ bench: 'revocation', metric: 'durable', value: rounded(durable), unit: 'ms', floor: rounded(write), ratio: rounded(durable / write) })
        print({ bench: 'revocation', metric: 'whole', value: rounded(whole), unit: 'ms', floor: rounded(2 * write), ratio: rounded(whole / (2 * write)) })
        const cuts: number[] = []
        for (const serial of bench.serials.slice(-Math.min(20, Math.ceil(devices / 10)))) {
          const started = performance.now()
          const cut = until(() => bench.fleet.status().get(serial)?.connected !== true).then(() => performance.now() - started)
          await bench.client.call('device.revoke', { params: { id: serial.toLowerCase() }, body: { reason: 'keyCompromise' } })
          cuts.push(await cut)
        }
        // The slowest: one that is late is late.
        print({ bench: 'revocation', metric: 'session-cut', value: rounded(Math.max(...cuts)), unit: 'ms' })
        print({ bench: 'revocation', metric: 'session-cut-median', value: rounded(median(cuts)), unit: 'ms' })
      }
    } finally {
      await bench.stop()
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

/** Devices that are enrolled before a real one is. */
const sizes = [1_000, 100_000] as const

/** What a fleet that is there already adds to the cost of a new device, and to a start. */
const runAtSize = async (wanted: readonly Name[], print: (figure: Figure) => void): Promise<void> => {
  const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-'))
  try {
    const [small, large] = await measureAtSize(folder, sizes, 200)
    if (small === undefined || large === undefined) return
    if (wanted.includes('enrolment')) {
      print({ bench: 'enrolment', metric: 'cpu-at-1k', value: rounded(small.cpu), unit: 'ms' })
      const ratio = rounded(large.cpu / small.cpu)
      print({ bench: 'enrolment', metric: 'cpu-at-100k', value: rounded(large.cpu), unit: 'ms', floor: rounded(small.cpu), ratio })
      for (const table of perDevice) print({ bench: 'enrolment', metric: `${table}-row`, value: Math.round(large.rows[table]), unit: 'bytes' })
      print({ bench: 'enrolment', metric: 'audit-entry', value: Math.round(small.entry), unit: 'bytes' })
    }
    if (wanted.includes('start')) {
      print({ bench: 'start', metric: 'ready-at-1k', value: rounded(small.start), unit: 's' })
      const ratio = rounded(large.start / small.start)
      print({ bench: 'start', metric: 'ready-at-100k', value: rounded(large.start), unit: 's', floor: rounded(small.start), ratio })
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

/** What many connected devices do at once. */
const runLive = async (wanted: readonly Name[], devices: number, flags: readonly string[], print: (figure: Figure) => void): Promise<void> => {
  const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-'))
  const figure = (bench: Name, metric: string, value: number, unit: string, floor?: number): void =>
    print({ bench, metric, value: rounded(value), unit, ...(floor === undefined ? {} : { floor: rounded(floor), ratio: rounded(value / floor) }) })
  try {
    const tls = { server: pair('server-tls'), device: pair('device-tls') }
    const floor = await measureFloor(folder, tls, Math.min(devices, 200))
    const live = await openLiveFleet(folder, devices, flags)
    try {
      if (wanted.includes('rotation')) {
        const { most, all, serverCpu, fleetCpu, entries } = await measureRotation(live)
        const wire = await measureWireBytes()
        figure('rotation', '99-percent', most, 's')
        figure('rotation', 'all', all, 's')
        figure('rotation', 'server-cpu', serverCpu, 'ms', rotationFloor(floor))
        figure('rotation', 'fleet-cpu', fleetCpu, 'ms')
        figure('rotation', 'audit-entries', entries, 'each')
        figure('rotation', 'down', wire.down, 'bytes')
        figure('rotation', 'up', wire.up, 'bytes')
      }
      if (wanted.includes('storm')) {
        const { full, resumed, reportCpu, memory, idle } = await measureStorms(folder, live)
        for (const [kind, { most, all, serverCpu, fleetCpu, control }] of [['', full] as const, ['resumed-', resumed] as const]) {
          figure('storm', `${kind}99-percent`, most, 's')
          // What a bare TLS listener alone would need for as many handshakes, on a core of its own.
          figure('storm', `${kind}all`, all, 's', (floor.mutualHandshake * devices) / 1_000)
          figure('storm', `${kind}server-cpu`, serverCpu, 'ms', floor.mutualHandshake)
          figure('storm', `${kind}fleet-cpu`, fleetCpu, 'ms')
          figure('storm', `${kind}control-p99`, control, 'ms', idle)
        }
        figure('storm', 'report-cpu', reportCpu, 'ms')
        figure('storm', 'memory-peak', memory / (1 << 20), 'MiB')
      }
    } finally {
      await live.stop()
    }
    const broker = await measureMosquitto(folder, tls, { devices: Math.min(devices, 2_000), bytes: (await measureWireBytes()).delivery })
    const [bench] = wanted
    if (broker !== undefined && bench !== undefined) {
      figure(bench, 'mosquitto-connect', broker.connect, 'ms', floor.mutualHandshake)
      figure(bench, 'mosquitto-message', broker.message, 'ms')
      figure(bench, 'mosquitto-rate', broker.rate, '1/s')
    }
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

const { values, positionals } = parseArgs({
  options: {
    devices: { type: 'string', default: '300' },
    members: { type: 'string', default: '100000' },
    json: { type: 'boolean', default: false },
    profile: { type: 'string' },
  },
  allowPositionals: true,
})
const wanted = positionals.length === 0 ? names : names.filter((name) => positionals.includes(name))
const devices = Number(values.devices)
const members = Number(values.members)
if (wanted.length !== (positionals.length || names.length) || ![devices, members].every((count) => Number.isInteger(count) && count >= 1) || members < 10) {
  process.stderr.write(`usage: npm run bench -- [${names.join('|')}]… [--devices N] [--members N] [--json] [--profile DIR]\n`)
  process.exit(1)
}
/** Whoever reads only the first lines (`| head`) has what it wants: what is running is stopped in order, and nothing failed. */
class ReaderGone extends Error {}
let isReaderGone = false
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error
  isReaderGone = true
})
const print = (figure: Figure): void => {
  if (isReaderGone) throw new ReaderGone()
  const { bench, metric, value, unit, floor, ratio } = figure
  if (values.json) process.stdout.write(`${JSON.stringify(figure)}\n`)
  else
    process.stdout.write(
      `${bench.padEnd(10)} ${metric.padEnd(11)} ${String(value).padStart(9)} ${unit.padEnd(6)}${ratio === undefined ? '' : ` ${ratio} × the floor of ${String(floor)} ${unit}`}\n`,
    )
}
const measure = async (): Promise<void> => {
  if (wanted.includes('software-tpm')) {
    const { boot, floor, memory } = await measureSoftwareTpm(1000)
    print({ bench: 'software-tpm', metric: 'boot', value: rounded(boot), unit: 'ms', floor: rounded(floor), ratio: rounded(boot / floor) })
    print({ bench: 'software-tpm', metric: 'boots', value: rounded(1000 / boot), unit: '1/s' })
    print({ bench: 'software-tpm', metric: 'memory', value: Math.round(memory), unit: 'bytes' })
  }
  if (wanted.includes('evidence')) {
    const { verify, floor } = await measureEvidence(Math.min(devices, 100))
    print({ bench: 'evidence', metric: 'verify', value: rounded(verify), unit: 'ms', floor: rounded(floor), ratio: rounded(verify / floor) })
    print({ bench: 'evidence', metric: 'rate', value: rounded(1000 / verify), unit: '1/s' })
  }
  if (wanted.includes('issuance')) {
    installPrograms({ cfssl: 'golang-cfssl' }, 'what is measured beside it is left out')
    const { openssl, rate, whole, judged, issued, cfssl } = await measureIssuance(2_000)
    const bound = boundOf(openssl)
    const figure = (metric: string, value: number, floor: number): void =>
      print({ bench: 'issuance', metric, value: rounded(value), unit: '1/cpu-s', floor: rounded(floor), ratio: rounded(value / floor) })
    print({ bench: 'issuance', metric: 'rate', value: rounded(rate), unit: '1/s' })
    figure('whole', whole, bound)
    figure('judge', judged, openssl.verify)
    figure('issue', issued, openssl.sign)
    if (cfssl === undefined) process.stderr.write('issuance: cfssl is not installed (Debian: golang-cfssl), so nothing is measured beside it\n')
    for (const [name, peer] of [['cfssl', cfssl?.unkept] as const, ['cfssl-kept', cfssl?.kept] as const]) {
      if (peer === undefined) continue
      figure(name, peer.cpu, peer.floor)
      print({ bench: 'issuance', metric: `${name}-rate`, value: rounded(peer.wall), unit: '1/s' })
    }
    process.stdout.write(
      values.json ? '' : `           floors by ${openssl.by}: ${rounded(openssl.sign)} signatures, ${rounded(openssl.verify)} verifications a CPU second\n`,
    )
  }
  if (wanted.includes('crl')) {
    for (const entries of [10_000, 100_000]) {
      const { complete, again, delta, floor, bytes } = await measureLists(entries)
      const name = `${entries / 1000}k`
      print({ bench: 'crl', metric: `complete-${name}`, value: rounded(complete), unit: 'ms', floor: rounded(floor), ratio: rounded(complete / floor) })
      print({ bench: 'crl', metric: `again-${name}`, value: rounded(again), unit: 'ms', floor: rounded(floor), ratio: rounded(again / floor) })
      print({ bench: 'crl', metric: `delta-${name}`, value: rounded(delta), unit: 'ms' })
      print({ bench: 'crl', metric: `bytes-${name}`, value: bytes, unit: 'bytes' })
    }
  }
  if (wanted.includes('ocsp')) {
    const folder = mkdtempSync(join(tmpdir(), 'fk-bench-'))
    try {
      const { ahead, signed, floor } = await measureAnswers(folder)
      print({ bench: 'ocsp', metric: 'ahead', value: Math.round(ahead), unit: '1/s', floor: Math.round(floor), ratio: rounded(ahead / floor) })
      print({ bench: 'ocsp', metric: 'signed', value: Math.round(signed), unit: '1/s', floor: Math.round(floor), ratio: rounded(signed / floor) })
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }
  if (wanted.includes('ledger')) {
    const folder = mkdtempSync(join(tmpdir(), 'fk-bench-'))
    try {
      const { questions, floor } = await measureLedger(folder, ledgerDevices)
      for (const { name, median, slowest } of questions) {
        print({ bench: 'ledger', metric: name, value: rounded(median), unit: 'ms', floor: rounded(floor), ratio: rounded(median / floor) })
        print({ bench: 'ledger', metric: `${name}-max`, value: rounded(slowest), unit: 'ms' })
      }
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }
  if (wanted.includes('inventory')) {
    const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-'))
    try {
      const { pages, floor } = await measureInventory(folder, inventorySize)
      for (const { name, median, slowest, slowestCpu } of pages) {
        print({ bench: 'inventory', metric: name, value: rounded(median), unit: 'ms', floor: rounded(floor), ratio: rounded(median / floor) })
        print({ bench: 'inventory', metric: `${name}-max`, value: rounded(slowest), unit: 'ms' })
        print({ bench: 'inventory', metric: `${name}-max-cpu`, value: rounded(slowestCpu), unit: 'ms' })
      }
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }
  if (wanted.includes('eviction')) {
    const naive = await measureNaive()
    for (const [evicted, rounds] of [
      [1, 41],
      [1_000, 9],
    ] as const) {
      const { cpu, signedCpu, bytes, each, wraps, messages, envelope } = await measureEviction(evicted, rounds)
      const name = `evict-${evicted}-of-1000000`
      print({ bench: 'eviction', metric: `${name}-cpu`, value: rounded(cpu), unit: 'ms', floor: rounded(naive.cpu), ratio: rounded(cpu / naive.cpu) })
      print({ bench: 'eviction', metric: `${name}-bytes`, value: bytes, unit: 'bytes', floor: naive.bytes, ratio: rounded(bytes / naive.bytes) })
      print({ bench: 'eviction', metric: `${name}-wraps`, value: wraps, unit: 'wraps', floor: 1_000_000, ratio: rounded(wraps / 1_000_000) })
      print({ bench: 'eviction', metric: `${name}-each`, value: each, unit: 'bytes' })
      print({ bench: 'eviction', metric: `${name}-signed-cpu`, value: rounded(signedCpu), unit: 'ms' })
      print({ bench: 'eviction', metric: `${name}-messages`, value: messages, unit: 'each' })
      print({ bench: 'eviction', metric: `${name}-envelope`, value: envelope, unit: 'bytes' })
    }
    const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-'))
    try {
      const { cpu, pause, floor } = await measureEvictionFlow(folder, members, 5)
      print({ bench: 'eviction', metric: 'evict-flow-cpu', value: rounded(cpu), unit: 'ms', floor: rounded(floor.cpu), ratio: rounded(cpu / floor.cpu) })
      print({
        bench: 'eviction',
        metric: 'evict-flow-pause',
        value: rounded(pause),
        unit: 'ms',
        floor: rounded(floor.pause),
        ratio: rounded(pause / floor.pause),
      })
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }
  if (wanted.includes('wraps')) {
    const { hpke, floor, peer, symmetric } = await measureWraps()
    const figure = (metric: string, value: number, of: number): void =>
      print({ bench: 'wraps', metric, value: rounded(value), unit: '1/cpu-s', floor: rounded(of), ratio: rounded(value / of) })
    figure('hpke', hpke, floor)
    figure('hpke-to-peer', hpke, peer)
    print({ bench: 'wraps', metric: 'symmetric', value: rounded(symmetric), unit: '1/cpu-s' })
  }
  if (wanted.includes('pause')) {
    for (const measurePausesOf of [measureListPauses, measurePauses]) {
      const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-'))
      try {
        for (const { name, pause, usual, rows, took, floor } of await measurePausesOf(folder, members)) {
          const figure = (metric: string, value: number, of: number): void =>
            print({ bench: 'pause', metric, value: rounded(value), unit: 'ms', ...(of === 0 ? {} : { floor: rounded(of), ratio: rounded(value / of) }) })
          figure(name, pause, floor.pause)
          figure(`${name}-usual`, usual, floor.usual)
          print({ bench: 'pause', metric: `${name}-rows`, value: rows, unit: 'rows' })
          print({ bench: 'pause', metric: `${name}-took`, value: rounded(took), unit: 's' })
        }
      } finally {
        rmSync(folder, { recursive: true, force: true })
      }
    }
  }
  if (wanted.includes('softhsm')) {
    const folder = mkdtempSync(join(tmpdir(), 'fleetkey-bench-'))
    try {
      const figures = await measureSoftHsm(folder, 3_200)
      if (figures === undefined) process.stderr.write('softhsm: not installed\n')
      else print({ bench: 'softhsm', metric: 'sign', value: rounded(figures.rate), unit: '1/s', floor: rounded(figures.floor), ratio: rounded(figures.ratio) })
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  }
  const ofFleet = wanted.filter((name) => name === 'rotation' || name === 'storm')
  if (ofFleet.length > 0) await runLive(ofFleet, devices, values.profile === undefined ? [] : ['--cpu-prof', '--cpu-prof-dir', values.profile], print)
  if (wanted.includes('enrolment') || wanted.includes('start')) await runAtSize(wanted, print)
  const ofServer = wanted.filter((name) => name === 'enrolment' || name === 'memory' || name === 'revocation')
  if (ofServer.length > 0) await run(ofServer, devices, print)
}
await measure().catch((thrown: unknown) => {
  if (!(thrown instanceof ReaderGone)) throw thrown
})
