import type { IndexOf, Query, Store, Table, Tables } from './context.ts'
import { othersFirst } from './turn.ts'

const pageSize = 1000

/** Every row that matches, page by page. For sets whose size something else bounds (one device's certificates, one batch). */
export const findAll = async <T extends Table>(store: Store, table: T, query: Omit<Query<T>, 'limit' | 'after'> = {}): Promise<readonly Tables[T][]> => {
  const rows: Tables[T][] = []
  for (;;) {
    const last = rows.at(-1)
    const page: readonly Tables[T][] = await store.find(table, { ...query, ...(last === undefined ? {} : { after: last.id }), limit: pageSize } as Query<T>)
    rows.push(...page)
    if (page.length < pageSize) return rows
  }
}

/** Rows of a set without a bound that are read before others have their turn. */
const turnSize = 100

/**
 * Every row that matches, a page at a time, for sets that have no bound: other work has its turn between two pages, so nothing of this belongs into a commit. What is
 * done to the rows of a page does not change which others are found.
 */
export const rowPages = async function* <T extends Table>(
  store: Store,
  table: T,
  query: Omit<Query<T>, 'limit' | 'after'> = {},
): AsyncGenerator<readonly Tables[T][], void> {
  for (let after: string | undefined; ;) {
    const page: readonly Tables[T][] = await store.find(table, { ...query, ...(after === undefined ? {} : { after }), limit: turnSize } as Query<T>)
    yield page
    after = page.at(-1)?.id
    if (page.length < turnSize) return
    await othersFirst()
  }
}

/** The same, each page handed to `work`. */
export const eachPage = async <T extends Table>(
  store: Store,
  table: T,
  query: Omit<Query<T>, 'limit' | 'after'>,
  work: (rows: readonly Tables[T][]) => Promise<void>,
): Promise<void> => {
  for await (const page of rowPages(store, table, query)) await work(page)
}

/** The first row that matches: for fields that are unique. */
export const findOne = async <T extends Table>(store: Store, table: T, where: NonNullable<Query<T>['where']>): Promise<Tables[T] | undefined> =>
  (await store.find(table, { where, limit: 1 } as Query<T>))[0]

/** Ids of the rows with one value of an index, ascending, from the index alone: for passing over many. `after`: exclusive. */
export const idsWhere = async <T extends Table>(
  store: Store,
  table: T,
  where: { readonly index: IndexOf<T>; readonly value: string; readonly after?: string | undefined; readonly limit: number },
): Promise<readonly string[]> => {
  const { index, value, after, limit } = where
  const entries = await store.scan(table, index, { from: value, to: value, limit, ...(after === undefined ? {} : { after: { value, id: after } }) })
  return entries.map(({ id }) => id)
}

/** Runs `work` over items, a bounded number at a time, in order within each chunk. */
export const inChunks = async <I, O>(items: readonly I[], size: number, work: (item: I, at: number) => Promise<O>): Promise<readonly O[]> => {
  const results: O[] = []
  for (let start = 0; start < items.length; start += size) {
    results.push(...(await Promise.all(items.slice(start, start + size).map((item, at) => work(item, start + at)))))
  }
  return results
}
