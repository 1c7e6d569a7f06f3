import { emptyLog, extend } from './chain.ts'
import { verifyCheckpoint, type TreeHead } from './checkpoint.ts'
import type { SequencedEntry } from './entry.ts'
import { rootOf } from './tree.ts'

/** `sequence`: the first entry that is wrong, null when the log as a whole is. `what` says what was found, for people. */
export interface LogVerdict {
  readonly ok: boolean
  readonly entries: number
  readonly sequence: number | null
  readonly what: string
}

export interface Evidence {
  /** DER SubjectPublicKeyInfo of the key that signs checkpoints. */
  readonly spki: Uint8Array
  /** Signed note about exactly these entries. */
  readonly checkpoint: string
  /** Signed notes kept from earlier: the log must still contain what they covered. */
  readonly kept: readonly string[]
}

const equal = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

/** Heads of all notes; or what is wrong with one. Kept notes come from outside: each must be signed, of the same log, and not ahead of it. */
const headsOf = ({ spki, checkpoint, kept }: Evidence): { newest: TreeHead; older: readonly TreeHead[] } | string => {
  const newest = verifyCheckpoint(checkpoint, spki)
  if (newest === undefined) return 'the checkpoint is not one, or not signed by the given key'
  const older: TreeHead[] = []
  for (const [at, note] of kept.entries()) {
    const head = verifyCheckpoint(note, spki)
    if (head === undefined) return `kept checkpoint ${at + 1} is not one, or not signed by the given key`
    if (head.origin !== newest.origin) return `kept checkpoint ${at + 1} is of another log (${head.origin})`
    if (head.size > newest.size) return `truncated: a kept checkpoint covers ${head.size} entries, the newest one ${newest.size}`
    older.push(head)
  }
  return { newest, older }
}

/**
 * Derives chain and tree again from the first entry on and compares with everything that is signed. Finds an edited, dropped, inserted,
 * swapped or cut-off entry; a log written anew after a kept checkpoint (consistency, RFC 6962 §2.1.2, here by recomputing the older root).
 */
export const verifyLog = (entries: Iterable<SequencedEntry>, evidence: Evidence): LogVerdict => {
  const heads = headsOf(evidence)
  let log = emptyLog
  const bad = (what: string, sequence: number | null = null): LogVerdict => ({ ok: false, entries: log.sequence, sequence, what })
  if (typeof heads === 'string') return bad(heads)
  const { newest, older } = heads
  const differs = (): string | undefined => {
    const head = older.find(({ size, root }) => size === log.sequence && !equal(root, rootOf(log.tree)))
    return head === undefined ? undefined : `entries up to ${head.size} are not those that a kept checkpoint covers`
  }
  const atStart = differs()
  if (atStart !== undefined) return bad(atStart)
  for (const entry of entries) {
    const expected = log.sequence + 1
    if (entry.sequence !== expected) return bad(`entry ${expected} is missing or out of place: ${entry.sequence} stands there`, expected)
    if (!equal(entry.previous, log.chain)) return bad(`entry ${expected} does not follow the one before it`, expected)
    const next = extend(log, entry)
    if (!equal(next.sequenced.chain, entry.chain)) return bad(`entry ${expected} was changed`, expected)
    log = next.head
    const early = differs()
    if (early !== undefined) return bad(early)
  }
  if (log.sequence < newest.size) return bad(`truncated: ${log.sequence} entries, the checkpoint covers ${newest.size}`, log.sequence + 1)
  if (log.sequence > newest.size) return bad(`${log.sequence - newest.size} entries beyond the signed checkpoint`, newest.size + 1)
  if (!equal(rootOf(log.tree), newest.root)) return bad('the entries are not those that the checkpoint covers')
  return { ok: true, entries: log.sequence, sequence: null, what: `${newest.origin}: ${log.sequence} entries` }
}
