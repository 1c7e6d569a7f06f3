import type { Release } from '../fleet/device.ts'
import type { FileList } from '../attestation/ima.ts'
import type { Context, Store } from './context.ts'
import type { Transaction } from './perform.ts'

/** A maker may list this many files; what a list of them weighs is read once per process and release. */
export const maxFiles = 10_000
const remembered = 32

/** Digests of 32, 48 or 64 bytes, each after its length. Beside the release, not in it: every verdict reads the releases of its model. */
const settingId = (release: string): string => `release-files/${release}`

/** Adds the list of a new release to the commit that imports it. `files`: hex. */
export const keepFiles = (tx: Transaction, release: string, files: readonly string[]): void => {
  const value = Buffer.concat(files.map((file) => Buffer.from(file, 'hex')).flatMap((digest) => [Uint8Array.of(digest.length), digest]))
  tx.insert('setting', { id: settingId(release), value: new Uint8Array(value) })
}

const read = (value: Uint8Array): ReadonlySet<string> => {
  const files = new Set<string>()
  for (let at = 0; at < value.length;) {
    const length = value[at] ?? 0
    files.add(Buffer.from(value.subarray(at + 1, at + 1 + length)).toString('hex'))
    at += 1 + length
  }
  return files
}

/** A release never changes, so neither does what was read of it. */
const lists = new WeakMap<Store, Map<string, ReadonlySet<string>>>()

/** The files that may run under a release; `files` null when it lists none. */
export const fileListOf = async (ctx: Context, { id, files }: Release): Promise<FileList> => {
  if (files === undefined) return { id, files: null }
  const known = lists.get(ctx.store) ?? new Map<string, ReadonlySet<string>>()
  lists.set(ctx.store, known)
  const list = known.get(id) ?? read((await ctx.store.get('setting', settingId(id)))?.value ?? new Uint8Array(0))
  // The one that was used longest ago goes first.
  known.delete(id)
  known.set(id, list)
  for (const oldest of known.keys()) {
    if (known.size <= remembered) break
    known.delete(oldest)
  }
  return { id, files: list }
}
