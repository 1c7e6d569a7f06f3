import { encode } from '@fleetkey/protocol/cbor.ts'
import type { AuditEntry, SequencedEntry } from './entry.ts'
import { append, emptyTree, leafHash, sha256, type Tree } from './tree.ts'

/** Where the log stands: number of its last entry (0: none), hash of the chain up to there, tree over all leaves. */
export interface LogHead {
  readonly sequence: number
  readonly chain: Uint8Array
  readonly tree: Tree
}

/** The chain before the first entry: 32 zero bytes. */
export const emptyLog: LogHead = { sequence: 0, chain: new Uint8Array(32), tree: emptyTree }

/** Neither a leaf (0x00) nor an inner node (0x01) of the tree. */
const chainPrefix = Uint8Array.of(2)

/** Deterministic CBOR of one entry in its place: map of the entry's fields, `sequence` and `previous` (RFC 8949 §4.2.1). `allocate`: as of `encode`. */
export const canonical = (
  entry: AuditEntry,
  place: { readonly sequence: number; readonly previous: Uint8Array },
  allocate?: (length: number) => Uint8Array,
): Uint8Array =>
  encode(
    {
      sequence: place.sequence,
      previous: place.previous,
      at: entry.at,
      caller: entry.caller,
      from: entry.from,
      action: entry.action,
      subject: entry.subject,
      outcome: entry.outcome,
      code: entry.code,
      detail: entry.detail,
    },
    allocate,
  )

/** Hash of the chain after an entry: SHA-256(0x02 ‖ canonical bytes), and these bytes hold the hash before it. */
export const chainHash = (canonicalBytes: Uint8Array): Uint8Array => sha256(chainPrefix, canonicalBytes)

/** One entry appended: the entry in its place, its canonical bytes, and the log's new head. */
export const extend = (head: LogHead, entry: AuditEntry): { readonly sequenced: SequencedEntry; readonly bytes: Uint8Array; readonly head: LogHead } => {
  const place = { sequence: head.sequence + 1, previous: head.chain }
  const bytes = canonical(entry, place, Buffer.allocUnsafe)
  const chain = chainHash(bytes)
  const { at, caller, from, action, subject, outcome, code, detail } = entry
  return {
    sequenced: { at, caller, from, action, subject, outcome, code, detail, ...place, chain },
    bytes,
    head: { sequence: place.sequence, chain, tree: append(head.tree, leafHash(bytes)) },
  }
}
