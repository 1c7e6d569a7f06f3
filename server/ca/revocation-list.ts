import type { Certificate } from './certificate.ts'
import { entryOf, removalOf } from './crl.ts'

/**
 * Every certificate belongs to one of 16 distribution points for good: a hexadecimal digit of its serial that is random (the first byte is not). A list of one
 * point has a sixteenth of the entries.
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
  put(certificate: Pick<Certificate, 'id' | 'status' | 'revokedAt' | 'code' | 'notAfter'>, at: number): void {
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
