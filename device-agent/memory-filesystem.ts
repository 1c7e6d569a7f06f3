import type { FileSystem } from './filesystem.ts'

/** The power went while something was written, or is off. */
export class FilePowerLost extends Error {
  override readonly name = 'FilePowerLost'
}

/** When the power fails: asked before every operation that changes the medium; `torn` cuts it there. */
export interface FilePower {
  beforeWrite(): 'ok' | 'torn'
}

const steady: FilePower = { beforeWrite: () => 'ok' }

/** Power that fails at change number `at` (0-based). */
export const filePowerFailingAt = (at: number): FilePower => {
  let changes = 0
  return { beforeWrite: () => (changes++ === at ? 'torn' : 'ok') }
}

export interface MemoryFileSystem extends FileSystem {
  /** Everything that was not synced is lost or, with `keep`, happens to have reached the medium; `contents`: somebody has put these in their place. The power is on again afterwards. */
  powerCycle(next?: { readonly keep?: boolean; readonly power?: FilePower; readonly contents?: ReadonlyMap<string, Uint8Array> }): void
  /** The power goes now: every operation fails until `powerCycle`. */
  cut(): void
  /** Bytes of all files, for searching them for what must not be there. */
  contents(): ReadonlyMap<string, Uint8Array>
}

const folderOf = (path: string): string => path.slice(0, Math.max(path.lastIndexOf('/'), 0))

/**
 * Files in memory with the habits of a flash under a journal: a cut write leaves half of its bytes, renames and removals that were not
 * synced may be lost. One per simulated board, and for tests of what a power cut leaves behind.
 */
export const memoryFileSystem = (of: { readonly power?: FilePower; readonly contents?: ReadonlyMap<string, Uint8Array> } = {}): MemoryFileSystem => {
  let power = of.power ?? steady
  let on = true
  /** What the medium holds, and what the running system sees. */
  const held = new Map<string, Uint8Array>(of.contents)
  let seen = new Map(held)

  const powered = (): void => {
    if (!on) throw new FilePowerLost('the power is off')
  }
  const cutNow = (what: string): never => {
    on = false
    throw new FilePowerLost(what)
  }
  const change = (what: string): void => {
    powered()
    if (power.beforeWrite() === 'torn') cutNow(what)
  }

  return {
    async read(path) {
      powered()
      const bytes = seen.get(path)
      return bytes === undefined ? undefined : Uint8Array.from(bytes)
    },
    async write(path, bytes) {
      powered()
      if (power.beforeWrite() === 'torn') {
        const half = Uint8Array.from(bytes.subarray(0, bytes.length >> 1))
        seen.set(path, half)
        held.set(path, half)
        cutNow(`while writing ${path}`)
      }
      const copy = Uint8Array.from(bytes)
      seen.set(path, copy)
      held.set(path, copy)
    },
    async rename(from, to) {
      change(`before renaming ${from}`)
      const bytes = seen.get(from)
      if (bytes === undefined) throw Object.assign(new Error(`no file ${from}`), { code: 'ENOENT' })
      seen.delete(from)
      seen.set(to, bytes)
    },
    async remove(path) {
      change(`before removing ${path}`)
      seen.delete(path)
    },
    async syncFolder(folder) {
      change(`before syncing ${folder}`)
      for (const path of held.keys()) if (folderOf(path) === folder && !seen.has(path)) held.delete(path)
      for (const [path, bytes] of seen) if (folderOf(path) === folder) held.set(path, bytes)
    },
    async makeFolder() {
      powered()
    },
    powerCycle(next = {}) {
      if (next.keep === true) {
        held.clear()
        for (const [path, bytes] of seen) held.set(path, bytes)
      }
      if (next.contents !== undefined) {
        held.clear()
        for (const [path, bytes] of next.contents) held.set(path, bytes)
      }
      seen = new Map(held)
      power = next.power ?? steady
      on = true
    },
    cut() {
      on = false
    },
    contents: () => new Map([...held, ...seen]),
  }
}
