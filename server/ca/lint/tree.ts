/**
 * An element as it stands there, also when DER would not have it so: a lint must read what it complains about. Bytes are cut out when they are asked for: most
 * never are.
 */
export class Node {
  readonly tag: number
  /** Elements inside of a constructed one; empty for primitives. */
  readonly children: readonly Node[]
  readonly #source: Uint8Array
  readonly #start: number
  readonly #body: number
  readonly #end: number
  #oid: string | undefined

  constructor(source: Uint8Array, at: { readonly start: number; readonly body: number; readonly end: number }, children: readonly Node[]) {
    this.tag = source[at.start] ?? 0
    this.children = children
    this.#source = source
    this.#start = at.start
    this.#body = at.body
    this.#end = at.end
  }

  get bytes(): Uint8Array {
    return this.#source.subarray(this.#start, this.#end)
  }

  get content(): Uint8Array {
    return this.#source.subarray(this.#body, this.#end)
  }

  get length(): number {
    return this.#end - this.#body
  }

  /** Dotted form, leniently; empty for what is no OBJECT IDENTIFIER. */
  get oid(): string {
    return (this.#oid ??= this.tag === 0x06 ? dotted(this.content) : '')
  }
}

const dotted = (content: Uint8Array): string => {
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

/** How an encoding differs from DER (X.690 §10). */
export type Flaw = 'length' | 'indefinite' | 'trailing' | 'string'

export interface Tree {
  readonly root: Node
  /** Every element, the inner ones first. */
  readonly nodes: readonly Node[]
  readonly flaws: ReadonlySet<Flaw>
}

const maxDepth = 12
const none: readonly Node[] = []

/** Reads BER with single-byte tags; undefined for bytes that are not even that. */
export const treeOf = (bytes: Uint8Array): Tree | undefined => {
  const flaws = new Set<Flaw>()
  const nodes: Node[] = []
  let broken = false
  const made = (start: number, body: number, end: number, children: readonly Node[]): Node => {
    const node = new Node(bytes, { start, body, end }, children)
    nodes.push(node)
    return node
  }

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
      return { node: made(at, at + 2, next, children), next: next + 2 }
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
    const children = constructed ? list(at + header, next, depth + 1) : none
    return { node: made(at, at + header, next, children), next }
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
  return { root: root.node, nodes, flaws }
}
