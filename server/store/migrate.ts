import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { Problem } from '@fleetkey/protocol/problem.ts'

/** One shipped file: `0001-name.sql`. Never changed once released; the next one is added instead. */
export interface Migration {
  readonly name: string
  readonly sql: string
  /** Hex SHA-256 of the file. */
  readonly hash: string
}

/** What a back end gives: it runs SQL in the dialect of its migrations. */
export interface MigrationTarget {
  /** Applied so far, in the order of application; empty when the database is new. */
  readonly applied: () => readonly { readonly name: string; readonly hash: string }[]
  /** Runs the migration and records it, in one transaction. */
  readonly apply: (migration: Migration) => void
}

/** The `.sql` files of a folder, in order of their names, which must be numbered without a gap. */
export const readMigrations = (folder: string): readonly Migration[] => {
  const names = readdirSync(folder)
    .filter((name) => name.endsWith('.sql'))
    .toSorted()
  return names.map((name, at) => {
    if (!name.startsWith(`${String(at + 1).padStart(4, '0')}-`))
      throw new Problem('internal', `migration ${name} is not number ${at + 1}`, { reason: 'store.migration' })
    const bytes = readFileSync(join(folder, name))
    return { name, sql: bytes.toString('utf8'), hash: createHash('sha256').update(bytes).digest('hex') }
  })
}

/**
 * Brings a database to the shipped schema. What was applied must be the beginning of what is shipped, by name and hash: throws
 * Problem('internal', reason `store.migration`) for a changed, missing or out-of-order migration and for a database of a newer program.
 */
export const migrate = (target: MigrationTarget, shipped: readonly Migration[], step: (name: string) => void): readonly string[] => {
  const applied = target.applied()
  for (const [at, { name, hash }] of applied.entries()) {
    const expected = shipped[at]
    const refuse = (what: string): never => {
      throw new Problem('internal', `${what}; nothing was changed`, { reason: 'store.migration' })
    }
    if (expected === undefined) refuse(`the database has migration ${name}, which this program does not know: it was opened by a newer one`)
    else if (expected.name !== name) refuse(`the database has migration ${name} where this program has ${expected.name}: out of order`)
    else if (expected.hash !== hash) refuse(`migration ${name} is not the one that was applied to the database: its text was changed`)
  }
  const pending = shipped.slice(applied.length)
  for (const migration of pending) {
    target.apply(migration)
    // Each migration is a transaction with its record: a crash here leaves the ones before applied, the next start goes on.
    step('store.migrated')
  }
  return pending.map(({ name }) => name)
}
