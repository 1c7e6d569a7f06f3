import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, utimesSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { once } from 'node:events'
import { expect, test } from 'vitest'

const module = fileURLToPath(new URL('./temporary.ts', import.meta.url))

/** The same in a process of its own whose temporary folder is `place`; it ends as the code says. What it said. */
const apart = async (place: string, code: string): Promise<string> => {
  const child = spawn(process.execPath, ['--input-type=module', '-e', `import { openTemporary } from ${JSON.stringify(module)}\n${code}`], {
    env: { ...process.env, TMPDIR: place },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  let said = ''
  child.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
  await once(child, 'close')
  return said.trim()
}

test('this run and all that it starts have one temporary folder, which is in none of another run', () => {
  expect(tmpdir()).toMatch(/\/fk-\d+-[A-Za-z0-9]{6}$/)
  expect(dirname(tmpdir())).not.toMatch(/\/fk-\d/)
})

test('what a run that was killed has left, a later one removes; what is of a living one, or young, or not ours, stays', async () => {
  const place = mkdtempSync(join(tmpdir(), 'place-'))
  try {
    const left = await apart(place, 'console.log(openTemporary().folder); process.kill(process.pid, "SIGKILL")')
    const young = await apart(place, 'console.log(openTemporary().folder); process.kill(process.pid, "SIGKILL")')
    const living = join(place, `fk-${process.pid}-abcdef`)
    const other = join(place, 'fk-config-abcdef')
    for (const folder of [living, other]) mkdirSync(folder)
    const longAgo = Date.now() / 1000 - 7_200
    for (const folder of [left, living, other]) utimesSync(folder, longAgo, longAgo)
    expect(await apart(place, 'const { folder, close } = openTemporary(); console.log(process.env.TMPDIR === folder); close()')).toBe('true')
    expect([left, young, living, other].map((folder) => existsSync(folder))).toEqual([false, true, true, true])
    expect(readdirSync(place)).toHaveLength(3)
  } finally {
    rmSync(place, { recursive: true, force: true })
  }
})
