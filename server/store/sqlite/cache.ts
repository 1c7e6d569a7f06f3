import type { Table, Tables } from '../../flows/context.ts'
import { decodeRow, fieldsOf } from '../rows.ts'
import type { PreparedWrite, RowQuery } from './statements.ts'

type Row = Tables[Table]

/**
 * Rows and short answers as they were read last: a device's act reads the same few rows many times (its own, its group, the key, the rotation), and reading them
 * cost more than all its cryptography. For a database that nobody else writes: whatever was written is read anew. Rows are given out frozen, or as copies where there
 * are bytes in them, which cannot be frozen. Bounded by the bytes that the rows are stored as.
 */
export interface ReadCache {
  /** The row, or that there is none. `keeps`: what was not known is known from now on. */
  get(table: Table, id: string, read: () => Uint8Array | undefined, keeps?: boolean): Row | undefined
  /** Rows with one value of one index, or all of a table, where they are few; any other search is read. */
  find(table: Table, query: RowQuery, read: () => readonly Uint8Array[]): readonly Row[]
  /** To be told of every transaction before anybody reads again, whatever became of it. */
  wrote(writes: readonly PreparedWrite[]): void
}

/** Bytes of rows from which on the older half is forgotten: one half is kept besides. */
const half = 2 << 20
/** About what an entry takes that has next to nothing in it. */
const overhead = 128
/** More rows than that are no short answer. */
const short = 64

interface Kept {
  readonly row: Row
  readonly hasBytes: boolean
  readonly size: number
}
interface Answer {
  readonly rows: readonly Kept[]
  readonly size: number
}

/** What is found in the older half moves to the younger one. `absent`: there is no such row. */
interface Half {
  readonly rows: Map<string, Kept | 'absent'>
  readonly answers: Map<string, Answer>
  /** In which answers a row is. */
  readonly within: Map<string, string[]>
  size: number
}

const emptyHalf = (): Half => ({ rows: new Map(), answers: new Map(), within: new Map(), size: 0 })

/** Frozen down to its bytes; whether it has any. */
const freeze = (value: unknown): boolean => {
  if (typeof value !== 'object' || value === null) return false
  if (value instanceof Uint8Array) return true
  let hasBytes = false
  for (const one of Object.values(value)) hasBytes = freeze(one) || hasBytes
  Object.freeze(value)
  return hasBytes
}

const copy = <V>(value: V): V => {
  if (typeof value !== 'object' || value === null) return value
  if (value instanceof Uint8Array) return new Uint8Array(value) as V
  if (Array.isArray(value)) return value.map(copy) as V
  const fresh = { ...value }
  for (const name in fresh) if (typeof fresh[name] === 'object') fresh[name] = copy(fresh[name])
  return fresh
}

const kept = (bytes: Uint8Array): Kept => {
  const row = decodeRow(bytes)
  return { row, hasBytes: freeze(row), size: bytes.length }
}

const givenOut = ({ row, hasBytes }: Kept): Row => (hasBytes ? copy(row) : row)

/** No name of a table or field has a space in it. */
const rowName = (table: Table, id: string): string => `${table} ${id}`
const answerName = (table: Table, field: string, value: string): string => `${table} ${field} ${value}`

/** How a search is known that is worth keeping; undefined for any other. */
const nameOf = (table: Table, { where, prefix, after }: RowQuery): string | undefined => {
  if (prefix !== undefined || after !== undefined) return undefined
  let name: string = table
  for (const field in where) {
    const value = where[field]
    if (value === undefined) continue
    if (name !== table) return undefined
    name = answerName(table, field, value)
  }
  return name
}

export const readCache = (): ReadCache => {
  let [young, old] = [emptyHalf(), emptyHalf()]

  const grow = (size: number): void => {
    young.size += size + overhead
    if (young.size > half) [young, old] = [emptyHalf(), young]
  }

  const keepRow = (name: string, entry: Kept | 'absent'): void => {
    young.rows.set(name, entry)
    grow(entry === 'absent' ? 0 : entry.size)
  }

  const keepAnswer = (table: Table, name: string, answer: Answer): void => {
    for (const { row } of answer.rows) {
      const id = rowName(table, row.id)
      const known = young.within.get(id)
      if (known === undefined) young.within.set(id, [name])
      else known.push(name)
    }
    young.answers.set(name, answer)
    grow(answer.size)
  }

  const forget = ({ table, id, values }: PreparedWrite): void => {
    const row = rowName(table, id)
    for (const { rows, answers, within } of [young, old]) {
      rows.delete(row)
      // Where it was found before, and where it is found from now on.
      for (const name of within.get(row) ?? []) answers.delete(name)
      within.delete(row)
      answers.delete(table)
      fieldsOf(table).forEach(({ name }, at) => {
        const value = values[at]
        if (value !== null && value !== undefined) answers.delete(answerName(table, name, value))
      })
    }
  }

  const rowNamed = (name: string): Kept | 'absent' | undefined => {
    const known = young.rows.get(name)
    if (known !== undefined) return known
    const older = old.rows.get(name)
    if (older !== undefined) keepRow(name, older)
    return older
  }
  const answerNamed = (table: Table, name: string): Answer | undefined => {
    const known = young.answers.get(name)
    if (known !== undefined) return known
    const older = old.answers.get(name)
    if (older !== undefined) keepAnswer(table, name, older)
    return older
  }

  return {
    get(table, id, read, keeps = true) {
      const name = rowName(table, id)
      const known = rowNamed(name)
      if (known !== undefined) return known === 'absent' ? undefined : givenOut(known)
      const bytes = read()
      if (!keeps) return bytes === undefined ? undefined : decodeRow(bytes)
      const entry = bytes === undefined ? 'absent' : kept(bytes)
      keepRow(name, entry)
      return entry === 'absent' ? undefined : givenOut(entry)
    },
    find(table, query, read) {
      const { limit } = query
      const name = nameOf(table, query)
      if (name === undefined) return read().map((bytes) => decodeRow(bytes))
      const known = answerNamed(table, name)
      if (known !== undefined) return known.rows.slice(0, limit).map(givenOut)
      const found = read()
      // As many as were asked for: there may be more.
      if (found.length >= limit || found.length > short) return found.map((bytes) => decodeRow(bytes))
      const rows = found.map(kept)
      keepAnswer(table, name, { rows, size: rows.reduce((sum, { size }) => sum + size + overhead, 0) })
      return rows.map(givenOut)
    },
    wrote(writes) {
      for (const write of writes) forget(write)
    },
  }
}
