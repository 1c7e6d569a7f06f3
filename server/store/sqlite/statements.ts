import Database from 'better-sqlite3'
import type { SQL } from 'drizzle-orm'
import type { BetterSQLite3Database } from 'drizzle-orm/better-sqlite3'
import type { SQLiteColumn } from 'drizzle-orm/sqlite-core'
import type { IndexEntry, Range, Table, Tally, Write } from '../../flows/context.ts'
import { encodeRow, fieldsOf, indexedValue, indexNamed, lastOfPrefix, tableNames, WriteConflict } from '../rows.ts'
import { compile, type Compiled } from './compiled.ts'
import type { Connection } from './database.ts'
import { and, asc, count, eq, gt, gte, lte, sql } from './drizzle.ts'
import { rowTables, tallyTable } from './schema.ts'

/** A write with its row already encoded: what cannot be encoded is refused before it joins a group of commits. */
export interface PreparedWrite {
  readonly table: Table
  readonly do: 'insert' | 'update' | 'delete'
  readonly id: string
  /** The version that must be stored (update, delete). */
  readonly expected: number
  readonly bytes: Uint8Array
  /** Of the indexed fields, in the order of `fieldsOf`; none of a deletion. */
  readonly values: readonly (string | null)[]
}

const nothing = new Uint8Array()

/** Encodes a write. Throws Problem('internal') for a row that cannot be stored. */
export const prepareWrite = (write: Write): PreparedWrite => {
  const { table } = write
  if (write.do === 'delete') return { table, do: 'delete', id: write.id, expected: write.version, bytes: nothing, values: [] }
  const { row } = write
  const expected = write.do === 'insert' ? 0 : row.version
  return {
    table,
    do: write.do,
    id: row.id,
    expected,
    bytes: encodeRow(table, row, expected + 1),
    values: fieldsOf(table).map((field) => indexedValue(row, field)),
  }
}

export interface RowQuery {
  readonly where: Readonly<Record<string, string | undefined>>
  readonly prefix?: string | undefined
  readonly after?: string | undefined
  readonly limit: number
}

/** Rows of every table. Synchronous; inside a transaction when the caller has one open. */
export interface RowStatements {
  readonly get: (table: Table, id: string) => Buffer | undefined
  readonly find: (table: Table, query: RowQuery) => readonly Buffer[]
  readonly count: (table: Table, where: RowQuery['where']) => number
  readonly scan: (table: Table, index: string, range: Range) => readonly IndexEntry[]
  readonly tally: (table: Table, index: string, of: { readonly from: string; readonly to: string }) => readonly Tally[]
  /** Throws WriteConflict. What it changes in the tallies is added to `counts`. */
  readonly write: (write: PreparedWrite, counts: Counts) => void
  /** Puts what was counted into the tallies; in the same transaction. */
  readonly recount: (counts: Counts) => void
}

/** By how much tallies change: many rows of a transaction go from one value to another, and each tally is written once for all of them. */
export type Counts = Map<string, Count>
interface Count {
  readonly table: Table
  readonly field: string
  readonly value: string
  by: number
}

const add = (counts: Counts, { table, field, value, by }: Readonly<Count>): void => {
  const name = `${table} ${field} ${value}`
  const known = counts.get(name)
  if (known === undefined) counts.set(name, { table, field, value, by })
  else known.by += by
}

/** Adds what one commit counted to what its transaction has. */
export const addCounts = (counts: Counts, more: Counts): void => {
  for (const count of more.values()) add(counts, count)
}

const isConstraint = (error: unknown): boolean => error instanceof Database.SqliteError && error.code.startsWith('SQLITE_CONSTRAINT')

const statementsOf = (connection: Connection, db: BetterSQLite3Database, name: Table) => {
  const table = rowTables[name]
  const values = Object.fromEntries(['id', 'version', 'row', ...fieldsOf(name).map((field) => field.name)].map((column) => [column, sql.placeholder(column)]))
  const { id: _id, ...changed } = values
  const isId = eq(table.id, sql.placeholder('id'))
  const isExpected = and(isId, eq(table.version, sql.placeholder('expected')))
  const update = db
    .update(table)
    .set(changed as never)
    .where(isExpected)
  return {
    get: compile(connection, db.select({ row: table.row }).from(table).where(isId)),
    version: compile(connection, db.select({ version: table.version }).from(table).where(isId)),
    insert: writing(name, compile(connection, db.insert(table).values(values as never))),
    update: writing(name, compile(connection, update)),
    delete: writing(name, compile(connection, db.delete(table).where(isExpected))),
  }
}

/** Where the parameters of a statement come from. */
const sources = {
  id: ({ id }) => id,
  row: ({ bytes }) => bytes,
  version: ({ expected }) => expected + 1,
  expected: ({ expected }) => expected,
} as const satisfies Readonly<Record<string, (write: PreparedWrite) => unknown>>

