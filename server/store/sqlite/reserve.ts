import { randomBytes } from 'node:crypto'
import { closeSync, fsyncSync, openSync, renameSync, rmSync, statSync, writeSync } from 'node:fs'
import { join } from 'node:path'

/** Enough for some hundred revocations, and for the log that they are written through. */
export const reserveBytes = 4 << 20

/** Space kept on the disk by a file, given back for commits that must not wait until somebody has cleaned up. */
export interface Reserve {
  readonly held: () => boolean
  /** Writes the file. Throws the file system's error (ENOSPC) and leaves nothing behind. */
  readonly take: () => void
  readonly release: () => void
}

export const reserveIn = (folder: string): Reserve => {
  const path = join(folder, 'reserve')
  const temporary = join(folder, '.reserve.new')
  return {
    held: () => (statSync(path, { throwIfNoEntry: false })?.size ?? 0) >= reserveBytes,
    take() {
      try {
        const handle = openSync(temporary, 'w', 0o600)
        try {
          // Random content: zeros would take no space where the file system compresses or leaves holes.
          for (let written = 0; written < reserveBytes;) written += writeSync(handle, randomBytes(256 << 10))
          fsyncSync(handle)
        } finally {
          closeSync(handle)
        }
        renameSync(temporary, path)
      } catch (error) {
        rmSync(temporary, { force: true })
        throw error
      }
    },
    release: () => rmSync(path, { force: true }),
  }
}
