import type { Changes, Verdict } from '../../flows/context.ts'
import type { LogHead } from '../../audit/chain.ts'
import { WriteConflict } from '../rows.ts'
import type { Connection } from './database.ts'
import { isDiskError } from './disk.ts'
import type { LogStatements } from './log.ts'
import { addCounts, type Counts, type PreparedWrite, type RowStatements } from './statements.ts'

/** One commit that waits for its group. */
export interface Pending {
  readonly writes: readonly PreparedWrite[]
  readonly entries: Changes['entries']
  readonly reserved: boolean
  readonly settle: (result: Verdict | Error) => void
}

/** What became of each commit of a group, in its order, and the log's head after it. Nothing is told to anybody before this returns. */
export interface GroupResult {
  readonly results: readonly (Verdict | Error)[]
  readonly head: LogHead
}

export interface GroupParts {
  readonly connection: Connection
  readonly rows: RowStatements
  readonly log: LogStatements
  readonly step: (name: string) => void
}

/** A commit of a group conflicts: the group runs again, each commit with a savepoint. */
class Contended extends Error {}

/** What one commit did, and the log's head after it. */
interface Done {
  readonly result: Verdict | Error
  readonly head: LogHead
}

/**
 * Runs a group of commits as one transaction, durable when it returns: one flush of the disk for all. A conflict takes back that commit alone, its entries
 * included. Conflicts are rare and savepoints are dear (SQLite copies each page before its first change in one), so a group runs without any; one that turns out
 * to have a conflict is undone and runs once more with a savepoint for each commit. Throws when the disk fails; the transaction is then undone as a whole.
 */
export const groupCommit = ({ connection, rows, log, step }: GroupParts) => {
  const [begin, commit, rollback] = [connection.prepare('BEGIN IMMEDIATE'), connection.prepare('COMMIT'), connection.prepare('ROLLBACK')] as const
  const [savepoint, undo, release] = [connection.prepare('SAVEPOINT one'), connection.prepare('ROLLBACK TO one'), connection.prepare('RELEASE one')] as const

  const apply = ({ writes, entries }: Pending, before: LogHead, counts: Counts): Done => {
    for (const write of writes) rows.write(write, counts)
    const head = entries.reduce(log.append, before)
    return { result: { committed: true, sequence: head.sequence }, head }
  }
  const plain = (pending: Pending, before: LogHead, counts: Counts): Done => {
    try {
      return apply(pending, before, counts)
    } catch (error) {
      throw isDiskError(error) ? error : new Contended()
    }
  }
  const guarded = (pending: Pending, before: LogHead, counts: Counts): Done => {
    savepoint.run()
    try {
      const own: Counts = new Map()
      const done = apply(pending, before, own)
      release.run()
      addCounts(counts, own)
      return done
    } catch (error) {
      if (isDiskError(error)) throw error
      undo.run()
      release.run()
      if (error instanceof WriteConflict) return { result: { committed: false, conflict: error.conflict }, head: before }
      return { result: error instanceof Error ? error : new Error(String(error)), head: before }
    }
  }

  const run = (group: readonly Pending[], start: LogHead, one: typeof plain): GroupResult => {
    begin.run()
    try {
      let head = start
      const counts: Counts = new Map()
      const results = group.map((pending) => {
        const done = one(pending, head, counts)
        head = done.head
        return done.result
      })
      if (head === start) {
        rollback.run()
        return { results, head }
      }
      rows.recount(counts)
      log.save(head)
      // A crash here: nothing of the group is written, nobody was told.
      step('store.commit')
      commit.run()
      return { results, head }
    } catch (error) {
      // SQLite has already rolled back by itself after some errors.
      if (connection.inTransaction) rollback.run()
      throw error
    }
  }

  return (group: readonly Pending[], start: LogHead): GroupResult => {
    try {
      return run(group, start, plain)
    } catch (error) {
      // Nothing of it is left: it may run again.
      if (!(error instanceof Contended)) throw error
      return run(group, start, guarded)
    }
  }
}
