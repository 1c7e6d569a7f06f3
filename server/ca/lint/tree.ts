/** An element as it stands there, also when DER would not have it so: a lint must read what it complains about. */
export interface Node {
  readonly tag: number
  readonly bytes: Uint8Array
  readonly content: Uint8Array
  /** Elements inside of a constructed one; empty for primitives. */
  readonly children: readonly Node[]
}

/** How an encoding differs from DER (X.690 §10). */
export type Flaw = 'length' | 'indefinite' | 'trailing' | 'string'

export interface Tree {
  readonly root: Node
  readonly flaws: ReadonlySet<Flaw>
}

const maxDepth = 12

/** Reads BER with single-byte tags; undefined for bytes that are not even that. */
export const treeOf = (bytes: Uint8Array): Tree | undefined => {
  const flaws = new Set<Flaw>()
  let broken = false

  const read = (at: number, end: number, depth: number): { node: Node; next: number } | undefined => {
    const [tag, first] = [bytes[at], bytes[at + 1]]
    if (tag === undefined || first === undefined || at + 2 > end || (tag & 0x1f) === 0x1f || depth > maxDepth) return undefined
    let [length, header] = [first, 2]
    if (first === 0x80) {
      flaws.add('indefinite')
      const children: Node[] = []
      let next = at + 2
      while (!(bytes[next] === 0 && bytes[next + 1] === 0)) {
        const inner = read(next, end, depth + 1)
        if (inner === undefined) return undefined
        children.push(inner.node)
        next = inner.next
      }
      return { node: { tag, bytes: bytes.subarray(at, next + 2), content: bytes.subarray(at + 2, next), children }, next: next + 2 }
    }
    if (first > 0x80) {
      const count = first & 0x7f
      if (count > 4) return undefined
      header += count
      length = 0
      for (let i = 0; i < count; i++) length = length * 256 + (bytes[at + 2 + i] ?? 0)
      if (length < 0x80 || bytes[at + 2] === 0) flaws.add('length')
    }
    const next = at + header + length
    if (next > end) return undefined
    const constructed = (tag & 0x20) !== 0
    if (constructed && tag < 0x40 && tag !== 0x30 && tag !== 0x31) flaws.add('string')
    const children = constructed ? list(at + header, next, depth + 1) : []
    return { node: { tag, bytes: bytes.subarray(at, next), content: bytes.subarray(at + header, next), children }, next }
  }

  const list = (from: number, end: number, depth: number): readonly Node[] => {
    const found: Node[] = []
    for (let at = from; at < end;) {
      const one = read(at, end, depth)
      if (one === undefined) {
        broken = true
        break
      }
      found.push(one.node)
      at = one.next
    }
    return found
  }

  const root = read(0, bytes.length, 0)
  if (root === undefined || broken) return undefined
  if (root.next !== bytes.length) flaws.add('trailing')
  return { root: root.node, flaws }
}

/** Every element below, itself included. */
export const everyNode = function* (node: Node): Generator<Node> {
  yield node
  for (const child of node.children) yield* everyNode(child)
}

/** Dotted form, leniently; empty for what is no OBJECT IDENTIFIER. */
export const oidText = ({ tag, content }: Node): string => {
  if (tag !== 0x06 || content.length === 0) return ''
  const arcs: number[] = []
  let value = 0
  for (const byte of content) {
    value = value * 128 + (byte & 0x7f)
    if (byte >= 0x80) continue
    if (arcs.length === 0) arcs.push(Math.min(2, Math.floor(value / 40)), value - 40 * Math.min(2, Math.floor(value / 40)))
    else arcs.push(value)
    value = 0
  }
  return arcs.join('.')
}
