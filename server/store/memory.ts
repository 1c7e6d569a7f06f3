import { Problem } from '@fleetkey/protocol/problem.ts'
import { emptyLog, extend } from '../audit/chain.ts'
import type { SequencedEntry } from '../audit/entry.ts'
import { rootOf } from '../audit/tree.ts'
import type { IndexEntry, Query, Range, Store, Table, Tables, Write } from '../flows/context.ts'
import { decodeRow, encodeRow, fieldsOf, indexedValue, indexNamed, requireEntries, tableNames, WriteConflict, type Field } from './rows.ts'
import { byBytes, SortedTexts } from './sorted-texts.ts'

interface Stored {
  readonly bytes: Uint8Array
  readonly version: number
  /** Indexed values, in the order of `fieldsOf`. */
  readonly values: readonly (string | null)[]
}

interface MemoryTable {
  readonly name: Table
  readonly rows: Map<string, Stored>
  /** Per indexed field: value to the ids that have it. */
  readonly byField: readonly Map<string, Set<string>>[]
  /** Per field that was ever searched: value and id of each row, in order. */
  readonly entries: Map<string, SortedTexts>
  /** Per tallied field: rows by value. */
  readonly tallies: ReadonlyMap<string, Map<string, number>>
  /** Ids in byte order, from the first search for them on. */
  ids: SortedTexts | undefined
}

/** Between value and id of an index entry: nothing sorts below it. */
const separator = '\0'

const recount = (table: MemoryTable, field: string, from: string | null, to: string | null): void => {
  const counts = table.tallies.get(field)
  const change = (value: string | null, by: number): void => {
    if (value === null || counts === undefined) return
    const rows = (counts.get(value) ?? 0) + by
    if (rows === 0) counts.delete(value)
    else counts.set(value, rows)
  }
  if (from === to) return
  change(from, -1)
  change(to, 1)
}

/** Sets or removes (undefined) a row with its index values, without any check. */
const place = (table: MemoryTable, id: string, next: Stored | undefined): void => {
  const last = table.rows.get(id)
  table.byField.forEach((ids, at) => {
    const before = last?.values[at] ?? null
    const after = next?.values[at] ?? null
    if (before === after) return
    if (before !== null) {
      const set = ids.get(before)
      set?.delete(id)
      if (set?.size === 0) ids.delete(before)
    }
    if (after !== null) ids.set(after, (ids.get(after) ?? new Set()).add(id))
    const { name, tally } = fieldsOf(table.name)[at] as Field
    if (tally !== undefined) recount(table, name, before === null ? null : tally(before), after === null ? null : tally(after))
    const entries = table.entries.get(name)
    if (before !== null) entries?.remove(`${before}${separator}${id}`)
    if (after !== null) entries?.add(`${after}${separator}${id}`)
  })
  if (next === undefined) table.rows.delete(id)
  else table.rows.set(id, next)
  if (last === undefined && next !== undefined) table.ids?.add(id)
  if (last !== undefined && next === undefined) table.ids?.remove(id)
}

/** The row that a write leaves (undefined: none). Throws WriteConflict. */
const outcome = (table: MemoryTable, write: Write): { id: string; next: Stored | undefined } => {
  const id = write.do === 'delete' ? write.id : write.row.id
  const refuse = (why: 'version' | 'exists' | 'missing'): never => {
    throw new WriteConflict({ table: table.name, id, why })
  }
  const stored = table.rows.get(id)
  if (write.do === 'insert') {
    if (stored !== undefined) refuse('exists')
  } else if (stored === undefined) refuse('missing')
  else if (stored.version !== (write.do === 'delete' ? write.version : write.row.version)) refuse('version')
  if (write.do === 'delete') return { id, next: undefined }
  const { row } = write
  const version = (stored?.version ?? 0) + 1
  const values = fieldsOf(table.name).map((field, at) => {
    const { name, unique } = field
    const value = indexedValue(row, field)
    const holders = unique && value !== null ? table.byField[at]?.get(value) : undefined
    if (holders !== undefined && !holders.has(id)) throw new WriteConflict({ table: table.name, id, why: 'unique', field: name })
    return value
  })
  return { id, next: { bytes: encodeRow(table.name, row, version), version, values } }
}

/** What a memory store holds. */
interface Content {
  readonly tables: Readonly<Record<Table, MemoryTable>>
  readonly log: SequencedEntry[]
  readonly head: typeof emptyLog
}

export interface MemoryStore extends Store {
  /** Another store with what this one holds now; neither sees what happens to the other from then on. */
  fork(): MemoryStore
}

/**
 * Store in memory, for tests and trials: same rules as the durable one (rows are kept as bytes, commits are all or nothing, the audit
 * chain and tree are real), nothing of it survives the process.
 */
export const openMemoryStore = (): MemoryStore => over({ tables: emptyTables(), log: [], head: emptyLog })

const emptyTables = (): Content['tables'] =>
  Object.fromEntries(
    tableNames.map((name): [Table, MemoryTable] => [
      name,
      {
        name,
        rows: new Map(),
        byField: fieldsOf(name).map(() => new Map()),
        entries: new Map(),
        tallies: new Map(fieldsOf(name).flatMap((field) => (field.tally === undefined ? [] : [[field.name, new Map<string, number>()]]))),
        ids: undefined,
      },
    ]),
  ) as Record<Table, MemoryTable>

