/**
 * Subset difference (Naor, Naor, Lotspiech 2001): a complete binary tree whose leaves are the slots of one shard. Nodes are numbered as in a heap: the root is 1, the
 * children of i are 2i and 2i + 1, slot s is leaf 4096 + s.
 */
export const height = 12
export const slots = 1 << height

/** The slots below `under` that are not below `except`; `except` 0: all slots of the tree, nothing excepted. */
export interface Subset {
  readonly under: number
  readonly except: number
}

/** All slots: nobody is revoked, every slot was given. */
export const everybody: Subset = { under: 1, except: 0 }

export const leafOf = (slot: number): number => slots + slot

/** Root 0, leaves 12. */
export const depthOf = (node: number): number => 31 - Math.clz32(node)

/** Whether a node is this one or below it. */
export const isBelow = (node: number, above: number): boolean => {
  const steps = depthOf(node) - depthOf(above)
  return steps >= 0 && node >> steps === above
}

/** Whether a slot is one of the subset. */
export const contains = ({ under, except }: Subset, slot: number): boolean => isBelow(leafOf(slot), under) && (except === 0 || !isBelow(leafOf(slot), except))
