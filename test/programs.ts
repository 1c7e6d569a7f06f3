import { spawnSync } from 'node:child_process'

/**
 * Whether a program that judges us is here. With CI=true a missing one is a failure, never a skip; elsewhere the reason is printed, once. Use as
 * `describe.skipIf(!hasProgram('swtpm'))`.
 */
export const hasProgram = (name: string): boolean => {
  const known = found.get(name)
  if (known !== undefined) return known
  const here = spawnSync('sh', ['-c', 'command -v -- "$1"', 'sh', name]).status === 0
  found.set(name, here)
  if (!here && process.env['CI'] === 'true') throw new Error(`${name} is not installed, and with CI=true nothing is skipped`)
  if (!here) process.stderr.write(`skipped: ${name} is not installed\n`)
  return here
}

const found = new Map<string, boolean>()
