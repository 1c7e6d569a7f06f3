import Database from 'better-sqlite3'
import type { BetterSQLite3Database } from 'drizzle-orm/better-sqlite3'
import { chmodSync, closeSync, fsyncSync, openSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { migrate, readMigrations, type MigrationTarget } from '../migrate.ts'
import { decodeRow, indexedValue, indexNamed, tableNames } from '../rows.ts'
import { drizzle } from './drizzle.ts'

export type Connection = InstanceType<typeof Database>

const migrations = fileURLToPath(new URL('../migrations', import.meta.url))

const syncFolder = (folder: string): void => {
  const handle = openSync(folder, 'r')
  try {
    fsyncSync(handle)
  } finally {
    closeSync(handle)
  }
}

const migrationTarget = (connection: Connection, now: () => number): MigrationTarget => ({
  applied() {
    connection.exec(
      'CREATE TABLE IF NOT EXISTS "migration" ("number" INTEGER PRIMARY KEY, "name" TEXT NOT NULL, "hash" TEXT NOT NULL, "at" INTEGER NOT NULL) STRICT',
    )
    return connection.prepare('SELECT "name", "hash" FROM "migration" ORDER BY "number"').all() as { name: string; hash: string }[]
  },
  apply({ name, sql, hash }) {
    connection
      .transaction(() => {
        connection.exec(sql)
        connection.prepare('INSERT INTO "migration" ("name", "hash", "at") VALUES (?, ?, ?)').run(name, hash, now())
      })
      .immediate()
  },
})

/** What migrations fill new columns with, from the rows that are there: `index_value(table, field, row)`, and `tally_value(table, field, value)`. */
export const migrationFunctions = (connection: Connection): void => {
  const named = (name: unknown) => {
    const table = tableNames.find((one) => one === name)
    if (table === undefined) throw new Error(`no table ${String(name)}`)
    return table
  }
  connection.function('index_value', { deterministic: true, directOnly: true }, (table, field, row) => {
    const name = named(table)
    return indexedValue(decodeRow(row as Uint8Array), indexNamed(name, String(field)))
  })
  connection.function('tally_value', { deterministic: true, directOnly: true }, (table, field, value) =>
    typeof value === 'string' ? (indexNamed(named(table), String(field), 'tally').tally?.(value) ?? null) : null,
  )
}

/**
 * Opens the database of a folder durably and brings it to the shipped schema. WAL with synchronous=FULL: every commit is on the disk when
 * it returns. Locking mode EXCLUSIVE: no shared-memory file, which could not grow on a full disk.
 */
export const openDatabase = (
  folder: string,
  { now, log, step }: { readonly now: () => number; readonly log: (line: string) => void; readonly step: (name: string) => void },
): { readonly connection: Connection; readonly db: BetterSQLite3Database } => {
  const path = join(folder, 'fleetkey.db')
  const connection = new Database(path, { timeout: 0 })
  try {
    // The write-ahead log takes the mode of the database.
    chmodSync(path, 0o600)
    connection.pragma('locking_mode = EXCLUSIVE')
    const mode: unknown = connection.pragma('journal_mode = WAL', { simple: true })
    if (mode !== 'wal') throw new Error(`the file system of ${folder} does not allow a write-ahead log`)
    connection.pragma('synchronous = FULL')
    connection.pragma('trusted_schema = OFF')
    // What is deleted is overwritten: wrapped key material of a destroyed epoch does not stay in free pages.
    connection.pragma('secure_delete = ON')
    connection.pragma('journal_size_limit = 67108864')
    connection.pragma('cache_size = -32768')
    migrationFunctions(connection)
    const done = migrate(migrationTarget(connection, now), readMigrations(migrations), step)
    if (done.length > 0) log(`store: applied ${done.join(', ')}`)
    // What a savepoint would take back is kept in memory, not in a temporary file that each commit writes; only migrations may need more than fits there.
    connection.pragma('temp_store = MEMORY')
    // The names of new files are durable too before the first commit is acknowledged.
    syncFolder(folder)
    syncFolder(dirname(folder))
    return { connection, db: drizzle(connection) }
  } catch (error) {
    connection.close()
    throw error
  }
}
