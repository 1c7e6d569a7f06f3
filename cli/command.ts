import { closeSync, existsSync, mkdirSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import type { ParseArgsOptionsConfig } from 'node:util'
import type { Client } from './client.ts'
import type { Output } from './output.ts'

/** Exit codes, the same for every command. */
export const exit = { ok: 0, usage: 1, remote: 2, refused: 3, partial: 4, notReady: 5 } as const

/** Options that every command takes. */
export const commonOptions = {
  server: { type: 'string' },
  'token-file': { type: 'string' },
  ca: { type: 'string' },
  data: { type: 'string' },
  json: { type: 'boolean', default: false },
  help: { type: 'boolean', short: 'h', default: false },
} as const satisfies ParseArgsOptionsConfig

export interface Invocation {
  readonly args: readonly string[]
  readonly options: Readonly<Record<string, string | boolean | readonly string[] | undefined>>
  /** Made when first asked for: commands without a server never need one. */
  readonly client: () => Client
  /** One that sends no token, to a server that may be sealed. */
  readonly sealedClient: () => Client
  readonly out: Output
  readonly data: string
}

export interface Command {
  /** `batch import` */
  readonly name: string
  /** `FILE [--signature FILE]`: what follows the name. */
  readonly usage: string
  readonly summary: string
  /** Number of positional arguments: at least, at most. */
  readonly args: readonly [number, number]
  readonly options?: ParseArgsOptionsConfig
  readonly run: (call: Invocation) => Promise<number>
}

/** The command line is wrong: exit code 1 with the usage. */
export class UsageError extends Error {
  override readonly name = 'UsageError'
}

export const text = (call: Invocation, option: string): string | undefined => {
  const value = call.options[option]
  return typeof value === 'string' ? value : undefined
}

/** A number within bounds, or a usage error that names the option. */
export const number = (call: Invocation, option: string, min: number, max: number): number | undefined => {
  const given = text(call, option)
  if (given === undefined) return undefined
  const value = Number(given)
  if (given.trim() === '' || !Number.isFinite(value) || value < min || value > max)
    throw new UsageError(`--${option} takes a number from ${min} to ${max}, not ${given}`)
  return value
}

const units: Readonly<Record<string, number>> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 }

/** `30s`, `15m`, `7d` in milliseconds. */
export const duration = (call: Invocation, option: string): number | undefined => {
  const given = text(call, option)
  if (given === undefined) return undefined
  const [, amount, unit] = /^(\d+(?:\.\d+)?)(ms|s|m|h|d)$/.exec(given) ?? []
  if (amount === undefined || unit === undefined) throw new UsageError(`--${option} takes a duration such as 30s, 15m or 7d, not ${given}`)
  return Math.round(Number(amount) * (units[unit] ?? 1))
}

/** `2027-03-31` (its end, or its start, UTC) or a full ISO 8601 time, in milliseconds since 1970. */
export const date = (call: Invocation, option: string, day: 'start' | 'end' = 'end'): number | undefined => {
  const given = text(call, option)
  if (given === undefined) return undefined
  const full = /^\d{4}-\d{2}-\d{2}$/.test(given) ? `${given}T${day === 'end' ? '23:59:59.999' : '00:00:00.000'}Z` : given
  const calendar = new Date(`${given.slice(0, 10)}T00:00:00Z`)
  const real = !Number.isNaN(calendar.getTime()) && calendar.toISOString().startsWith(given.slice(0, 10))
  const at = real && /^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d{1,3})?)?(Z|[+-]\d{2}:\d{2})$/.test(full) ? Date.parse(full) : NaN
  if (Number.isNaN(at) || at < 0) throw new UsageError(`--${option} takes a date such as 2027-03-31 or 2027-03-31T12:00:00Z, not ${given}`)
  return at
}

export const required = <T>(value: T | undefined, what: string): T => {
  if (value === undefined) throw new UsageError(`${what} is missing`)
  return value
}

const fileTrouble = (path: string, error: unknown): UsageError => new UsageError(`${path}: ${error instanceof Error ? error.message : String(error)}`)

/** A file that the command line names; one that cannot be read is a usage error. */
export const readInput = (path: string): Buffer => {
  try {
    return readFileSync(path)
  } catch (error) {
    throw fileTrouble(path, error)
  }
}

/** At most so many bytes of a file, also of one that has no end; one that cannot be read is a usage error. */
export const readStart = (path: string, most: number): Buffer => {
  let file: number | undefined
  try {
    file = openSync(path, 'r')
    const bytes = Buffer.alloc(most)
    let length = 0
    for (let read = -1; read !== 0 && length < most; length += read) read = readSync(file, bytes, length, most - length, null)
    return bytes.subarray(0, length)
  } catch (error) {
    throw fileTrouble(path, error)
  } finally {
    if (file !== undefined) closeSync(file)
  }
}

/** A new folder for results, its user's alone; one that cannot be made is a usage error. Parents first, one by one: in some places (/proc) `recursive` asks for ever. */
export const makeFolder = (path: string): void => {
  if (existsSync(path)) return
  if (dirname(path) !== path) makeFolder(dirname(path))
  try {
    mkdirSync(path, { mode: 0o700 })
  } catch (error) {
    throw fileTrouble(path, error)
  }
}

/** Writes a result where the command line wants it; a place that cannot be written is a usage error. */
export const writeResult = (path: string, content: string, mode = 0o666): void => {
  try {
    writeFileSync(path, content, { mode })
  } catch (error) {
    throw fileTrouble(path, error)
  }
}
