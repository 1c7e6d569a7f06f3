import Database from 'better-sqlite3'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { afterEach, beforeEach, expect, test } from 'vitest'
import type { Tables } from '../flows/context.ts'
import { migrate, readMigrations, type Migration, type MigrationTarget } from './migrate.ts'
import { getTableConfig } from './sqlite/drizzle.ts'
import { openSqliteStore } from './sqlite.ts'
import { migrationFunctions } from './sqlite/database.ts'
import { auditHead, auditLog, rowTables, tallyTable, writeProbe } from './sqlite/schema.ts'

let folder: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-migrate-'))
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))

const migration = (name: string, hash = name): Migration => ({ name, sql: '', hash })
const [one, two, three] = [migration('0001-a.sql'), migration('0002-b.sql'), migration('0003-c.sql')]

const target = (...applied: readonly Migration[]): MigrationTarget & { readonly done: string[] } => {
  const done: string[] = []
  return { done, applied: () => applied, apply: ({ name }) => void done.push(name) }
}

test.each([
  ['a new database gets all', [], [one, two], ['0001-a.sql', '0002-b.sql']],
  ['only what is new', [one], [one, two, three], ['0002-b.sql', '0003-c.sql']],
  ['nothing when up to date', [one, two], [one, two], []],
])('%s', (_name, applied, shipped, want) => {
  const database = target(...applied)
  expect(migrate(database, shipped, () => undefined)).toEqual(want)
  expect(database.done).toEqual(want)
})

test.each([
  ['a changed text', [one], [migration('0001-a.sql', 'other'), two], /changed/],
  ['another order', [one, three], [one, two, three], /out of order/],
  ['a newer database', [one, two], [one], /newer/],
])('refused, with nothing applied: %s', (_name, applied, shipped, why) => {
  const database = target(...applied)
  expect(() => migrate(database, shipped, () => undefined)).toThrow(why)
  expect(database.done).toEqual([])
})

test('files are numbered without a gap', () => {
  for (const name of ['0001-a.sql', '0003-c.sql']) writeFileSync(join(folder, name), 'SELECT 1')
  expect(() => readMigrations(folder)).toThrow('0003-c.sql is not number 2')
})

test('a database whose migration was changed does not open', async () => {
  await (await openSqliteStore(folder)).close()
  const db = new Database(join(folder, 'fleetkey.db'))
  db.exec(`UPDATE "migration" SET "hash" = 'x'`)
  db.close()
  await expect(openSqliteStore(folder)).rejects.toMatchObject({ code: 'internal', reason: 'store.migration' })
})

test('the migrations make exactly the tables, columns and indexes of the schema', () => {
  const db = new Database(':memory:')
  migrationFunctions(db)
  for (const { sql } of readMigrations(fileURLToPath(new URL('./migrations', import.meta.url)))) db.exec(sql)
  const all = (sql: string): Record<string, unknown>[] => db.prepare(sql).all() as Record<string, unknown>[]
  const made = all("SELECT name FROM sqlite_schema WHERE type = 'table'").map(({ name }) => {
    const columns = all(`SELECT name, type, "notnull", pk FROM pragma_table_info('${String(name)}') ORDER BY name`)
    const indexes = all(`SELECT name, "unique", partial FROM pragma_index_list('${String(name)}') WHERE origin = 'c' ORDER BY name`)
    const fields = (index: unknown): unknown[] => all(`SELECT name FROM pragma_index_info('${String(index)}')`).map((field) => field['name'])
    return {
      name,
      columns: columns.map((column) => [column['name'], String(column['type']).toLowerCase(), column['notnull'] === 1, Number(column['pk']) > 0]),
      indexes: indexes.map((index) => [index['name'], index['unique'] === 1, index['partial'] === 1, fields(index['name'])]),
    }
  })
  const schema = [...Object.values(rowTables), auditLog, auditHead, writeProbe, tallyTable].map((table) => {
    const { name, columns, indexes, primaryKeys } = getTableConfig(table)
    return {
      name,
      columns: columns
        .map((column) => [column.name, column.getSQLType(), column.notNull, column.primary || primaryKeys.some((key) => key.columns.includes(column as never))])
        .toSorted((a, b) => (String(a[0]) < String(b[0]) ? -1 : 1)),
      indexes: indexes
        .map(({ config }) => [
          config.name,
          config.unique,
          config.where !== undefined,
          config.columns.map((column) => (column as unknown as { name: string }).name),
        ])
        .toSorted((a, b) => (String(a[0]) < String(b[0]) ? -1 : 1)),
    }
  })
  const byName = (a: { name: unknown }, b: { name: unknown }): number => (String(a.name) < String(b.name) ? -1 : 1)
  expect(made.toSorted(byName)).toEqual(schema.toSorted(byName))
  db.close()
})

