import { mkdirSync } from 'node:fs'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { rootOf } from '../audit/tree.ts'
import type { Store, Tables, Verdict } from '../flows/context.ts'
import { requireEntries } from './rows.ts'
import { readCache } from './sqlite/cache.ts'
import { openDatabase } from './sqlite/database.ts'
import { diskState, isDiskError, unavailable } from './sqlite/disk.ts'
import { groupCommit, type Pending } from './sqlite/group-commit.ts'
import { lockFolder } from './sqlite/lock.ts'
import { logStatements } from './sqlite/log.ts'
import { reserveIn } from './sqlite/reserve.ts'
import { prepareWrite, rowStatements } from './sqlite/statements.ts'

export interface SqliteStoreOptions {
  readonly now?: () => number
  readonly log?: (line: string) => void
  /** Named durable steps: `store.migrated`, `store.commit` (before the flush), `store.committed` (after it). */
  readonly step?: (name: string) => void
}

/** Writes of one transaction: bounds how long the process is busy with it. A single commit may be larger. */
const maxGroup = 2000

/** Commits of one transaction from which on more are worth waiting for, and for how long at most, milliseconds. */
const manyCommits = 4
const longestWait = 10

/**
 * The durable store of one process: SQLite in a folder (WAL, synchronous=FULL), group commit, audit chain and tree in the same transaction.
 * Throws Problem('unavailable') when another process has the folder (its pid is named) or the disk does not let it open,
 * Problem('internal') for a database that is damaged or of another program version.
 */
