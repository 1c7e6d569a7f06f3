import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))

it.for([
  ['types', 'tsc', ['--noEmit']],
  ['lint', 'oxlint', ['--type-aware', '--deny-warnings', '--format=unix']],
  ['format', 'oxfmt', ['--check', '.']],
] as const)('%s', ([, program, args]) => {
  const done = spawnSync(`${root}node_modules/.bin/${program}`, args, { cwd: root, encoding: 'utf8' })
  expect(done.status === 0 ? '' : `${done.stdout}${done.stderr}`.slice(0, 5000)).toBe('')
})
