import Database from 'better-sqlite3'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { migrate, readMigrations, type Migration, type MigrationTarget } from './migrate.ts'
import { getTableConfig } from './sqlite/drizzle.ts'
import { openSqliteStore } from './sqlite.ts'
import { auditHead, auditLog, rowTables, writeProbe } from './sqlite/schema.ts'

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
  for (const { sql } of readMigrations(fileURLToPath(new URL('./migrations', import.meta.url)))) db.exec(sql)
  const all = (sql: string): Record<string, unknown>[] => db.prepare(sql).all() as Record<string, unknown>[]
  const made = all("SELECT name FROM sqlite_schema WHERE type = 'table'").map(({ name }) => {
    const columns = all(`SELECT name, type, "notnull", pk FROM pragma_table_info('${String(name)}') ORDER BY name`)
    const indexes = all(`SELECT name, "unique" FROM pragma_index_list('${String(name)}') WHERE origin = 'c' ORDER BY name`)
    const fields = (index: unknown): unknown[] => all(`SELECT name FROM pragma_index_info('${String(index)}')`).map((field) => field['name'])
    return {
      name,
      columns: columns.map((column) => [column['name'], String(column['type']).toLowerCase(), column['notnull'] === 1, column['pk'] === 1]),
      indexes: indexes.map((index) => [index['name'], index['unique'] === 1, fields(index['name'])]),
    }
  })
  const schema = [...Object.values(rowTables), auditLog, auditHead, writeProbe].map((table) => {
    const { name, columns, indexes } = getTableConfig(table)
    return {
      name,
      columns: columns
        .map((column) => [column.name, column.getSQLType(), column.notNull, column.primary])
        .toSorted((a, b) => (String(a[0]) < String(b[0]) ? -1 : 1)),
      indexes: indexes
        .map(({ config }) => [config.name, config.unique, config.columns.map((column) => (column as unknown as { name: string }).name)])
        .toSorted((a, b) => (String(a[0]) < String(b[0]) ? -1 : 1)),
    }
  })
  const byName = (a: { name: unknown }, b: { name: unknown }): number => (String(a.name) < String(b.name) ? -1 : 1)
  expect(made.toSorted(byName)).toEqual(schema.toSorted(byName))
  db.close()
})
