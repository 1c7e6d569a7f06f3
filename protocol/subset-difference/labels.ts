import { createHmac } from 'node:crypto'
import type { Secret } from '../secret.ts'
import { contains, depthOf, height, leafOf, type Subset } from './tree.ts'

/** Bytes of a label. */
export const labelLength = 32
/** A member's labels: for everybody, and of every subtree that its slot is in those that hang off its path: 1 + 12 + 11 + … + 1. */
export const labelCount = 1 + (height * (height + 1)) / 2

const labelOfNode = (master: Uint8Array, node: number): Uint8Array =>
  createHmac('sha256', master)
    .update(Uint8Array.of(node >> 8, node & 0xff))
    .digest()

/** One step down the tree of Goldreich, Goldwasser and Micali: whoever has a label has those of everything below, and none above or beside. */
const child = (label: Uint8Array, bit: number): Uint8Array => createHmac('sha256', label).update(Uint8Array.of(bit)).digest()

/** Steps from the label of `from` (for one subtree) to that of `to`, a node below it. */
const descend = (label: Uint8Array, from: number, to: number): Uint8Array => {
  let at = label
  for (let left = depthOf(to) - depthOf(from) - 1; left >= 0; left--) at = child(at, (to >> left) & 1)
  return at
}

/** The server's side: label of a subset, from the generation master (32 bytes, uniform). */
export const labelOf = (master: Secret, { under, except }: Subset): Uint8Array =>
  except === 0 ? labelOfNode(master.bytes(), 0) : descend(labelOfNode(master.bytes(), under), under, except)

/** The labels of one slot, 79 × 32 bytes, in the order that `labelFor` knows. Sealed to the device once. */
export const labelsOf = (master: Secret, slot: number): Uint8Array => {
  const labels = new Uint8Array(labelCount * labelLength)
  let at = 0
  const add = (label: Uint8Array): void => {
    labels.set(label, at)
    at += labelLength
  }
  add(labelOfNode(master.bytes(), 0))
  const leaf = leafOf(slot)
  for (let depth = 0; depth < height; depth++) {
    let onPath = labelOfNode(master.bytes(), leaf >> (height - depth))
    for (let below = depth + 1; below <= height; below++) {
      const bit = (leaf >> (height - below)) & 1
      add(child(onPath, 1 - bit))
      onPath = child(onPath, bit)
    }
  }
  return labels
}

/** The member's side: label of a subset that its slot is in, from its own labels; undefined when it is in none such. */
export const labelFor = (labels: Uint8Array, slot: number, subset: Subset): Uint8Array | undefined => {
  if (!contains(subset, slot)) return undefined
  const { under, except } = subset
  if (except === 0) return labels.subarray(0, labelLength)
  const leaf = leafOf(slot)
  const depth = depthOf(under)
  // Where the way to what is excepted leaves this slot's own path.
  const off = height - depthOf(leaf ^ (except << (height - depthOf(except))))
  const before = depth * height - (depth * (depth - 1)) / 2
  const at = (1 + before + (off - depth - 1)) * labelLength
  return descend(labels.subarray(at, at + labelLength), except >> (depthOf(except) - off), except)
}
