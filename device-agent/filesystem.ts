import { constants, createReadStream } from 'node:fs'
import { chmod, mkdir, open, readFile, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'

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

const isFolder = async (path: string): Promise<boolean> =>
  await stat(path).then(
    (found) => found.isDirectory(),
    () => false,
  )

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
    // Parents first, one by one: where the kernel says of a folder in an existing one that it does not exist (/proc), `recursive` asks for ever.
    if (await isFolder(folder)) return
    if (dirname(folder) !== folder) await nodeFileSystem.makeFolder(dirname(folder), mode)
    try {
      await mkdir(folder, { mode })
      await chmod(folder, mode)
    } catch (error) {
      // Another process may have made it meanwhile.
      if (!(await isFolder(folder))) throw error
    }
  },
}

/** Errors that say that the medium, not the content, is at fault: full, read-only or failing. Nothing was acknowledged; it is tried again. */
export const isMediumError = (thrown: unknown): boolean => {
  const code = codeOf(thrown)
  return code === 'ENOSPC' || code === 'EROFS' || code === 'EIO' || code === 'EDQUOT' || code === 'EMFILE' || code === 'ENFILE'
}