/** A statement that makes a write; how many rows it changed. */
const writing = (table: Table, statement: Compiled): ((write: PreparedWrite) => number) => {
  const fields = fieldsOf(table).map(({ name }) => name)
  const parameters = statement.names.map((name): ((write: PreparedWrite) => unknown) => {
    const at = fields.indexOf(name)
    return at < 0 ? sources[name as keyof typeof sources] : ({ values }) => values[at]
  })
  return (write) => statement.runOrdered(parameters.map((parameter) => parameter(write)))
}

/** Counts of rows by value, changed with the rows they count. */
const tallyStatements = (connection: Connection, db: BetterSQLite3Database) => {
  const place = and(
    eq(tallyTable.table, sql.placeholder('table')),
    eq(tallyTable.field, sql.placeholder('field')),
    eq(tallyTable.value, sql.placeholder('value')),
  )
  const more = compile(
    connection,
    db
      .insert(tallyTable)
      .values({ table: sql.placeholder('table'), field: sql.placeholder('field'), value: sql.placeholder('value'), rows: sql.placeholder('by') as never })
      .onConflictDoUpdate({ target: [tallyTable.table, tallyTable.field, tallyTable.value], set: { rows: sql`"rows" + ${sql.placeholder('by')}` } }),
  )
  const less = compile(
    connection,
    db
      .update(tallyTable)
      .set({ rows: sql`"rows" - ${sql.placeholder('by')}` })
      .where(place),
  )
  const none = compile(connection, db.delete(tallyTable).where(and(place, eq(tallyTable.rows, sql`0`))))
  const range = db
    .select({ value: tallyTable.value, rows: tallyTable.rows })
    .from(tallyTable)
    .where(
      and(
        eq(tallyTable.table, sql.placeholder('table')),
        eq(tallyTable.field, sql.placeholder('field')),
        gte(tallyTable.value, sql.placeholder('from')),
        lte(tallyTable.value, sql.placeholder('to')),
      ),
    )
    .orderBy(asc(tallyTable.value))
    .prepare()
  return {
    range: (table: Table, field: string, from: string, to: string): readonly Tally[] => range.all({ table, field, from, to }),
    save(counts: Counts): void {
      for (const { table, field, value, by } of counts.values()) {
        if (by > 0) more.run({ table, field, value, by })
        if (by >= 0) continue
        less.run({ table, field, value, by: -by })
        none.run({ table, field, value })
      }
    },
  }
}

