import { constants, createReadStream } from 'node:fs'
import { chmod, mkdir, open, readFile, rename, rm } from 'node:fs/promises'

/** Owner and permission of a file: the numbers of chown(2) and chmod(2). */
export interface FileOwner {
  readonly mode: number
  readonly uid?: number
  readonly gid?: number
}

/**
 * What the agent asks of a file system. `write` resolves when the bytes are on the medium; `rename` and `remove` are on the medium
 * only after `syncFolder` of their folder.
 */
export interface FileSystem {
  /** The whole file; undefined when there is none. */
  read(path: string): Promise<Uint8Array | undefined>
  write(path: string, bytes: Uint8Array, owner: FileOwner): Promise<void>
  rename(from: string, to: string): Promise<void>
  remove(path: string): Promise<void>
  syncFolder(folder: string): Promise<void>
  /** The folder and its parents; harmless when it exists. */
  makeFolder(folder: string, mode: number): Promise<void>
}

/** A file that may be too long to be held at once, from its start. */
export const piecesOf = (path: string): AsyncIterable<Uint8Array> => createReadStream(path, { highWaterMark: 256 << 10 }) as AsyncIterable<Uint8Array>

const codeOf = (thrown: unknown): unknown => (typeof thrown === 'object' && thrown !== null && 'code' in thrown ? thrown.code : undefined)

/** The machine's own files. */
export const nodeFileSystem: FileSystem = {
  async read(path) {
    try {
      return new Uint8Array(await readFile(path))
    } catch (error) {
      if (codeOf(error) === 'ENOENT') return undefined
      throw error
    }
  },
  async write(path, bytes, owner) {
    // No symbolic link is followed: a key never lands where somebody else points.
    const file = await open(path, constants.O_WRONLY | constants.O_CREAT | constants.O_TRUNC | constants.O_NOFOLLOW, 0o600)
    try {
      await file.writeFile(bytes)
      if (owner.uid !== undefined || owner.gid !== undefined) {
        const { uid, gid } = await file.stat()
        await file.chown(owner.uid ?? uid, owner.gid ?? gid)
      }
      await file.chmod(owner.mode)
      await file.sync()
    } finally {
      await file.close()
    }
  },
  rename,
  remove: async (path) => await rm(path, { force: true }),
  async syncFolder(folder) {
    const handle = await open(folder, constants.O_RDONLY)
    try {
      await handle.sync()
    } finally {
      await handle.close()
    }
  },
  async makeFolder(folder, mode) {
    const made = await mkdir(folder, { recursive: true, mode })
    if (made !== undefined) await chmod(folder, mode)
  },
}

/** Errors that say that the medium, not the content, is at fault: full, read-only or failing. Nothing was acknowledged; it is tried again. */
export const isMediumError = (thrown: unknown): boolean => {
  const code = codeOf(thrown)
  return code === 'ENOSPC' || code === 'EROFS' || code === 'EIO' || code === 'EDQUOT' || code === 'EMFILE' || code === 'ENFILE'
}