export const openSqliteStore = async (folder: string, options: SqliteStoreOptions = {}): Promise<Store> => {
  const { now = Date.now, log = () => undefined, step = () => undefined } = options
  mkdirSync(folder, { recursive: true, mode: 0o700 })
  const unlock = orUnavailable(() => lockFolder(folder))
  const reserve = reserveIn(folder)
  const opened = orUnavailable(() => openParts(folder, { now, log, step }), unlock)
  const { connection, rows, logs, run } = opened
  let { head } = opened
  let closed = false
  let queue: Pending[] = []
  let scheduled = false

  const probe = connection.prepare('UPDATE "write_probe" SET "at" = ?')
  const disk = diskState(folder, { reserve, write: () => void probe.run(now()), log })
  const keepReserve = (failed: (error: unknown) => void): void => {
    try {
      if (!reserve.held()) reserve.take()
    } catch (error) {
      failed(error)
    }
  }
  keepReserve(disk.failed)

  const cache = readCache()
  const runGroup = (group: readonly Pending[]): ReturnType<typeof run> => {
    try {
      return run(group, head)
    } finally {
      for (const { writes } of group) cache.wrote(writes)
    }
  }
  const settle = (group: readonly Pending[]): void => {
    const done = runGroup(group)
    head = done.head
    // A crash here: the group is on the disk, its callers do not know; they ask again and find it done.
    step('store.committed')
    group.forEach((pending, at) => pending.settle(done.results[at] as Verdict | Error))
  }
  const refuse = (group: readonly Pending[], error: unknown): void => {
    const problem = isDiskError(error) ? unavailable(error instanceof Error ? error.message : String(error), error) : error
    for (const pending of group) pending.settle(problem instanceof Error ? problem : new Error(String(problem)))
  }

  /** Commits that may use the reserve: as they are, and once more after the reserve was given back to the disk. */
  const settleReserved = (group: readonly Pending[]): void => {
    try {
      settle(group)
    } catch (error) {
      if (!isDiskError(error) || !reserve.held()) return refuse(group, error)
      reserve.release()
      log('store: reserve released for revocations')
      try {
        settle(group)
      } catch (again) {
        refuse(group, again)
      }
    }
  }

  const settleOrReserve = (group: readonly Pending[]): void => {
    const reason = disk.reason()
    if (reason === null) {
      try {
        return settle(group)
      } catch (error) {
        if (!isDiskError(error)) return refuse(group, error)
        disk.failed(error)
        refuse(
          group.filter(({ reserved }) => !reserved),
          error,
        )
      }
    } else {
      for (const pending of group) if (!pending.reserved) pending.settle(unavailable(reason))
    }
    const reserved = group.filter((pending) => pending.reserved)
    if (reserved.length > 0) settleReserved(reserved)
  }

  const takeGroup = (): readonly Pending[] => {
    let writes = 0
    const end = queue.findIndex((pending, at) => (writes += pending.writes.length + pending.entries.length) > maxGroup && at > 0)
    const group = end < 0 ? queue : queue.slice(0, end)
    queue = end < 0 ? [] : queue.slice(end)
    return group
  }

  /** When the disk was free again, how long it took, and for how many commits. */
  let last = { at: 0, took: 0, commits: 0 }
  const flush = (): void => {
    scheduled = false
    const group = takeGroup()
    const began = performance.now()
    settleOrReserve(group)
    const at = performance.now()
    last = { at, took: at - began, commits: group.length }
    if (queue.length > 0) schedule()
  }
  /**
   * After the events of this turn: everything they commit shares one transaction. Where many callers commit at once, not before the process has had as long for
   * other things as it waited for the disk: more of them share the next one.
   */
  const schedule = (): void => {
    if (scheduled) return
    scheduled = true
    const run = (): void => {
      if (!closed) flush()
    }
    const wait = last.commits < manyCommits ? 0 : Math.min(last.at + last.took - performance.now(), longestWait)
    if (wait < 1) setImmediate(run)
    else setTimeout(run, wait)
  }

  /** Reads go through here: a closed store and a broken disk are `unavailable`. */
  const read = <R>(work: () => R): R => {
    if (closed) throw new Problem('unavailable', 'the store is closed', { reason: 'store.closed' })
    try {
      return work()
    } catch (error) {
      throw isDiskError(error)
        ? new Problem('unavailable', `the store cannot read: ${(error as Error).message}`, { reason: 'store.disk', cause: error })
        : error
    }
  }

  return {
    async get(table, id, options) {
      return read(() => cache.get(table, id, () => rows.get(table, id), options?.passing !== true)) as Tables[typeof table] | undefined
    },
    async find(table, query) {
      const search = { ...query, where: query.where ?? {} }
      return read(() => cache.find(table, search, () => rows.find(table, search))) as readonly Tables[typeof table][]
    },
    async count(table, where) {
      return read(() => rows.count(table, where ?? {}))
    },
    async scan(table, index, range) {
      return read(() => rows.scan(table, index, range))
    },
    async tally(table, index, of) {
      return read(() => rows.tally(table, index, of))
    },
    async commit(changes, { reserved = false } = {}) {
      requireEntries(changes)
      const writes = changes.writes.map(prepareWrite)
      return await new Promise<Verdict>((resolve, reject) => {
        if (closed) return reject(new Problem('unavailable', 'the store is closed', { reason: 'store.closed' }))
        const settleOne = (result: Verdict | Error): void => (result instanceof Error ? reject(result) : resolve(result))
        queue.push({ writes, entries: changes.entries, reserved, settle: settleOne })
        schedule()
      })
    },
    async audit({ after, limit }) {
      return read(() => logs.page(after, limit))
    },
    async checkpoint() {
      return read(() => ({ size: head.tree.size, root: rootOf(head.tree), chain: head.chain.slice() }))
    },
    health() {
      const reason = closed ? 'the store is closed' : disk.reason()
      return { writable: reason === null, reason }
    },
    async close() {
      if (closed) return
      while (queue.length > 0) settleOrReserve(takeGroup())
      closed = true
      disk.stop()
      connection.close()
      // Closing has emptied the write-ahead log: its space becomes the reserve of the next start, before anybody else takes it.
      keepReserve(() => undefined)
      unlock()
    },
  }
}

/** The result of opening; what the disk refuses becomes `unavailable`, after `undo`. */
const orUnavailable = <R>(work: () => R, undo: () => void = () => undefined): R => {
  try {
    return work()
  } catch (error) {
    undo()
    throw isDiskError(error) ? unavailable(error instanceof Error ? error.message : String(error), error) : error
  }
}

const openParts = (folder: string, options: Required<SqliteStoreOptions>) => {
  const reserve = reserveIn(folder)
  const database = (() => {
    try {
      return openDatabase(folder, options)
    } catch (error) {
      // A full disk must not keep the server from opening: it starts read-only, on the space of the reserve.
      if (!isDiskError(error) || !reserve.held()) throw error
      reserve.release()
      return openDatabase(folder, options)
    }
  })()
  try {
    const rows = rowStatements(database.connection, database.db)
    const logs = logStatements(database.connection, database.db)
    const run = groupCommit({ connection: database.connection, rows, log: logs, step: options.step })
    return { connection: database.connection, rows, logs, run, head: logs.head() }
  } catch (error) {
    database.connection.close()
    throw error
  }
}
