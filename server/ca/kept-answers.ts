import type { CertId } from '@fleetkey/protocol/x509/ocsp.ts'

export interface OcspAnswer {
  readonly bytes: Uint8Array
  /** When it was made and until when it may be relied on, milliseconds since 1970; null: for whoever asked, and nobody else. */
  readonly valid: { readonly from: number; readonly until: number } | null
}

const minute = 60_000
/** How long an answer may be relied on; half of it over, one that is wanted is made anew. Milliseconds. */
export const life = 30 * minute
/** Left when an answer that nobody made anew in time is handed out no more. */
const margin = minute
/** Answers that are kept: about 30 MB of them. */
export const maxKept = 20_000
/** Answers that one round makes anew: all of them in less than the half of their life that is left. */
const aRound = 2_000

interface Kept {
  readonly id: CertId
  /** What the certificate's row said when it was made. */
  readonly said: string
  readonly answer: OcspAnswer
  /** Somebody was given it. */
  isWanted: boolean
}

/** A certificate as a request names it: two requests may name one in different words, and each is answered in its own. */
export const nameOf = (id: CertId): string => Buffer.from(id.der).toString('latin1')

/**
 * OCSP answers that were made ahead, in memory: who was asked about last stays, whoever was asked about longest ago makes room. An answer that nobody has
 * wanted since it was made is not made again.
 */
export class KeptAnswers {
  readonly #kept = new Map<string, Kept>()

  get size(): number {
    return this.#kept.size
  }

  /** What may be handed out now, and what it was made from. */
  get(id: CertId, now: number): Pick<Kept, 'said' | 'answer'> | undefined {
    const name = nameOf(id)
    const one = this.#kept.get(name)
    if (one === undefined) return undefined
    this.#kept.delete(name)
    if (one.answer.valid === null || one.answer.valid.until - margin <= now) return undefined
    one.isWanted = true
    this.#kept.set(name, one)
    return one
  }

  put(id: CertId, of: Pick<Kept, 'said' | 'answer'>): void {
    const name = nameOf(id)
    this.#kept.delete(name)
    for (const oldest of this.#kept.keys()) {
      if (this.#kept.size < maxKept) break
      this.#kept.delete(oldest)
    }
    // Bytes of its own: those that came are part of a whole request.
    const [der, issuerNameHash, issuerKeyHash] = [id.der, id.issuerNameHash, id.issuerKeyHash].map((bytes) => Uint8Array.from(bytes)) as [
      Uint8Array,
      Uint8Array,
      Uint8Array,
    ]
    this.#kept.set(name, { ...of, id: { ...id, der, issuerNameHash, issuerKeyHash }, isWanted: false })
  }

  /** Those to be made anew now, a bounded number. Forgets those that are half over and were not wanted. */
  due(now: number): readonly CertId[] {
    const found: CertId[] = []
    for (const [name, { id, answer, isWanted }] of this.#kept) {
      if (answer.valid !== null && now - answer.valid.from < life / 2) continue
      if (!isWanted) this.#kept.delete(name)
      else if (found.push(id) >= aRound) break
    }
    return found
  }

  /** One that is no more what it was made about. */
  drop(id: CertId): void {
    this.#kept.delete(nameOf(id))
  }

  clear(): void {
    this.#kept.clear()
  }
}