test('rows from before an index was there are in it, and counted', async () => {
  const db = new Database(join(folder, 'fleetkey.db'))
  const shipped = readMigrations(fileURLToPath(new URL('./migrations', import.meta.url)))
  const first = shipped.filter(({ name }) => name < '0003')
  db.exec('CREATE TABLE "migration" ("number" INTEGER PRIMARY KEY, "name" TEXT NOT NULL, "hash" TEXT NOT NULL, "at" INTEGER NOT NULL) STRICT')
  for (const { name, sql, hash } of first) {
    db.exec(sql)
    db.prepare('INSERT INTO "migration" ("name", "hash", "at") VALUES (?, ?, 1)').run(name, hash)
  }
  const row = {
    id: '41',
    version: 1,
    profile: 'device-tls',
    device: 'gw-1',
    der: new Uint8Array(3),
    fingerprint: 'f',
    spkiHash: 's',
    notBefore: 0,
    notAfter: Date.UTC(2027, 0, 31, 12),
    status: 'valid',
    revokedAt: null,
    reason: null,
  }
  for (const [id, status] of [
    ['41', 'valid'],
    ['42', 'revoked'],
    ['43', 'held'],
  ] as const) {
    const one = { ...row, id, status, fingerprint: `f${id}`, spkiHash: `s${id}` }
    db.prepare('INSERT INTO "certificate" VALUES (?, 1, ?, ?, ?, ?, ?)').run(id, encode(one), one.device, one.spkiHash, one.fingerprint, status)
  }
  for (const [id, state] of [
    ['41', 'issued'],
    ['44', 'open'],
    ['45', 'abandoned'],
  ] as const) {
    const intent = { id, version: 1, profile: 'device-tls', subject: 'gw-1', spki: new Uint8Array(91), notBefore: 0, notAfter: 1, state, createdAt: 1 }
    db.prepare('INSERT INTO "intent" VALUES (?, 1, ?, ?)').run(id, encode(intent), state)
  }
  const device = { id: 'gw-1', version: 1, state: 'registered', serial: 'GW-1', model: 'm', batch: 'b', registeredAt: 1, lastRefusal: null }
  db.prepare('INSERT INTO "device" VALUES (?, 1, ?, ?, ?, ?)').run(device.id, encode(device), device.state, device.batch, device.serial)
  for (const id of ['gw-1', 'gw-2']) {
    const member = { id: `plant/${id}`, version: 1, group: 'plant', device: id, joinedAt: 1 }
    db.prepare('INSERT INTO "member" VALUES (?, 1, ?, ?, ?)').run(member.id, encode(member), member.group, member.device)
  }
  db.close()
  const store = await openSqliteStore(folder)
  try {
    const place = 'valid/device-tls/issuing-ca/2027-01-31'
    expect(await store.scan('certificate', 'calendar', { from: 'valid/', to: 'valid/~', limit: 9 })).toEqual([{ value: `${place}T12:00:00`, id: '41' }])
    expect(await store.tally('certificate', 'calendar', { from: 'valid', to: 'valid~' })).toEqual([{ value: place, rows: 1 }])
    for (const withdrawn of ['revoked', 'held'] as const)
      expect((await store.find('certificate', { where: { withdrawn }, limit: 9 })).map(({ status }) => status)).toEqual([withdrawn])
    for (const unissued of ['open', 'abandoned'] as const)
      expect((await store.find('intent', { where: { unissued }, limit: 9 })).map(({ state }) => state)).toEqual([unissued])
    expect(await store.count('certificate')).toBe(3)
    expect(await store.count('intent')).toBe(3)
    const entry = { at: 1, caller: 'system:test', from: 'test', action: 'test', subject: 'x', outcome: 'done', code: null, detail: '' } as const
    const conflict = { committed: false, conflict: { field: 'spkiHash' } }
    const other = { ...row, id: '46', version: 0, spkiHash: 's42' } as unknown as Tables['certificate']
    expect(await store.commit({ writes: [{ table: 'certificate', do: 'insert', row: other }], entries: [entry] })).toMatchObject(conflict)
    expect(await store.tally('device', 'acknowledged', { from: '', to: '~' })).toEqual([])
    expect(await store.count('device', { state: 'registered' })).toBe(1)
    expect(await store.tally('member', 'group', { from: '', to: '~' })).toEqual([{ value: 'plant', rows: 2 }])
  } finally {
    await store.close()
  }
})