/** Statements prepared once; searches once per shape (which fields, prefix, cursor). */
export const rowStatements = (connection: Connection, db: BetterSQLite3Database): RowStatements => {
  const prepared = Object.fromEntries(tableNames.map((name) => [name, statementsOf(connection, db, name)])) as Readonly<
    Record<Table, ReturnType<typeof statementsOf>>
  >
  const tallies = tallyStatements(connection, db)
  const tallied = new Map(
    tableNames.flatMap((name) => {
      const fields = fieldsOf(name)
        .map((field, at) => ({ ...field, at }))
        .filter(({ tally }) => tally !== undefined)
      if (fields.length === 0) return []
      const table = rowTables[name]
      const before = db
        .select(Object.fromEntries(fields.map((field) => [field.name, table[field.name] as SQLiteColumn])))
        .from(table)
        .where(eq(table.id, sql.placeholder('id')))
        .prepare()
      return [[name, { fields, before }] as const]
    }),
  )
  /** Whether a name, serial or key is taken is asked for each row that is to be written. */
  const uniques = new Map(
    tableNames.map((name) => {
      const table = rowTables[name]
      const fields = fieldsOf(name).filter(({ unique }) => unique)
      const one = (field: string): Compiled =>
        compile(
          connection,
          db
            .select({ row: table.row })
            .from(table)
            .where(eq(table[field] as SQLiteColumn, sql.placeholder(field))),
        )
      return [name, new Map(fields.map((field) => [field.name, one(field.name)]))] as const
    }),
  )
  const searches = new Map<string, Compiled>()
  const scans = new Map<string, { all(values: Record<string, unknown>): unknown[] }>()

  const fieldsIn = (name: Table, where: RowQuery['where']): readonly string[] => {
    const fields = Object.keys(where).filter((field) => where[field] !== undefined)
    for (const field of fields) indexNamed(name, field)
    return fields
  }
  const conditions = (name: Table, fields: readonly string[]): readonly SQL[] =>
    fields.map((field) => eq(rowTables[name][field] as SQLiteColumn, sql.placeholder(`where_${field}`)))

  const search = (key: string, make: () => Parameters<typeof compile>[1]): Compiled => {
    const found = searches.get(key) ?? compile(connection, make())
    searches.set(key, found)
    return found
  }

  const valuesOf = (fields: readonly string[], where: RowQuery['where']) => Object.fromEntries(fields.map((field) => [`where_${field}`, where[field]]))

  /** Why an update or delete touched no row, or an insert hit a constraint. */
  const conflictOf = (write: PreparedWrite, error?: unknown): WriteConflict => {
    const { table, id } = write
    const stored = prepared[table].version.get({ id }) as number | undefined
    if (write.do !== 'insert' && stored === undefined) return new WriteConflict({ table, id, why: 'missing' })
    if (write.do !== 'insert' && stored !== write.expected) return new WriteConflict({ table, id, why: 'version' })
    if (write.do === 'insert' && stored !== undefined) return new WriteConflict({ table, id, why: 'exists' })
    // SQLite names the column: "UNIQUE constraint failed: device.serial".
    const field = /constraint failed: \w+\.(\w+)/.exec(error instanceof Error ? error.message : '')?.[1]
    return new WriteConflict({ table, id, why: 'unique', ...(field === undefined ? {} : { field }) })
  }

  return {
    get: (table, id) => prepared[table].get.get({ id }) as Buffer | undefined,
    find(name, { where, prefix, after, limit }) {
      const fields = fieldsIn(name, where)
      const [field] = fields
      const unique = fields.length === 1 && prefix === undefined && after === undefined && limit > 0 ? uniques.get(name)?.get(field ?? '') : undefined
      if (unique !== undefined) {
        const found = unique.getOrdered([where[field ?? '']]) as Buffer | undefined
        return found === undefined ? [] : [found]
      }
      const table = rowTables[name]
      const statement = search(`${name} ${fields.join()} ${prefix === undefined} ${after === undefined}`, () => {
        const all = [
          ...conditions(name, fields),
          ...(prefix === undefined ? [] : [gte(table.id, sql.placeholder('prefix')), lte(table.id, sql.placeholder('last'))]),
          ...(after === undefined ? [] : [gt(table.id, sql.placeholder('after'))]),
        ]
        return db
          .select({ row: table.row })
          .from(table)
          .where(and(...all))
          .orderBy(asc(table.id))
          .limit(sql.placeholder('limit'))
      })
      return statement.all({ ...valuesOf(fields, where), prefix, last: `${prefix}${lastOfPrefix}`, after, limit }) as Buffer[]
    },
    count(name, where) {
      const fields = fieldsIn(name, where)
      const [field = ''] = fields
      const value = where[field]
      // One tallied value: it was counted when its rows changed, unless the tally is by a part of it.
      if (fields.length === 1 && value !== undefined && indexNamed(name, field).tally?.(value) === value)
        return tallies.range(name, field, value, value)[0]?.rows ?? 0
      const statement = search(`count ${name} ${fields.join()}`, () =>
        db
          .select({ n: count() })
          .from(rowTables[name])
          .where(and(...conditions(name, fields))),
      )
      return (statement.get(valuesOf(fields, where)) as number | undefined) ?? 0
    },
    scan(name, index, { from, to, after, limit }) {
      indexNamed(name, index)
      const table = rowTables[name]
      const column = table[index] as SQLiteColumn
      const key = `${name} ${index} ${after === undefined}`
      const statement =
        scans.get(key) ??
        db
          .select({ value: column, id: table.id })
          .from(table)
          .where(
            and(
              after === undefined
                ? gte(column, sql.placeholder('from'))
                : sql`(${column}, ${table.id}) > (${sql.placeholder('value')}, ${sql.placeholder('id')})`,
              lte(column, sql.placeholder('to')),
            ),
          )
          .orderBy(asc(column), asc(table.id))
          .limit(sql.placeholder('limit'))
          .prepare()
      scans.set(key, statement)
      const isWithin = after === undefined || after.value >= from
      return statement.all({ from, to, limit, ...(after === undefined ? {} : isWithin ? after : { value: from, id: '' }) }) as IndexEntry[]
    },
    tally(name, index, { from, to }) {
      indexNamed(name, index, 'tally')
      return tallies.range(name, index, from, to)
    },
    write(write, counts) {
      const counted = tallied.get(write.table)
      const before =
        counted === undefined || write.do === 'insert'
          ? undefined
          : (counted.before.get({ id: write.id }) as Readonly<Record<string, string | null>> | undefined)
      let rows: number
      try {
        rows = prepared[write.table][write.do](write)
      } catch (error) {
        throw isConstraint(error) ? conflictOf(write, error) : error
      }
      if (rows !== 1) throw conflictOf(write)
      for (const { name, tally, at } of counted?.fields ?? []) {
        const part = (value: string | null | undefined): string | null => (value === null || value === undefined ? null : (tally?.(value) ?? null))
        const [from, to] = [part(before?.[name]), part(write.values[at])]
        if (from === to) continue
        if (from !== null) add(counts, { table: write.table, field: name, value: from, by: -1 })
        if (to !== null) add(counts, { table: write.table, field: name, value: to, by: 1 })
      }
    },
    recount: (counts) => tallies.save(counts),
  }
}
