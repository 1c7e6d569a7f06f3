import Database from 'better-sqlite3'
import { statfsSync } from 'node:fs'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { reserveBytes, reserveIn, type Reserve } from './reserve.ts'

const diskCodes = ['SQLITE_FULL', 'SQLITE_IOERR', 'SQLITE_READONLY', 'SQLITE_CANTOPEN', 'SQLITE_CORRUPT', 'SQLITE_NOTADB', 'SQLITE_NOMEM', 'SQLITE_PROTOCOL']
const fileCodes = ['ENOSPC', 'EDQUOT', 'EIO', 'EROFS', 'ENOMEM', 'ENODEV', 'ENXIO']

/** True for what is the disk's fault, not the statement's. */
export const isDiskError = (error: unknown): boolean => {
  if (!(error instanceof Error)) return false
  const code = 'code' in error ? String(error.code) : ''
  return error instanceof Database.SqliteError ? diskCodes.some((one) => code.startsWith(one)) : fileCodes.includes(code)
}

export const unavailable = (reason: string, cause?: unknown): Problem =>
  new Problem('unavailable', `the store cannot write: ${reason}`, { reason: 'store.disk', retryAfterSeconds: 5, cause })

/** Whether the reserve of a store's folder is held, and bytes that are free beside it. */
export const diskRoom = (folder: string): { readonly reserve: boolean; readonly free: number } => {
  const { bavail, bsize } = statfsSync(folder)
  return { reserve: reserveIn(folder).held(), free: bavail * bsize }
}

export interface DiskState {
  /** Why nothing is written; null while writing works. */
  readonly reason: () => string | null
  /** Writing failed: read-only until a probe succeeds. */
  readonly failed: (error: unknown) => void
  readonly stop: () => void
}

const probeEvery = 1000

/**
 * Whether the disk can be written. After a failure a probe runs every second: it takes the reserve again and writes to the database;
 * both must work before ordinary commits may, so that they never live on the space that revocations were promised.
 */
export const diskState = (folder: string, of: { readonly reserve: Reserve; readonly write: () => void; readonly log: (line: string) => void }): DiskState => {
  let reason: string | null = null
  let timer: NodeJS.Timeout | undefined

  const roomy = (): boolean => {
    const { bavail, bsize, blocks } = statfsSync(folder)
    return of.reserve.held() || blocks === 0 || bavail * bsize >= reserveBytes
  }
  const probe = (): void => {
    try {
      if (!roomy()) return
      if (!of.reserve.held()) of.reserve.take()
      of.write()
    } catch {
      return
    }
    reason = null
    clearInterval(timer)
    timer = undefined
    of.log('store: writing works again')
  }
  return {
    reason: () => reason,
    failed(error) {
      const why = error instanceof Error ? error.message : String(error)
      if (reason === null) of.log(`store: read-only, writing failed: ${why}`)
      reason = why
      timer ??= setInterval(probe, probeEvery).unref()
    },
    stop: () => clearInterval(timer),
  }
}
