import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms, Seal } from '../flows/context.ts'
import { limits, readByteStrings, readHandedIn, readKey, readSeal, readSplit } from './wire.ts'

/** One request to the KMS process, repeated by whoever carries it when the process dies under it. */
export type Ask = (op: string, argument: unknown) => Promise<unknown>

/** Bytes of one frame's batch, well below what a frame may have: an item more than that goes alone. */
const share = 1 << 20

/** Cuts a batch into what fits a frame, in order. */
const pieces = <T>(items: readonly T[], size: (item: T) => number): readonly (readonly T[])[] => {
  const all: T[][] = []
  let [bytes, open]: [number, T[] | undefined] = [0, undefined]
  for (const item of items) {
    if (open === undefined || open.length === limits.batch || bytes + size(item) > share) {
      open = []
      bytes = 0
      all.push(open)
    }
    open.push(item)
    bytes += size(item)
  }
  return all
}

const together = async <T>(parts: readonly T[], ask: (part: T) => Promise<readonly Uint8Array[]>): Promise<readonly Uint8Array[]> =>
  (await Promise.all(parts.map(ask))).flat()

const mustFit = (length: number, most: number, what: string): void => {
  if (length > most) throw new Problem('malformed', `${what} of ${length} bytes`, { reason: 'kms.size' })
}

/** The port over one `ask`. What it repeats is harmless to repeat: a second signature or wrap takes the place of one that nobody has seen. */
export const kmsClient = (ask: Ask): Omit<Kms, 'close'> => ({
  create: async (name, purpose) => readKey(await ask('create', [name, purpose])),
  async describe(name) {
    const key = await ask('describe', name)
    return key === null ? undefined : readKey(key)
  },
  async list() {
    const keys = await ask('list', null)
    if (!Array.isArray(keys)) throw new Problem('internal', 'the KMS gave no list', { reason: 'kms.wire' })
    return keys.map(readKey)
  },
  async sign(batch) {
    for (const { data } of batch) mustFit(data.length, limits.frame - 1024, 'something to sign')
    return await together(
      pieces(batch, ({ data }) => data.length + 100),
      async (part) =>
        readByteStrings(
          await ask(
            'sign',
            part.map(({ key, purpose, data }) => [key, purpose, data]),
          ),
          part.length,
        ),
    )
  },
  async wrap(batch) {
    for (const { plaintext, context } of batch) {
      mustFit(plaintext.length, limits.plaintext, 'a plaintext')
      mustFit(context.length, limits.context, 'a context')
    }
    return await together(
      pieces(batch, ({ plaintext, context }) => plaintext.length + context.length + 100),
      async (part) =>
        readByteStrings(
          await ask(
            'wrap',
            part.map(({ key, plaintext, context }) => [key, plaintext.bytes(), context]),
          ),
          part.length,
        ),
    )
  },
  async unwrap(batch) {
    for (const { wrapped, context } of batch) {
      mustFit(wrapped.length, limits.plaintext + 64, 'a wrap')
      mustFit(context.length, limits.context, 'a context')
    }
    const opened = await together(
      pieces(batch, ({ wrapped, context }) => wrapped.length + context.length + 100),
      async (part) =>
        readByteStrings(
          await ask(
            'unwrap',
            part.map(({ key, wrapped, context }) => [key, wrapped, context]),
          ),
          part.length,
        ),
    )
    return opened.map((bytes) => {
      const secret = new Secret(bytes)
      bytes.fill(0)
      return secret
    })
  },
  destroy: async (name) => void (await ask('destroy', name)),
})

/** What opens the keys, over one `ask`. A split that is repeated takes the place of the one before it, whose shares nobody has. */
export const sealClient = (ask: Ask): Seal => ({
  status: async () => readSeal(await ask('seal.status', null)),
  unseal: async (share, reset) => readHandedIn(await ask('seal.unseal', [share, reset])),
  split: async ({ shares, threshold, only }, recipient) => readSplit(await ask('seal.split', [shares, threshold, only, recipient]), shares),
  confirm: async (set) => readSeal(await ask('seal.confirm', set)),
})
