import { rc, TpmError } from './errors.ts'
import type { LoadedKey, Tpm } from './tpm.ts'

/** Transient objects that a TPM without resource manager holds at least (Part 2, TPM_PT_HR_TRANSIENT_MIN). */
const slots = 3

/**
 * Knows what is loaded, and flushes what was used longest ago when room is needed: a handle that is not in the ledger is a leak. Not for concurrent use: within
 * `tpm.exclusive` only.
 */
export class Ledger {
  readonly #tpm: Tpm
  readonly #loaded = new Map<string, LoadedKey>()
  /** Loads in progress: what they need must not be flushed under them. */
  readonly #pinned = new Set<string>()

  constructor(tpm: Tpm) {
    this.#tpm = tpm
  }

  /** The object of that name, loaded if it is not. */
  async use(name: string, load: () => Promise<LoadedKey>): Promise<LoadedKey> {
    const known = this.#loaded.get(name)
    if (known !== undefined) {
      this.#loaded.delete(name)
      this.#loaded.set(name, known)
      return known
    }
    await this.makeRoom()
    for (;;) {
      try {
        const key = await load()
        this.#loaded.set(name, key)
        return key
      } catch (error) {
        if (!(error instanceof TpmError && error.code === rc.objectMemory) || !(await this.#evict())) throw error
      }
    }
  }

  /** Frees a slot. `except`: what must stay. */
  async makeRoom(...except: readonly string[]): Promise<void> {
    for (const name of except) this.#pinned.add(name)
    try {
      while (this.#loaded.size >= slots && (await this.#evict()));
    } finally {
      for (const name of except) this.#pinned.delete(name)
    }
  }

  async #evict(): Promise<boolean> {
    const oldest = [...this.#loaded.keys()].find((name) => !this.#pinned.has(name))
    const key = oldest === undefined ? undefined : this.#loaded.get(oldest)
    if (oldest === undefined || key === undefined) return false
    this.#loaded.delete(oldest)
    await this.#tpm.flush(key.handle)
    return true
  }

  /** The TPM has forgotten everything. */
  forget(): void {
    this.#loaded.clear()
  }

  async clear(): Promise<void> {
    while (await this.#evict());
  }
}
