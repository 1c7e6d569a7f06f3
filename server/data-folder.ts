import { chmodSync, existsSync, mkdirSync, statSync } from 'node:fs'
import { dirname } from 'node:path'
import { SettingsError } from './config.ts'

/** Parents first, one by one: where the kernel says of a folder in an existing one that it does not exist (/proc), `recursive` asks for ever. */
const make = (path: string): void => {
  if (!existsSync(dirname(path))) make(dirname(path))
  try {
    mkdirSync(path, { mode: 0o700 })
  } catch (error) {
    if (statSync(path, { throwIfNoEntry: false })?.isDirectory() !== true) throw error
  }
}

/** What may be otherwise at the next start, without anybody giving another folder. */
const passing = new Set(['ENOSPC', 'EDQUOT', 'EIO'])

/**
 * The data folder, its user's alone; made when it is not there. Throws SettingsError when this place cannot be one (a file in the way, no permission, a
 * read-only file system), the file system's error when it only cannot now (a full disk).
 */
export const openDataFolder = (path: string): void => {
  try {
    make(path)
    chmodSync(path, 0o700)
  } catch (error) {
    const { code = '', message } = error as NodeJS.ErrnoException
    throw passing.has(code) ? error : new SettingsError(`--data ${path}: ${message}`)
  }
}
