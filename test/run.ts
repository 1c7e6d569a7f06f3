// `npm test`: brings the independent programs that judge us, runs every test, ends with one line of counts.
import { spawnSync } from 'node:child_process'
import { randomInt } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { installJudges } from './judges.ts'
import { vectors } from './public-vectors.ts'
import { openTemporary } from './temporary.ts'

const root = fileURLToPath(new URL('..', import.meta.url))
const { values, positionals } = parseArgs({ options: { long: { type: 'boolean', default: false } }, allowPositionals: true })

/** The part of vitest's JSON report that is read. */
interface Outcome {
  numPassedTests: number
  numFailedTests: number
  numPendingTests: number
  numTodoTests: number
  numFailedTestSuites: number
  testResults: { name: string; status: string; message: string; assertionResults: { fullName: string; status: string }[] }[]
}

installJudges()
const { folder, close } = openTemporary()
try {
  const report = join(folder, 'report.json')
  if (values.long) process.env['FLEETKEY_LONG'] = '1'
  // Hundreds of processes load the same modules: the first to load one leaves it compiled for the others.
  process.env['NODE_COMPILE_CACHE'] ??= join(folder, 'compiled')
  process.env['FLEETKEY_SEED'] ??= String(randomInt(1_000_000_000))
  const share = values.long
    ? 'full counts'
    : 'named cases whole, counted ones (mutations, schedules, properties) at a share; npm run test:long runs the full counts'
  console.log(`seed FLEETKEY_SEED=${process.env['FLEETKEY_SEED']}, ${share}`)
  const done = spawnSync(
    process.execPath,
    [join(root, 'node_modules/vitest/vitest.mjs'), 'run', '--reporter=default', '--reporter=json', `--outputFile.json=${report}`, ...positionals],
    { cwd: root, stdio: 'inherit', env: process.env },
  )
  const outcome: Outcome = JSON.parse(readFileSync(report, 'utf8'))
  const skipped = outcome.testResults.flatMap((file) => file.assertionResults.filter((test) => ['skipped', 'pending', 'todo'].includes(test.status)))
  for (const test of skipped) console.log(`skipped: ${test.fullName}`)
  // A file that does not even load has no failed test of its own.
  const broken = outcome.testResults.filter((file) => file.status === 'failed' && !file.assertionResults.some((test) => test.status === 'failed')).length
  const failed = outcome.numFailedTests + broken
  if (vectors.folder === undefined) console.log(vectors.why)
  console.log(`${outcome.numPassedTests} passed, ${failed} failed${skipped.length === 0 ? '' : `, ${skipped.length} skipped`}`)
  process.exitCode = failed > 0 || outcome.numPassedTests === 0 ? 1 : (done.status ?? 1)
} finally {
  close()
}
