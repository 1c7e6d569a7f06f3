import { Problem } from '@fleetkey/protocol/problem.ts'
import type { HeldKey, Holder } from './custody.ts'

interface JoinedKey extends HeldKey {
  readonly of: 0 | 1
  readonly key: HeldKey
}

/** What both give for a batch, in its order. */
const split = async <T extends { readonly key: JoinedKey }, R>(
  batch: readonly T[],
  work: (of: 0 | 1, part: readonly (Omit<T, 'key'> & { readonly key: HeldKey })[]) => Promise<readonly R[]>,
): Promise<readonly R[]> => {
  const parts = ([0, 1] as const).map((of) => batch.flatMap((item, at) => (item.key.of === of ? [{ at, item: { ...item, key: item.key.key } }] : [])))
  const results: R[] = []
  await Promise.all(
    parts.map(async (part, of) => {
      if (part.length === 0) return
      const done = await work(
        of as 0 | 1,
        part.map(({ item }) => item),
      )
      for (const [index, { at }] of part.entries()) results[at] = done[index] as R
    }),
  )
  return results
}

/** Two back ends as one, while keys move from one to the other: new keys are made in the first, the second has what it has until that is destroyed. */
export const joined = (first: Holder, second: Holder): Holder<JoinedKey> => {
  const both = [first, second] as const
  const twice = first.keys.find(({ name }) => second.keys.some((other) => other.name === name))
  if (twice !== undefined) throw new Problem('internal', `KMS key ${twice.name} is in two places`, { reason: 'kms.tampered' })
  const from = (of: 0 | 1, key: HeldKey): JoinedKey => ({
    name: key.name,
    purpose: key.purpose,
    spki: key.spki,
    counted: key.counted,
    place: key.place,
    of,
    key,
  })
  return {
    keys: [...first.keys.map((key) => from(0, key)), ...second.keys.map((key) => from(1, key))],
    make: async (name, purpose) => from(0, await first.make(name, purpose)),
    sign: async (batch) => await split(batch, async (of, part) => await both[of].sign(part)),
    wrap: async (batch) => await split(batch, async (of, part) => await both[of].wrap(part)),
    unwrap: async (batch) => await split(batch, async (of, part) => await both[of].unwrap(part)),
    count: ({ of, key }, uses) => both[of].count(key, uses),
    destroy: async ({ of, key }) => await both[of].destroy(key),
    async close() {
      await first.close()
      await second.close()
    },
  }
}