const copyOf = (of: Content): Content => {
  const tables = emptyTables()
  for (const { name, rows } of Object.values(of.tables)) for (const [id, row] of rows) place(tables[name], id, row)
  return { tables, log: [...of.log], head: of.head }
}

const over = ({ tables, log, head: first }: Content): MemoryStore => {
  let head = first
  let closed = false
  const open = (): void => {
    if (closed) throw new Problem('unavailable', 'the store is closed', { reason: 'store.closed' })
  }

  /** The ids that have each of the values that are asked for, fewest first. */
  const holders = (table: MemoryTable, where: Readonly<Record<string, string | undefined>>) =>
    Object.entries(where)
      .flatMap(([name, value]) => (value === undefined ? [] : [{ name, value, ids: idsBy(table, name).get(value) ?? new Set<string>() }]))
      .toSorted((one, other) => one.ids.size - other.ids.size)

  const idsBy = (table: MemoryTable, name: string): Map<string, Set<string>> =>
    table.byField[fieldsOf(table.name).indexOf(indexNamed(table.name, name))] as Map<string, Set<string>>

  const entriesBy = (table: MemoryTable, name: string): SortedTexts => {
    const known = table.entries.get(name)
    if (known !== undefined) return known
    const made = new SortedTexts([...idsBy(table, name)].flatMap(([value, ids]) => [...ids].map((id) => `${value}${separator}${id}`)))
    table.entries.set(name, made)
    return made
  }

  /** Ids in byte order, from the first that is not below `start`: all of them, or those with these values. */
  function* idsFrom(table: MemoryTable, where: Readonly<Record<string, string | undefined>>, start: string): Generator<string, void> {
    const [fewest, ...others] = holders(table, where)
    if (fewest === undefined) return yield* (table.ids ??= new SortedTexts([...table.rows.keys()])).from(start)
    if (fewest.ids.size === 0) return
    const begin = `${fewest.value}${separator}`
    for (const entry of entriesBy(table, fewest.name).from(begin + start)) {
      if (!entry.startsWith(begin)) return
      const id = entry.slice(begin.length)
      if (others.every(({ ids }) => ids.has(id))) yield id
    }
  }

  return {
    async get<T extends Table>(table: T, id: string): Promise<Tables[T] | undefined> {
      open()
      const stored = tables[table].rows.get(id)
      return stored === undefined ? undefined : decodeRow<T>(stored.bytes)
    },
    async find<T extends Table>(name: T, query: Query<T>): Promise<readonly Tables[T][]> {
      open()
      const table = tables[name]
      const { where = {}, prefix = '', after, limit } = query
      const start = after !== undefined && byBytes(after, prefix) > 0 ? after : prefix
      const found: Tables[T][] = []
      for (const id of idsFrom(table, where, start)) {
        if (id === after) continue
        if (found.length >= limit || !id.startsWith(prefix)) break
        found.push(decodeRow<T>((table.rows.get(id) as Stored).bytes))
      }
      return found
    },
    async count(name, where = {}) {
      open()
      const [fewest, ...others] = holders(tables[name], where)
      if (fewest === undefined) return tables[name].rows.size
      return others.length === 0 ? fewest.ids.size : [...fewest.ids].filter((id) => others.every(({ ids }) => ids.has(id))).length
    },
    async scan<T extends Table>(name: T, index: string, { from, to, after, limit }: Range): Promise<readonly IndexEntry[]> {
      open()
      const table = tables[name]
      const entries = entriesBy(table, index)
      const cursor = after === undefined || after.value < from ? from : `${after.value}${separator}${after.id}`
      const found: IndexEntry[] = []
      for (const entry of entries.from(cursor)) {
        const end = entry.lastIndexOf(separator)
        const [value, id] = [entry.slice(0, end), entry.slice(end + 1)]
        if (found.length === limit || byBytes(value, to) > 0) break
        if (value !== after?.value || id !== after.id) found.push({ value, id })
      }
      return found
    },
    async tally(name, index, { from, to }) {
      open()
      indexNamed(name, index, 'tally')
      const counts = [...(tables[name].tallies.get(index) ?? [])].filter(([value]) => byBytes(value, from) >= 0 && byBytes(value, to) <= 0)
      return counts.toSorted(([one], [other]) => byBytes(one, other)).map(([value, rows]) => ({ value, rows }))
    },
    async commit(changes) {
      open()
      requireEntries(changes)
      const undo: (() => void)[] = []
      try {
        for (const write of changes.writes) {
          const table = tables[write.table]
          const { id, next } = outcome(table, write)
          const last = table.rows.get(id)
          place(table, id, next)
          undo.push(() => place(table, id, last))
        }
      } catch (error) {
        for (const back of undo.toReversed()) back()
        if (error instanceof WriteConflict) return { committed: false, conflict: error.conflict }
        throw error
      }
      for (const entry of changes.entries) {
        const extended = extend(head, entry)
        head = extended.head
        log.push(extended.sequenced)
      }
      return { committed: true, sequence: head.sequence }
    },
    async audit({ after, limit }) {
      open()
      return log.slice(after, after + limit).map((entry) => ({ ...entry, previous: entry.previous.slice(), chain: entry.chain.slice() }))
    },
    async checkpoint() {
      open()
      return { size: head.tree.size, root: rootOf(head.tree), chain: head.chain.slice() }
    },
    fork: () => over(copyOf({ tables, log, head })),
    health: () => ({ writable: !closed, reason: closed ? 'the store is closed' : null }),
    async close() {
      closed = true
    },
  }
}
