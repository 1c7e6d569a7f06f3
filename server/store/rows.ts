import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Changes } from '../flows/context.ts'
import { indexes, type Table, type Tables, type Verdict } from '../flows/context.ts'

/** One indexed field of a table. */
export interface Field {
  readonly name: string
  readonly unique: boolean
}

/** Indexed fields of a table, in the order of `indexes`. */
export const fieldsOf = (table: Table): readonly Field[] => fields[table]

const fields = Object.fromEntries(
  Object.entries(indexes).map(([table, kinds]): [string, readonly Field[]] => [
    table,
    Object.entries(kinds).map(([name, kind]) => ({ name, unique: kind === 'unique' })),
  ]),
) as unknown as Readonly<Record<Table, readonly Field[]>>

export const tableNames = Object.keys(indexes) as readonly Table[]

/** What an index holds for a row: its text, or null for a field that is not set (which no search finds and no uniqueness refuses). */
export const indexedValue = (row: object, field: string): string | null => {
  const value: unknown = (row as Readonly<Record<string, unknown>>)[field]
  return typeof value === 'string' ? value : null
}

/** A row as deterministic CBOR. Throws Problem('internal') for what would not come back the same: undefined, NaN, infinite. */
export const encodeRow = <T extends Table>(table: T, row: Tables[T], version: number): Uint8Array => {
  const fault = unstorable(row)
  if (fault !== undefined) throw new Problem('internal', `${table} ${row.id}: ${fault}`, { reason: 'store.row' })
  return encode({ ...row, version })
}

/** The row back, its byte fields as Uint8Array of their own (a Buffer would share memory when it is sliced). */
export const decodeRow = <T extends Table>(bytes: Uint8Array): Tables[T] => decode(Uint8Array.from(bytes)) as Tables[T]

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
    const fault = unstorable(entry)
    if (fault !== undefined) throw new Problem('internal', `audit entry: ${fault}`, { reason: 'store.row' })
  }
}

/** Greatest code point: nothing with this prefix sorts after `prefix + lastOfPrefix`. */
export const lastOfPrefix = '\u{10ffff}'
