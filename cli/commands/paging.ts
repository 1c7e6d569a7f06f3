/** Every row of a paged list, or the first `most`. */
export const everyPage = async <T>(fetch: (after: string | undefined) => Promise<{ items: T[]; next: string | null }>, most = Infinity): Promise<T[]> => {
  const all: T[] = []
  let after: string | undefined
  do {
    const { items, next } = await fetch(after)
    all.push(...items)
    after = next ?? undefined
  } while (after !== undefined && all.length < most)
  return all.slice(0, most)
}
