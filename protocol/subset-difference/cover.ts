import { everybody, slots, type Subset } from './tree.ts'

/**
 * Disjoint subsets that hold every slot that was given and is not excluded, and no other: at most 2r - 1 for r excluded, 1.25 r on average, and twelve for the tail. Linear in the Steiner
 * tree of what is excluded. `excluded`: ascending, below `given`; slots from `given` on were given to nobody yet, and count as one excluded run: whoever gets
 * one later must not open what was sent before. `size`: slots of the tree.
 */
export const cover = (excluded: readonly number[], given: number, size = slots): readonly Subset[] => {
  const subsets: Subset[] = []
  let next = 0

  /** A node below which everything is excluded and nothing else below `node` is; 0: nothing is. What lies between is covered by whoever joins the two. */
  const walk = (node: number, first: number, width: number): number => {
    if (first >= given) return node
    const end = first + width
    if (end <= given) {
      const one = excluded[next]
      if (one === undefined || one >= end) return 0
      const other = excluded[next + 1]
      if (other === undefined || other >= end) {
        next++
        return size + one
      }
    }
    const half = width >> 1
    const left = walk(2 * node, first, half)
    const right = walk(2 * node + 1, first + half, half)
    if (left === 0 || right === 0) return left + right
    emit(2 * node, left)
    emit(2 * node + 1, right)
    return node
  }
  const emit = (under: number, except: number): void => {
    if (except !== under) subsets.push({ under, except })
  }

  const top = walk(1, 0, size)
  if (top === 0) return [everybody]
  emit(1, top)
  return subsets
}
