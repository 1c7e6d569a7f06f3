export interface Output {
  readonly json: boolean
  /** The result: a table on a terminal or a pipe, JSON with `--json`. */
  result(value: unknown, human: () => string): void
  /** One JSON line with `--json`, else one line of text. */
  line(value: unknown, human: string): void
  /** Progress: on stderr, and only when that is a terminal (rewritten in place). */
  progress(line: string): void
  /** Ends the progress line. */
  done(): void
  warn(line: string): void
}

export const createOutput = (json: boolean, stdout: { write(text: string): unknown }, stderr: NodeJS.WriteStream): Output => {
  let shown = false
  const clear = (): void => {
    if (shown) stderr.write('\r\x1B[2K')
    shown = false
  }
  return {
    json,
    result(value, human) {
      clear()
      stdout.write(json ? `${JSON.stringify(value, null, 2)}\n` : `${human()}\n`)
    },
    line(value, human) {
      clear()
      stdout.write(json ? `${JSON.stringify(value)}\n` : `${human}\n`)
    },
    progress(line) {
      if (!stderr.isTTY) return
      stderr.write(`\r\x1B[2K${line.slice(0, (stderr.columns ?? 80) - 1)}`)
      shown = true
    },
    done: clear,
    warn(line) {
      clear()
      stderr.write(`${line}\n`)
    },
  }
}

/** What an attacker could have put into a name must not steer the operator's terminal. */
const printable = (value: string): string => value.replaceAll(/[\p{Cc}\p{Cf}\u2028\u2029]/gu, '\uFFFD')

/** Columns as wide as their widest cell. Rows of text; the first is the heading. */
export const table = (rows: readonly (readonly string[])[]): string => {
  const safe = rows.map((row) => row.map(printable))
  const widths = (safe[0] ?? []).map((_, column) => Math.max(...safe.map((row) => (row[column] ?? '').length)))
  return safe
    .map((row) =>
      row
        .map((cell, column) => (column === row.length - 1 ? cell : cell.padEnd(widths[column] ?? 0)))
        .join('  ')
        .trimEnd(),
    )
    .join('\n')
}

/** `name: value` lines. */
export const facts = (values: Readonly<Record<string, unknown>>): string => table(Object.entries(values).map(([name, value]) => [`${name}:`, factText(value)]))

const factText = (value: unknown): string => {
  if (value === null || value === undefined) return '-'
  if (typeof value === 'string') return value
  return typeof value === 'number' || typeof value === 'boolean' ? String(value) : JSON.stringify(value)
}

/** Milliseconds since 1970 as `2026-11-23 17:04:05Z`, `-` for none. */
export const when = (at: number | null | undefined): string =>
  at === null || at === undefined
    ? '-'
    : new Date(at)
        .toISOString()
        .replace('T', ' ')
        .replace(/\.\d+Z$/, 'Z')
