import type { Certificate } from './certificate.ts'
import { entryOf, removalOf, tbsCertList, unsignedList, type ListOrder, type UnsignedList } from './crl.ts'
import type { IssuerName } from './tbs.ts'

/**
 * Every certificate belongs to one of 16 distribution points for good: a hexadecimal digit of its serial that is random (those around it are not). A list of
 * one point has a sixteenth of the entries.
 */
export const points = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'] as const
export type Point = (typeof points)[number]
export const pointOf = (serial: string): Point => points.find((point) => point === serial[2]) ?? '0'

interface Part {
  readonly entries: Map<string, { readonly bytes: Uint8Array; readonly notAfter: number }>
  /** What happened since the last complete list, newest for each certificate. */
  readonly changes: Map<string, Uint8Array>
  /** Its entries joined; null when they have changed. */
  joined: Uint8Array | null
}

const joined = (part: Part): Uint8Array => (part.joined ??= Buffer.concat([...part.entries.values()].map(({ bytes }) => bytes)))

/** What of a certificate its lists say. */
export type Listed = Pick<Certificate, 'id' | 'status' | 'revokedAt' | 'code' | 'notAfter'>

/**
 * What one CA has revoked and not dropped yet, ready to be signed: each change is encoded once, when it happens, and joins with what lies there. In memory;
 * made again from the certificates at every start.
 */
export class RevocationList {
  readonly #parts = new Map(points.map((point): [Point, Part] => [point, { entries: new Map(), changes: new Map(), joined: null }]))

  #of(point: Point): Part {
    const part = this.#parts.get(point)
    if (part === undefined) throw new Error(`no distribution point ${point}`)
    return part
  }

  get size(): number {
    return [...this.#parts.values()].reduce((sum, { entries }) => sum + entries.size, 0)
  }

  /** Takes the certificate as it is now: revoked, on hold, or off hold at `at`. */
  put(certificate: Listed, at: number): void {
    const { id, status, notAfter } = certificate
    const part = this.#of(pointOf(id))
    if (status === 'valid') {
      // Also when it came and went between two complete lists: a delta may have shown it.
      if (!part.entries.delete(id)) return
      part.changes.set(id, removalOf(id, at))
    } else {
      const bytes = entryOf(id, certificate.revokedAt ?? at, certificate.code ?? 'unspecified')
      part.entries.set(id, { bytes, notAfter })
      part.changes.set(id, bytes)
    }
    part.joined = null
  }

  /** Points at which something happened since the last complete list. */
  changed(): readonly Point[] {
    return points.filter((point) => this.#of(point).changes.size > 0)
  }

  /** Entries of a complete list of one point, or of all. */
  complete(point: Point | null): Uint8Array {
    return point === null ? Buffer.concat([...this.#parts.values()].map(joined)) : joined(this.#of(point))
  }

  /** Entries of the delta to the last complete list. */
  delta(point: Point | null): Uint8Array {
    return Buffer.concat((point === null ? points : [point]).flatMap((one) => [...this.#of(one).changes.values()]))
  }

  /**
   * A complete list of this time was made: deltas begin anew, and certificates that had run out by then have been shown once after that and are dropped
   * (RFC 5280 §3.3).
   */
  begin(at: number): void {
    for (const part of this.#parts.values()) {
      part.changes.clear()
      for (const [serial, { notAfter }] of part.entries)
        if (notAfter < at) {
          part.entries.delete(serial)
          part.joined = null
        }
    }
  }
}

const day = 86_400_000
/** How long lists may be relied on. */
const validity = { complete: 7 * day, delta: day } as const

/** `issuing-7-delta.crl` */
export const listName = (of: { readonly authority: string; readonly point: Point | null; readonly delta: boolean }): string =>
  `${of.authority}${of.point === null ? '' : `-${of.point}`}${of.delta ? '-delta' : ''}.crl`

/** One round of a CA's lists. Times are milliseconds since 1970, of whole seconds. */
export interface RoundOrder {
  readonly authority: string
  readonly issuer: Pick<IssuerName, 'subject' | 'spki'>
  readonly number: number
  readonly at: number
  /** Complete lists with empty deltas to them, or deltas to the complete list with number `base`. */
  readonly complete: boolean
  readonly base: number
  /** URL to which the names of lists are appended. */
  readonly place: string
}

/** A list that lacks its signature. */
export interface MadeList extends UnsignedList {
  readonly name: string
  readonly number: number
  readonly thisUpdate: number
  readonly nextUpdate: number
}

/** The lists of one round, ready to be signed. After complete ones deltas begin anew. */
export const makeLists = (list: RevocationList, of: RoundOrder): readonly MadeList[] => {
  const made: MadeList[] = []
  const make = (name: string, order: Omit<ListOrder, 'number' | 'thisUpdate'>): void => {
    const { number, at: thisUpdate } = of
    made.push({ name, number, thisUpdate, nextUpdate: order.nextUpdate, ...unsignedList(tbsCertList(of.issuer, { ...order, number, thisUpdate })) })
  }
  // The root revokes a handful in its life: one list will do.
  const scopes: readonly (Point | null)[] = of.authority.startsWith('root') ? [null] : [null, ...points]
  const changed = new Set(list.changed())
  for (const point of scopes) {
    const name = listName({ authority: of.authority, point, delta: false })
    const delta = listName({ authority: of.authority, point, delta: true })
    const where = point === null ? null : `${of.place}${name}`
    if (of.complete)
      make(name, { nextUpdate: of.at + validity.complete, body: list.complete(point), base: null, point: where, freshest: `${of.place}${delta}` })
    // A delta goes with the complete list of its time as well; those where nothing happened stay as they are.
    const body = of.complete ? new Uint8Array(0) : list.delta(point)
    if (of.complete || point === null || changed.has(point))
      make(delta, { nextUpdate: of.at + validity.delta, body, base: of.base, point: where, freshest: null })
  }
  if (of.complete) list.begin(of.at)
  return made
}
