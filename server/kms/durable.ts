import { closeSync, fstatSync, fsyncSync, openSync, readdirSync, renameSync, unlinkSync, writeSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'

const syncFolder = (folder: string): void => {
  const handle = openSync(folder, 'r')
  try {
    fsyncSync(handle)
  } finally {
    closeSync(handle)
  }
}

const writeAll = (handle: number, bytes: Uint8Array): void => {
  for (let at = 0; at < bytes.length;) at += writeSync(handle, bytes, at)
}

/**
 * Replaces a file so that a crash leaves the old or the new content, never a part (temporary file, fsync, rename, fsync of the folder).
 * Mode 0600. Throws the file system's error (ENOSPC, EROFS, …); the old file is then untouched.
 */
export const replaceFile = (path: string, bytes: Uint8Array): void => {
  // The name is always the same, so that what a crash left behind is overwritten by the next attempt instead of piling up.
  const temporary = join(dirname(path), `.${basename(path)}.new`)
  const handle = openSync(temporary, 'w', 0o600)
  try {
    writeAll(handle, bytes)
    fsyncSync(handle)
  } finally {
    closeSync(handle)
  }
  renameSync(temporary, path)
  syncFolder(dirname(path))
}

/**
 * Removes a file for good once this returns: renamed out of sight (durable), overwritten, unlinked. The overwriting is best effort: flash
 * and copy-on-write disks keep the old blocks.
 */
export const removeFile = (path: string): void => {
  const hidden = join(dirname(path), `.${basename(path)}.gone`)
  renameSync(path, hidden)
  syncFolder(dirname(path))
  erase(hidden)
  syncFolder(dirname(path))
}

/** Finishes what a crash interrupted: temporary files never renamed, removed files never unlinked. */
export const removeLeftovers = (folder: string): void => {
  for (const entry of readdirSync(folder)) if (/^\..*\.(?:new|gone)$/.test(entry)) erase(join(folder, entry))
}

const erase = (path: string): void => {
  const handle = openSync(path, 'r+')
  try {
    writeAll(handle, new Uint8Array(fstatSync(handle).size))
    fsyncSync(handle)
  } finally {
    closeSync(handle)
  }
  unlinkSync(path)
}
