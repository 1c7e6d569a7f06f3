import { encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms, KmsKey, KmsKeyPurpose } from '../flows/context.ts'
import { isKeyName, isPurpose, mustMatch } from './policy.ts'

/** What is known of a key outside the back end that has it. */
export interface HeldKey {
  readonly name: string
  readonly purpose: KmsKeyPurpose
  /** DER SubjectPublicKeyInfo; null for a KEK. */
  readonly spki: Uint8Array | null
  /** Uses as last written: never below the true count. */
  readonly counted: number
  /** Kind of back end that has it. */
  readonly place: string
}

/** A back end: has keys and does as it is told. Who may ask for what, and how often, is decided before it is asked. */
export interface Holder<K extends HeldKey = HeldKey> {
  /** What was there at opening. */
  readonly keys: readonly K[]
  /** Durable once this resolves. Asked once for a name. */
  make(name: string, purpose: KmsKeyPurpose): Promise<K>
  /** ECDSA P-256 with SHA-256; DER signatures, in the order asked. */
  sign(batch: readonly { readonly key: K; readonly data: Uint8Array }[]): Promise<readonly Uint8Array[]>
  /** AES-256-GCM with a random nonce of 96 bits. `context` is authenticated. */
  wrap(batch: readonly { readonly key: K; readonly plaintext: Secret; readonly context: Uint8Array }[]): Promise<readonly Uint8Array[]>
  /** Undefined where a wrap was changed, or made by another key or for another context. */
  unwrap(batch: readonly { readonly key: K; readonly wrapped: Uint8Array; readonly context: Uint8Array }[]): Promise<readonly (Secret | undefined)[]>
  /** Makes the count durable, or throws. */
  count(key: K, uses: number): void
  /** Durable once this resolves. */
  destroy(key: K): Promise<void>
  close(): Promise<void>
}

/** What is authenticated with a wrap besides its content: the key that made it, and the caller's context. */
export const wrapContext = (name: string, context: Uint8Array): Uint8Array => encode(['fleetkey/kms-wrap/1', name, context])

/** Uses are written ahead in steps, so that a crash can only leave a count that is too high. */
const usesAhead = 4096
/** Random 96-bit nonces: at most 2^32 cells per key (SP 800-38D §8.3). */
const maxWraps = 2 ** 32

/** Counts one key. */
class Uses<K extends HeldKey> {
  readonly key: K
  readonly #count: Holder<K>['count']
  #uses: number
  #counted: number

  constructor(key: K, count: Holder<K>['count']) {
    this.key = key
    this.#count = count
    this.#uses = this.#counted = key.counted
  }

  #save(uses: number): void {
    this.#count(this.key, uses)
    this.#counted = uses
  }

  /**
   * Counts before the work. When the disk refuses the count, signing goes on (revocation must not depend on free space, and ECDSA has no
   * limit of uses); wrapping stops, because nonces would run out unseen.
   */
  add(): void {
    const { name, purpose } = this.key
    if (purpose === 'kek' && this.#uses >= maxWraps)
      throw new Problem('unavailable', `KMS key ${name} has made its 2^32 wraps: rotate it`, { reason: 'kms.exhausted' })
    if (this.#uses >= this.#counted) {
      try {
        this.#save(this.#uses + usesAhead)
      } catch (cause) {
        if (purpose === 'kek') throw new Problem('unavailable', `cannot count uses of KMS key ${name}`, { reason: 'kms.disk', cause })
      }
    }
    this.#uses++
  }

  settle(): void {
    try {
      if (this.#uses !== this.#counted) this.#save(this.#uses)
    } catch {
      // The count on disk is higher than the true one: still a bound.
    }
  }

  view(): KmsKey {
    const { name, purpose, spki, place } = this.key
    return { name, purpose, spki: spki?.slice() ?? null, uses: this.#uses, place }
  }
}

/** What holds for every back end: a key is for one purpose and signs nothing else, its uses are counted, a refused batch has done nothing. */
export const kmsOf = <K extends HeldKey>(holder: Holder<K>): Kms => {
  const keys = new Map(holder.keys.map((key) => [key.name, new Uses(key, holder.count)]))
  /** Keys that are being made: whoever asks meanwhile gets the same. */
  const coming = new Map<string, Promise<Uses<K>>>()
  let closed = false

  const need = (name: string, purpose?: KmsKeyPurpose): Uses<K> => {
    if (closed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
    const uses = keys.get(name)
    if (uses === undefined) throw new Problem('not-found', `no KMS key ${name}`, { reason: 'kms.no-key' })
    if (purpose !== undefined && uses.key.purpose !== purpose)
      throw new Problem('forbidden', `KMS key ${name} is for ${uses.key.purpose}, not for ${purpose}`, { reason: 'kms.purpose' })
    return uses
  }
  const make = async (name: string, purpose: KmsKeyPurpose): Promise<Uses<K>> => {
    const uses = new Uses(await holder.make(name, purpose), holder.count)
    keys.set(name, uses)
    return uses
  }

  return {
    async create(name, purpose) {
      if (closed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
      if (!isKeyName(name) || !isPurpose(purpose)) throw new Problem('malformed', 'not a name or purpose of a KMS key', { reason: 'kms.name' })
      if (!keys.has(name)) {
        const made = coming.get(name) ?? make(name, purpose)
        coming.set(name, made)
        await made.finally(() => coming.delete(name))
      }
      return need(name, purpose).view()
    },
    async describe(name) {
      return keys.has(name) ? need(name).view() : undefined
    },
    async list() {
      return [...keys.values()].map((uses) => uses.view()).toSorted((a, b) => (a.name < b.name ? -1 : 1))
    },
    async sign(batch) {
      // All are checked before the first is signed: a refused batch has signed nothing.
      const ready = batch.map(({ key, purpose, data }) => {
        if (purpose === 'kek') throw new Problem('forbidden', 'the KEK does not sign', { reason: 'kms.purpose' })
        const uses = need(key, purpose)
        mustMatch(purpose, data)
        return { uses, data }
      })
      for (const { uses } of ready) uses.add()
      return await holder.sign(ready.map(({ uses, data }) => ({ key: uses.key, data })))
    },
    async wrap(batch) {
      const ready = batch.map(({ key, plaintext, context }) => ({ uses: need(key, 'kek'), plaintext, context }))
      for (const { uses } of ready) uses.add()
      return await holder.wrap(ready.map(({ uses, plaintext, context }) => ({ key: uses.key, plaintext, context })))
    },
    async unwrap(batch) {
      const ready = batch.map(({ key, wrapped, context }) => ({ key: need(key, 'kek').key, wrapped, context }))
      const opened = await holder.unwrap(ready)
      return opened.map((secret, at) => {
        if (secret !== undefined) return secret
        for (const other of opened) other?.destroy()
        throw new Problem('internal', `wrapped by another key than ${batch[at]?.key ?? 'this'}, or for another context`, { reason: 'kms.unwrap' })
      })
    },
    async destroy(name) {
      await holder.destroy(need(name).key)
      // Only now: one that could not be destroyed is still there for whoever tries again.
      keys.delete(name)
    },
    async close() {
      if (closed) return
      for (const uses of keys.values()) uses.settle()
      closed = true
      keys.clear()
      await holder.close()
    },
  }
}
