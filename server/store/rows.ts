import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Changes } from '../flows/context.ts'
import { derived, indexes, tallies, type Table, type Tables, type Verdict } from '../flows/context.ts'

/** One indexed field of a table. */
export interface Field {
  readonly name: string
  readonly unique: boolean
  /** Most rows have no value, and nothing in the index. */
  readonly sparse: boolean
  /** What of a value its rows are counted by; undefined for a field that is not tallied. */
  readonly tally: ((value: string) => string) | undefined
  /** Of a field that follows from the row. */
  readonly derive: ((row: never) => string | null) | undefined
}

const own = <V>(of: object | undefined, key: string): V | undefined =>
  of !== undefined && Object.hasOwn(of, key) ? (of as Readonly<Record<string, V>>)[key] : undefined

/** Indexed fields of a table, in the order of `indexes`. */
export const fieldsOf = (table: Table): readonly Field[] => fields[table]

const fields = Object.fromEntries(
  Object.entries(indexes).map(([table, kinds]): [string, readonly Field[]] => [
    table,
    Object.entries(kinds).map(([name, kind]) => ({
      name,
      unique: kind === 'unique',
      sparse: kind === 'sparse',
      tally: own<(value: string) => string>(own<object>(tallies, table), name),
      derive: own<(row: never) => string | null>(own<object>(derived, table), name),
    })),
  ]),
) as unknown as Readonly<Record<Table, readonly Field[]>>

export const tableNames = Object.keys(indexes) as readonly Table[]

/** What an index holds for a row: its text, or null for a field that is not set (which no search finds and no uniqueness refuses). */
export const indexedValue = <T extends Table>(row: Tables[T], { name, derive }: Pick<Field, 'name' | 'derive'>): string | null => {
  const value: unknown = derive === undefined ? (row as unknown as Readonly<Record<string, unknown>>)[name] : derive(row as never)
  return typeof value === 'string' ? value : null
}

/** Throws Problem('internal') unless the table has such an index (for tallies: a tallied one). */
export const indexNamed = (table: Table, name: string, kind: 'index' | 'tally' = 'index'): Field => {
  const field = fieldsOf(table).find((one) => one.name === name)
  if (field === undefined || (kind === 'tally' && field.tally === undefined))
    throw new Problem('internal', `${table} has no ${kind} on ${name}`, { reason: 'store.index' })
  return field
}

/** A row as deterministic CBOR. Throws Problem('internal') for what would not come back the same: undefined, NaN, infinite. */
export const encodeRow = <T extends Table>(table: T, row: Tables[T], version: number): Uint8Array => {
  if (!isStorable(row)) throw new Problem('internal', `${table} ${row.id}: ${unstorable(row) ?? 'cannot be stored'}`, { reason: 'store.row' })
  return encode({ ...row, version }, Buffer.allocUnsafe)
}

/** The row back; its byte fields are Uint8Arrays of their own. */
export const decodeRow = <T extends Table>(bytes: Uint8Array): Tables[T] => decode(bytes) as Tables[T]

/** Whether the value comes back from CBOR as it is. Every row passes here: what is wrong with one is found out afterwards. */
const isStorable = (value: unknown): boolean => {
  if (typeof value === 'string' || typeof value === 'boolean' || value === null) return true
  if (typeof value === 'number') return Number.isFinite(value)
  if (typeof value !== 'object') return false
  if (value instanceof Uint8Array) return true
  for (const key in value) if (!isStorable((value as Readonly<Record<string, unknown>>)[key])) return false
  return true
}

const unstorable = (value: unknown, path = ''): string | undefined => {
  if (value === undefined) return `${path} is undefined`
  if (typeof value === 'number' && !Number.isFinite(value)) return `${path} is not a finite number`
  if (typeof value === 'bigint' || typeof value === 'function' || typeof value === 'symbol') return `${path} is a ${typeof value}`
  if (typeof value !== 'object' || value === null || value instanceof Uint8Array) return undefined
  for (const [key, item] of Object.entries(value)) {
    const fault = unstorable(item, path === '' ? key : `${path}.${key}`)
    if (fault !== undefined) return fault
  }
  return undefined
}

export type Conflict = Extract<Verdict, { committed: false }>['conflict']

/** The one write that did not apply. Thrown inside a back end's transaction, caught there: outside it is a verdict. */
export class WriteConflict extends Error {
  readonly conflict: Conflict

  constructor(conflict: Conflict) {
    super(`${conflict.table} ${conflict.id}: ${conflict.why}`)
    this.conflict = conflict
  }
}

/** Nothing changes unaudited: a commit without an entry is a mistake of the caller. Throws Problem('internal'). */
export const requireEntries = (changes: Changes): void => {
  if (changes.entries.length === 0) throw new Problem('internal', 'a commit without an audit entry', { reason: 'store.unaudited' })
  for (const entry of changes.entries) {
    if (!isStorable(entry)) throw new Problem('internal', `audit entry: ${unstorable(entry) ?? 'cannot be stored'}`, { reason: 'store.row' })
  }
}

/** Greatest code point: nothing with this prefix sorts after `prefix + lastOfPrefix`. */
export const lastOfPrefix = '\u{10ffff}'
