import { vi } from 'vitest'
import { main } from '@fleetkey/cli/main.ts'

export interface Outcome {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

/** One command line in this process, with what it wrote. */
export const fleetkey = async (words: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<Outcome> => {
  let [stdout, stderr] = ['', '']
  const out = vi.spyOn(process.stdout, 'write').mockImplementation((text) => ((stdout += String(text)), true))
  const err = vi.spyOn(process.stderr, 'write').mockImplementation((text) => ((stderr += String(text)), true))
  try {
    return { code: await main(words, env), stdout, stderr }
  } finally {
    out.mockRestore()
    err.mockRestore()
  }
}
