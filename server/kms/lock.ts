import { chmodSync, closeSync, openSync } from 'node:fs'
import { join } from 'node:path'
import { DatabaseSync } from 'node:sqlite'
import { Problem } from '@fleetkey/protocol/problem.ts'

/** Locks of this process. One that nobody refers to would be collected, which closes it: the keys would be free for another process while this one uses them. */
const held = new Set<DatabaseSync>()

/** How long the process of a server that was just killed may take to notice. */
const defaultPatience = 10_000

/**
 * One process per folder, as in the store: a lock that the kernel takes back when its holder dies. Waits for a predecessor that is about to end.
 * Throws Problem('unavailable', reason `kms.locked`). Returns the release.
 */
export const lockKeys = (folder: string, { patience = defaultPatience }: { readonly patience?: number } = {}): (() => void) => {
  const path = join(folder, 'lock')
  closeSync(openSync(path, 'a', 0o600))
  chmodSync(path, 0o600)
  const lock = new DatabaseSync(path, { timeout: patience })
  try {
    // Nothing is ever written, not even a journal.
    lock.exec('PRAGMA journal_mode = MEMORY; BEGIN EXCLUSIVE')
  } catch (cause) {
    lock.close()
    throw new Problem('unavailable', `the keys in ${folder} are in use by another process`, { reason: 'kms.locked', cause })
  }
  held.add(lock)
  return () => {
    held.delete(lock)
    lock.close()
  }
}
