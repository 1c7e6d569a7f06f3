import { readFileSync, renameSync, writeFileSync } from 'node:fs'

/** Where a simulated TPM keeps what outlives a loss of power. It survives the end of this process, not that of the machine: a real TPM's NV is no claim of this. */
export const stateFile = (path: string): { read(): Uint8Array | undefined; write(state: Uint8Array): void } => ({
  read() {
    try {
      return new Uint8Array(readFileSync(path))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
      throw error
    }
  },
  write(state) {
    writeFileSync(`${path}.new`, state, { mode: 0o600 })
    renameSync(`${path}.new`, path)
  },
})
