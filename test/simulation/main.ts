import { fork } from 'node:child_process'
import { randomInt } from 'node:crypto'
import { availableParallelism } from 'node:os'
import { parseArgs } from 'node:util'
import { runSchedule, type Outcome } from './schedule.ts'
import { makeFleets } from './world.ts'

const usage = `usage: npm run simulate -- [--seeds N] [--first SEED] [--boards N]

Runs schedules of a simulated fleet: the real server and the real agents in virtual time, with kills, power cuts and a hostile broker
in an order that the seed decides. One seed in seven has boards with TPMs, whose firmware is updated and withdrawn. Prints what happened in each that fails; exit code 1 when one did.`

interface Order {
  readonly first: number
  readonly seeds: number
  readonly step: number
  readonly boards: number
}
type Told = Pick<Outcome, 'seed' | 'failure' | 'kills'> & { readonly trace: readonly string[] | null }

/** Every `step`th seed, in a process of its own: virtual time takes the place of all timers of a process. */
const work = async ({ first, seeds, step, boards }: Order): Promise<void> => {
  const fleets = await makeFleets(boards)
  for (let seed = first; seed < first + seeds; seed += step) {
    const { failure, kills, trace } = await runSchedule(fleets.of(seed), seed)
    const told: Told = { seed, failure, kills, trace: failure === null ? null : trace }
    process.send?.(told)
  }
  await fleets.close()
  process.disconnect?.()
}

const lead = async (): Promise<void> => {
  const { values } = parseArgs({
    options: { seeds: { type: 'string', default: '1000' }, first: { type: 'string' }, boards: { type: 'string', default: '3' }, help: { type: 'boolean' } },
  })
  if (values.help === true) return void process.stdout.write(`${usage}\n`)
  const [seeds, first, boards] = [Number(values.seeds), Number(values.first ?? randomInt(1_000_000_000)), Number(values.boards)]
  if (![seeds, first, boards].every((value) => Number.isSafeInteger(value) && value >= 0) || seeds < 1 || boards < 1 || boards > 100)
    throw new Error(`--seeds, --first and --boards are whole numbers, and boards at most 100\n\n${usage}`)
  const workers = Math.min(availableParallelism(), seeds)
  let done = 0
  let failed = 0
  let kills = 0
  const hear = (told: Told): void => {
    done++
    kills += told.kills.server + told.kills.device
    if (told.failure !== null) {
      failed++
      process.stdout.write(`\nseed ${told.seed}\n${(told.trace ?? []).join('\n')}\n\nseed ${told.seed}: ${told.failure}\n`)
    }
    if (done % 100 === 0 || done === seeds) process.stderr.write(`simulate: ${done} of ${seeds} schedules from ${first}, ${kills} kills, ${failed} failed\n`)
  }
  await Promise.all(
    Array.from(
      { length: workers },
      async (_, at) =>
        await new Promise<void>((resolve, reject) => {
          const order: Order = { first: first + at, seeds: seeds - at, step: workers, boards }
          const worker = fork(import.meta.filename, ['--worker', JSON.stringify(order)])
          worker.on('message', hear)
          worker.on('error', reject)
          worker.on('exit', (code) => (code === 0 ? resolve() : reject(new Error(`a worker ended with ${code ?? 'a signal'}`))))
        }),
    ),
  )
  process.stdout.write(`${seeds - failed} of ${seeds} schedules from ${first} hold\n`)
  if (failed > 0) process.exitCode = 1
}

const at = process.argv.indexOf('--worker')
if (at >= 0) await work(JSON.parse(process.argv[at + 1] ?? '') as Order)
else
  await lead().catch((thrown: unknown) => {
    process.stderr.write(`simulate: ${thrown instanceof Error ? thrown.message : String(thrown)}\n`)
    process.exitCode = 1
  })
