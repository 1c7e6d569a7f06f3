import { randomBytes } from 'node:crypto'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import Database from 'better-sqlite3'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { admitBatch } from '@fleetkey/firmware-sim/fleet/admission.ts'
import { startFleetProcesses } from '@fleetkey/firmware-sim/fleet/processes.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { hasIdentity } from '@fleetkey/server/fleet/device.ts'
import type { Store, Write } from '@fleetkey/server/flows/context.ts'
import { findAll } from '@fleetkey/server/flows/rows.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { around } from './around.ts'
import { cpuOf } from './cpu.ts'
import { connected, patienceFor } from './live-fleet.ts'
import { freePort } from '../test/ports.ts'
import { startServer, until } from './server.ts'

/** Tables that grow with the fleet. */
export const perDevice = ['device', 'manifest', 'certificate', 'member', 'holding'] as const

export interface SizeFigures {
  readonly devices: number
  /** Server CPU of one real enrolment beside so many devices, milliseconds. */
  readonly cpu: number
  /** Seconds from the start of the server until it was ready. */
  readonly start: number
  /** Bytes on disk for each row of these tables, indexes included. */
  readonly rows: Readonly<Record<(typeof perDevice)[number], number>>
  /** Bytes of one audit entry with its chain hash. */
  readonly entry: number
}

const entry = { at: 0, caller: 'system:bench', from: 'server', action: 'server.setup', subject: 'bench', outcome: 'done', code: null, detail: '' } as const
const hex = (bytes: number): string => randomBytes(bytes).toString('hex')

/** Every row that an enrolled device has, for another one of that name. */
const copiesOf = async (store: Store, like: DeviceId): Promise<(name: string) => readonly Write[]> => {
  const [device, manifest, certificates, members, holdings] = await Promise.all([
    store.get('device', like),
    findAll(store, 'manifest', { where: { device: like } }),
    findAll(store, 'certificate', { where: { device: like } }),
    findAll(store, 'member', { where: { device: like } }),
    findAll(store, 'holding', { where: { device: like } }),
  ])
  if (!hasIdentity(device) || manifest.length === 0 || certificates.length === 0 || holdings.length === 0) throw new Error(`${like} is not enrolled`)
  return (name) => {
    const id = DeviceId.parse(name)
    const serial = name.toUpperCase()
    const serials = new Map(certificates.map((certificate) => [certificate.id, `4${hex(16).slice(1)}`]))
    const renamed = (of: string): string => of.replace(like, id)
    const { ldevidSerial, tlsSerial } = device
    return [
      { table: 'device', do: 'insert', row: { ...device, id, serial, ldevidSerial: serials.get(ldevidSerial) ?? '', tlsSerial: serials.get(tlsSerial) ?? '' } },
      ...manifest.map((row): Write => ({ table: 'manifest', do: 'insert', row: { ...row, id: `${renamed(row.id)}-${name}`, device: id, serial } })),
      ...certificates.map((row): Write => ({
        table: 'certificate',
        do: 'insert',
        row: { ...row, id: serials.get(row.id) ?? '', device: id, spkiHash: hex(32) },
      })),
      ...members.map((row): Write => ({ table: 'member', do: 'insert', row: { ...row, id: renamed(row.id), device: id } })),
      ...holdings.map((row): Write => ({ table: 'holding', do: 'insert', row: { ...row, id: renamed(row.id), device: id } })),
    ]
  }
}

/** Puts devices into the store of a server that does not run. */
const fill = async (folder: string, like: DeviceId, from: number, to: number): Promise<void> => {
  const store = await openSqliteStore(folder)
  try {
    const copies = await copiesOf(store, like)
    for (let start = from; start < to; start += 200) {
      const writes = Array.from({ length: Math.min(200, to - start) }, (_, at) => copies(`stored-${start + at}`)).flat()
      const verdict = await store.commit({ writes, entries: [entry] })
      if (!verdict.committed) throw new Error(`the store would not take ${JSON.stringify(verdict.conflict)}`)
    }
  } finally {
    await store.close()
  }
}

/** What the store of a server that does not run takes on disk. */
const bytesIn = (path: string): Pick<SizeFigures, 'rows' | 'entry'> => {
  const db = new Database(path, { readonly: true })
  try {
    const number = (sql: string, ...values: readonly string[]): number =>
      (db
        .prepare(sql)
        .pluck()
        .get(...values) as number | null) ?? Number.NaN
    const of = (table: string): number =>
      number('SELECT sum(s.pgsize) FROM dbstat s JOIN sqlite_schema m ON m.name = s.name WHERE m.tbl_name = ?', table) /
      number(`SELECT count(*) FROM "${table}"`)
    const rows = Object.fromEntries(perDevice.map((table) => [table, of(table)])) as unknown as SizeFigures['rows']
    return { rows, entry: number('SELECT avg(length("bytes") + length("chain")) FROM "audit_log"') }
  } finally {
    db.close()
  }
}

/** Enrols real devices beside so many stored ones, for each of these sizes; the stored ones have the rows of a real one. `each`: real enrolments that are measured. */
export const measureAtSize = async (folder: string, sizes: readonly number[], each: number): Promise<readonly SizeFigures[]> => {
  const warm = Math.ceil(each / 4)
  const data = join(folder, 'at-size')
  mkdirSync(data, { recursive: true })
  const order = { batch: 'measured', model: 'gateway', station: 'line-1', devices: 1 + sizes.length * (warm + each), release: { name: '1.0.0', number: 1 } }
  const batch = await makeBatch(order, around)
  await writeBatch(join(data, 'factory'), batch)
  const serials = batch.boards.map(({ serial }) => serial)
  const port = await freePort()
  const begin = async () => await startServer(join(data, 'server'), { port })
  let server = await begin()
  const { client } = server
  await admitBatch(client, join(data, 'factory'), 'plant')
  await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
  const bundle = JSON.stringify(await client.call('bundle'))
  const fleet = await startFleetProcesses({ factory: join(data, 'factory'), bundle, data, serials, processes: 1 })
  const database = join(data, 'server', 'store', 'fleetkey.db')
  const figures: SizeFigures[] = []
  try {
    const enrol = async (some: readonly string[]): Promise<void> => {
      await fleet.on(some)
      await until(async () => {
        await new Promise((resolve) => void setTimeout(resolve, 200))
        const counts = await fleet.counts()
        return connected(counts) === some.length && (counts.keys['telemetry']?.['1'] ?? 0) === some.length
      }, patienceFor(some.length))
    }
    const [first = '', ...rest] = serials
    await enrol([first])
    await fleet.off([first])
    let stored = 0
    for (const [at, size] of sizes.entries()) {
      await server.stop()
      await fill(join(data, 'server', 'store'), DeviceId.parse(first.toLowerCase()), stored, size)
      stored = size
      const bytes = bytesIn(database)
      server = await begin()
      const own = rest.slice(at * (warm + each), (at + 1) * (warm + each))
      await enrol(own.slice(0, warm))
      await fleet.off(own)
      const before = cpuOf(server.pid)
      await enrol(own.slice(warm))
      figures.push({ devices: size, cpu: (cpuOf(server.pid) - before) / each, start: server.startedIn / 1_000, ...bytes })
      await fleet.off(own)
    }
    return figures
  } finally {
    await fleet.stop()
    await server.stop()
  }
}
