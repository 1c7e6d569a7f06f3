import type { WriteStream } from 'node:tty'
import { allOf, type Counts } from './counts.ts'
import { habitNames } from './habits.ts'

const every = 1_000
/** Lines that nobody watches come less often. */
const lineEvery = 5_000

const number = (value: number): string => value.toLocaleString('en')
const kilobytes = (bytes: number): string => `${Math.round(bytes / 1_000)} kB`

/** Resident bytes for each board that is on. */
const memoryOf = (counts: Counts): number | null => {
  const { on } = allOf(counts)
  return on === 0 ? null : Math.max(0, Math.round((counts.memory.now - counts.memory.before) / on))
}

const keysOf = (counts: Counts): string =>
  Object.entries(counts.keys)
    .map(([key, epochs]) => {
      const held = Object.entries(epochs).toSorted(([one], [other]) => Number(other) - Number(one))
      return `${key} ${held.map(([epoch, boards]) => `epoch ${epoch}: ${number(boards)}`).join(', ')}`
    })
    .join('; ')

const ends = (counts: Counts, seconds: number, rate: number): string[] => [
  `${number(counts.connections)} connections, ${rate.toFixed(1)}/s; ${kilobytes(memoryOf(counts) ?? 0)} a board; ${seconds} s`,
  ...(Object.keys(counts.keys).length === 0 ? [] : [keysOf(counts)]),
]

/** The table of a terminal. */
export const tableOf = (counts: Counts, seconds: number, rate: number): readonly string[] => {
  const columns = ['boards', 'on', 'enrolled', 'connected', 'refused'] as const
  const row = (name: string, cells: readonly string[]): string => `${name.padEnd(12)}${cells.map((cell) => cell.padStart(11)).join('')}`
  const rows = habitNames.flatMap((name) => {
    const share = counts.habits[name]
    return share === undefined
      ? []
      : [
          row(
            name,
            columns.map((column) => number(share[column])),
          ),
        ]
  })
  const all = allOf(counts)
  return [
    row('', columns),
    ...rows,
    ...(rows.length > 1
      ? [
          row(
            'all',
            columns.map((column) => number(all[column])),
          ),
        ]
      : []),
    ...ends(counts, seconds, rate),
  ]
}

/** One line, for a log. */
export const lineOf = (counts: Counts, seconds: number, rate: number): string => {
  const { boards, on, enrolled, connected, refused } = allOf(counts)
  return [`${number(boards)} boards: ${on} on, ${enrolled} enrolled, ${connected} connected, ${refused} refused`, ...ends(counts, seconds, rate)].join('; ')
}

/**
 * Tells how a fleet is doing, until `stop`: a table that is drawn over, lines, or JSON objects (`counts`, `seconds`, `perBoard` in bytes). `failed` rejects when
 * it cannot be asked any more.
 */
export const progressTo = (
  out: Pick<WriteStream, 'write' | 'isTTY'>,
  of: { readonly json: boolean; readonly processes: number; readonly counts: () => Promise<Counts> },
): { readonly failed: Promise<never>; stop(): Promise<void> } => {
  const started = performance.now()
  const failed = Promise.withResolvers<never>()
  failed.promise.catch(() => undefined)
  let stopped = false
  let drawn = 0
  let before = { at: started, connections: 0 }
  const tell = async (): Promise<void> => {
    const counts = await of.counts()
    const at = performance.now()
    const seconds = Math.round((at - started) / 1_000)
    const rate = ((counts.connections - before.connections) / Math.max(1, at - before.at)) * 1_000
    before = { at, connections: counts.connections }
    if (of.json) out.write(`${JSON.stringify({ event: 'counts', seconds, processes: of.processes, perBoard: memoryOf(counts), ...counts })}\n`)
    else if (out.isTTY) {
      const lines = tableOf(counts, seconds, rate)
      out.write(`${drawn === 0 ? '' : `\u001B[${drawn}A`}${lines.map((line) => `\u001B[2K${line}\n`).join('')}\u001B[0J`)
      drawn = lines.length
    } else out.write(`${lineOf(counts, seconds, rate)}\n`)
  }
  const pause = of.json || out.isTTY ? every : lineEvery
  const stopping = Promise.withResolvers<void>()
  const loop = async (): Promise<void> => {
    while (!stopped) {
      await tell()
      await Promise.race([new Promise((resolve) => setTimeout(resolve, pause).unref()), stopping.promise])
    }
  }
  const running = loop().catch((error: unknown) => failed.reject(error instanceof Error ? error : new Error(String(error))))
  return {
    failed: failed.promise,
    async stop() {
      stopped = true
      stopping.resolve()
      await running
      await tell().catch(() => undefined)
    },
  }
}
