import type { SQLiteColumn, SQLiteTable } from 'drizzle-orm/sqlite-core'
import type { Table } from '../../flows/context.ts'
import { fieldsOf, tableNames } from '../rows.ts'
import { blob, index, integer, primaryKey, sql, sqliteTable, text, uniqueIndex } from './drizzle.ts'

/** A table of rows: `id`, `version`, one text column per indexed field, and the row itself as deterministic CBOR. */
export type RowTable = SQLiteTable & { readonly [column: string]: SQLiteColumn } & {
  readonly id: SQLiteColumn
  readonly version: SQLiteColumn
  readonly row: SQLiteColumn
}

/** Name of the index on one field. */
export const indexName = (table: Table, field: string): string => `${table}_${field}`

const rowTable = (name: Table): RowTable => {
  const fields = fieldsOf(name)
  return sqliteTable(
    name,
    {
      id: text('id').primaryKey(),
      version: integer('version').notNull(),
      row: blob('row', { mode: 'buffer' }).notNull(),
      ...Object.fromEntries(fields.map((field) => [field.name, text(field.name)])),
    },
    (columns) =>
      fields.map((field) => {
        const column = (columns as unknown as RowTable)[field.name] as SQLiteColumn
        if (field.unique) return uniqueIndex(indexName(name, field.name)).on(column as never)
        // The id follows, so that a page of one value is read in order of ids without sorting.
        const plain = index(indexName(name, field.name)).on(column as never, (columns as unknown as RowTable).id as never)
        return field.sparse ? plain.where(sql`${column} IS NOT NULL`) : plain
      }),
  ) as unknown as RowTable
}

/** Every table of rows, from the same list of indexes that the flows see. The migrations make them; a test compares the two. */
export const rowTables = Object.fromEntries(tableNames.map((name) => [name, rowTable(name)])) as unknown as Readonly<Record<Table, RowTable>>

/** How many rows of a table have one value of a tallied field. Changed in the transaction that changes the rows; a value that no row has is no row here. */
export const tallyTable = sqliteTable(
  'tally',
  { table: text('table').notNull(), field: text('field').notNull(), value: text('value').notNull(), rows: integer('rows').notNull() },
  (columns) => [primaryKey({ columns: [columns.table, columns.field, columns.value] })],
)

/** The log: canonical bytes of each entry, and the chain after it. */
export const auditLog = sqliteTable('audit_log', {
  sequence: integer('sequence').primaryKey(),
  bytes: blob('bytes', { mode: 'buffer' }).notNull(),
  chain: blob('chain', { mode: 'buffer' }).notNull(),
})

/** One row: where the log stands. `frontier`: hashes of the tree's frontier, 32 bytes each, largest subtree first. */
export const auditHead = sqliteTable('audit_head', {
  id: integer('id').primaryKey(),
  sequence: integer('sequence').notNull(),
  chain: blob('chain', { mode: 'buffer' }).notNull(),
  frontier: blob('frontier', { mode: 'buffer' }).notNull(),
})

/** One row, written to find out whether writing works again. */
export const writeProbe = sqliteTable('write_probe', { id: integer('id').primaryKey(), at: integer('at').notNull() })
