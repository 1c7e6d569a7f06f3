import { createHash } from 'node:crypto'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { append, emptyTree, frontierLength, leafHash, nodeHash, rootOf, type Tree } from './tree.ts'

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
const treeOf = (leaves: readonly Uint8Array[]): Tree => leaves.reduce((tree, leaf) => append(tree, leafHash(leaf)), emptyTree)

/** The definition of RFC 6962 §2.1, word for word. */
const definition = (leaves: readonly Uint8Array[]): Uint8Array => {
  if (leaves.length === 0) return new Uint8Array(createHash('sha256').digest())
  if (leaves.length === 1) return leafHash(leaves[0] as Uint8Array)
  let k = 1
  while (k * 2 < leaves.length) k *= 2
  return nodeHash(definition(leaves.slice(0, k)), definition(leaves.slice(k)))
}

// Leaves and roots of the reference vectors of Certificate Transparency (merkle tree of the first n leaves).
const leaves = ['', '00', '10', '2021', '3031', '40414243', '5051525354555657', '606162636465666768696a6b6c6d6e6f'].map(
  (data) => new Uint8Array(Buffer.from(data, 'hex')),
)
test.each([
  [0, 'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'],
  [1, '6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d'],
  [2, 'fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125'],
  [3, 'aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77'],
  [4, 'd37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7'],
  [5, '4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4'],
  [6, '76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef'],
  [7, 'ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c'],
  [8, '5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328'],
])('root of %i leaves', (size, root) => {
  expect(hex(rootOf(treeOf(leaves.slice(0, size))))).toBe(root)
})

test('appending is the definition, and keeps one hash per set bit', () => {
  fc.assert(
    fc.property(fc.array(fc.uint8Array({ maxLength: 4 }), { maxLength: 70 }), (data) => {
      const tree = treeOf(data)
      expect(hex(rootOf(tree))).toBe(hex(definition(data)))
      expect(tree.frontier).toHaveLength(frontierLength(data.length))
      expect(tree.size).toBe(data.length)
    }),
    { numRuns: 60 },
  )
})
