import { hash } from 'node:crypto'

/**
 * Merkle tree of RFC 6962 §2.1 over SHA-256, grown at its right end. `frontier` holds the roots of the perfect subtrees that make up
 * the first `size` leaves, largest first: one per set bit of `size`, so appending touches O(log n) hashes.
 */
export interface Tree {
  readonly size: number
  readonly frontier: readonly Uint8Array[]
}

export const emptyTree: Tree = { size: 0, frontier: [] }

/** In one call, and through a string: a hash object, or a Buffer of its own, for each of so many short inputs costs more than hashing them. */
export const sha256 = (...parts: readonly Uint8Array[]): Uint8Array => {
  const text = hash('sha256', Buffer.concat(parts), 'binary')
  const digest = new Uint8Array(32)
  for (let at = 0; at < 32; at++) digest[at] = text.charCodeAt(at)
  return digest
}

const leafPrefix = Uint8Array.of(0)
const nodePrefix = Uint8Array.of(1)

/** Leaf hash: SHA-256(0x00 ‖ data). The prefix keeps a leaf from passing for an inner node (RFC 6962 §2.1). */
export const leafHash = (data: Uint8Array): Uint8Array => sha256(leafPrefix, data)

/** Inner node: SHA-256(0x01 ‖ left ‖ right). */
export const nodeHash = (left: Uint8Array, right: Uint8Array): Uint8Array => sha256(nodePrefix, left, right)

/** The tree with one more leaf hash. Every trailing set bit of the old size is a pair that is now complete. */
export const append = (tree: Tree, leaf: Uint8Array): Tree => {
  const frontier = [...tree.frontier]
  let node = leaf
  for (let size = tree.size; size % 2 === 1; size = Math.floor(size / 2)) node = nodeHash(frontier.pop() as Uint8Array, node)
  return { size: tree.size + 1, frontier: [...frontier, node] }
}

/** Root hash, 32 bytes; of the empty tree SHA-256 of nothing. */
export const rootOf = (tree: Tree): Uint8Array => {
  const [last, ...rest] = tree.frontier.toReversed()
  return last === undefined ? sha256() : rest.reduce((right, left) => nodeHash(left, right), last)
}

/** Number of hashes that a frontier of `size` leaves has. */
export const frontierLength = (size: number): number => {
  let count = 0
  for (let rest = size; rest > 0; rest = Math.floor(rest / 2)) count += rest % 2
  return count
}
