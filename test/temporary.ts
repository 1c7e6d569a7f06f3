import { mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'

const hour = 3_600_000
const name = /^fk-(\d+)-[A-Za-z0-9]{6}$/

const isGone = (pid: number): boolean => {
  try {
    process.kill(pid, 0)
    return false
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'ESRCH'
  }
}

const remove = (folder: string): void => rmSync(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 50 })

/** What runs that were killed have left: of processes that are no more, and for an hour already (a process of another container may only seem to be no more). */
const sweep = (place: string): void => {
  for (const entry of readdirSync(place)) {
    const pid = name.exec(entry)?.[1]
    const folder = join(place, entry)
    const stat = pid === undefined ? undefined : statSync(folder, { throwIfNoEntry: false })
    if (stat !== undefined && isGone(Number(pid)) && stat.uid === process.getuid?.() && stat.mtimeMs + hour < Date.now()) remove(folder)
  }
}

/**
 * One folder for all that this run makes, tests, the processes they start and what kills them: `TMPDIR` of everybody until it is removed as a whole, also when
 * tests fail; after a run that was killed itself, by a later one. Inside a run that has one already, that one.
 */
export const openTemporary = (): { readonly folder: string; readonly close: () => void } => {
  const place = tmpdir()
  if (name.test(basename(place))) return { folder: place, close: () => undefined }
  sweep(place)
  const folder = mkdtempSync(join(place, `fk-${process.pid}-`))
  process.env['TMPDIR'] = folder
  // Sockets would go there instead.
  delete process.env['XDG_RUNTIME_DIR']
  return { folder, close: () => remove(folder) }
}

/** For a run of vitest: before and after all of it. */
export default (): (() => void) => openTemporary().close
