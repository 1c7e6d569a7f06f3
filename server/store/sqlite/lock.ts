import Database from 'better-sqlite3'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Problem } from '@fleetkey/protocol/problem.ts'

/**
 * One process per folder. The lock is SQLite's own on an empty file, held by a transaction that never ends: the kernel takes it back when
 * the process dies, however it dies, so that nothing stale has to be judged. The pid beside it is for the message only.
 * Throws Problem('unavailable', reason `store.locked`) naming the holder. Returns the release.
 */
export const lockFolder = (folder: string): (() => void) => {
  const lock = new Database(join(folder, 'lock'), { timeout: 0 })
  const pidFile = join(folder, 'lock.pid')
  try {
    // Nothing is ever written, not even a journal: locking must work on a full disk.
    lock.pragma('journal_mode = MEMORY')
    lock.exec('BEGIN EXCLUSIVE')
  } catch (cause) {
    lock.close()
    if (!isBusy(cause)) throw cause
    throw new Problem('unavailable', `${folder} is in use by process ${holder(pidFile)}: only one server may run on a data folder`, {
      reason: 'store.locked',
      cause,
    })
  }
  try {
    writeFileSync(pidFile, `${process.pid}\n`, { mode: 0o600 })
  } catch {
    // A full disk must not keep the server from starting; the message of a second one is then poorer.
  }
  return () => {
    lock.exec('ROLLBACK')
    lock.close()
  }
}

const isBusy = (error: unknown): boolean => error instanceof Database.SqliteError && error.code.startsWith('SQLITE_BUSY')

const holder = (pidFile: string): string => {
  try {
    return readFileSync(pidFile, 'utf8').trim() || 'unknown'
  } catch {
    return 'unknown'
  }
}
