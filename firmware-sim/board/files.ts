import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import type { FileSystem } from '@fleetkey/device-agent/filesystem.ts'

/**
 * The medium of simulated boards: this machine's files without waiting for its disk. They survive the end of this process, as does the state of the TPMs, and
 * not that of the machine: thousands of boards would make its disk the bottleneck of what is measured.
 */
export const simulatedFiles: FileSystem = {
  async read(path) {
    try {
      return new Uint8Array(readFileSync(path))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
      throw error
    }
  },
  write: async (path, bytes, { mode }) => writeFileSync(path, bytes, { mode }),
  rename: async (from, to) => renameSync(from, to),
  remove: async (path) => rmSync(path, { force: true }),
  syncFolder: async () => undefined,
  makeFolder: async (folder, mode) => void mkdirSync(folder, { recursive: true, mode }),
}
