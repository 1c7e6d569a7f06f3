import { createCipheriv, createDecipheriv, createHmac } from 'node:crypto'
import { encode } from '../cbor.ts'
import { Problem } from '../problem.ts'
import { Secret } from '../secret.ts'
import { labelFor, labelLength, labelOf } from './labels.ts'
import { contains, depthOf, height, isBelow, type Subset } from './tree.ts'

/** What a broadcast is for. All of it is in every wrap's key, so that a wrap opens nothing in another place; `nonce`: 16 random bytes, so that no wrap's key serves twice. */
export interface BroadcastContext {
  readonly tenant: string
  readonly group: string
  readonly key: string
  readonly shard: number
  /** Of the labels. */
  readonly generation: number
  readonly epoch: number
  readonly nonce: Uint8Array
}

const tagLength = 16
const keyLength = 32
/** A key of 32 bytes under a subset's key: ciphertext and tag. */
export const wrapLength = keyLength + tagLength
const entryLength = 4 + wrapLength
/** More would not fit into one message: the shard needs labels of a new generation, which everybody present is then given a place in. */
export const maxSubsets = 900
export const maxWraps = maxSubsets * entryLength

/** Each key encrypts one message only. */
const iv = new Uint8Array(12)

const infoOf = (of: BroadcastContext): Uint8Array => encode(['fleetkey/1/subset', of.tenant, of.group, of.key, of.shard, of.generation, of.epoch, of.nonce])

const subsetBytes = ({ under, except }: Subset): Uint8Array => Uint8Array.of(under >> 8, under & 0xff, except >> 8, except & 0xff)

/**
 * HKDF-Expand with SHA-256, one block (RFC 5869 §2.3): of info ‖ subset ‖ 1, in one piece because every call into the runtime counts. Extract is skipped: a label is
 * uniform. No step of the tree has an input this long.
 */
const wrapKey = (label: Uint8Array, input: Uint8Array): Uint8Array => createHmac('sha256', label).update(input).digest()

/** The input of `wrapKey`, its subset at `subsetAt`. */
const inputOf = (context: BroadcastContext): { readonly input: Uint8Array; readonly subsetAt: number } => {
  const info = infoOf(context)
  return { input: Buffer.concat([info, new Uint8Array(4), Uint8Array.of(1)]), subsetAt: info.length }
}

/** The key wrapped for every subset of the cover: under (2 bytes) ‖ except (2) ‖ wrap (48), one after the other. `master`: of the generation. */
export const wrapFor = (master: Secret, subsets: readonly Subset[], material: Secret, context: BroadcastContext): Uint8Array => {
  const { input, subsetAt } = inputOf(context)
  const wraps = new Uint8Array(subsets.length * entryLength)
  for (const [at, subset] of subsets.entries()) {
    const name = subsetBytes(subset)
    const label = labelOf(master, subset)
    input.set(name, subsetAt)
    const key = wrapKey(label, input)
    const cipher = createCipheriv('aes-256-gcm', key, iv)
    wraps.set(name, at * entryLength)
    // A stream: nothing is left for `final` to give.
    wraps.set(cipher.update(material.bytes()), at * entryLength + 4)
    cipher.final()
    wraps.set(cipher.getAuthTag(), at * entryLength + 4 + keyLength)
    label.fill(0)
    key.fill(0)
  }
  return wraps
}

const isSubset = ({ under, except }: Subset): boolean =>
  except === 0 ? under === 1 : under >= 1 && depthOf(under) < height && depthOf(except) <= height && except > under && isBelow(except, under)

/** The entry that this slot is in, with its subset; undefined when there is none. Throws Problem('malformed'). */
const entryFor = (wraps: Uint8Array, slot: number): { readonly subset: Subset; readonly entry: Uint8Array } | undefined => {
  if (wraps.length % entryLength !== 0 || wraps.length > maxWraps)
    throw new Problem('malformed', `wraps of ${wraps.length} bytes`, { reason: 'broadcast.length' })
  for (let at = 0; at < wraps.length; at += entryLength) {
    const entry = wraps.subarray(at, at + entryLength)
    const [a = 0, b = 0, c = 0, d = 0] = entry
    const subset: Subset = { under: (a << 8) | b, except: (c << 8) | d }
    if (!isSubset(subset)) throw new Problem('malformed', `no subset ${subset.under} without ${subset.except}`, { reason: 'broadcast.subset' })
    if (contains(subset, slot)) return { subset, entry }
  }
  return undefined
}

/** Whether the wraps are for this slot as well. */
export const isFor = (wraps: Uint8Array, slot: number): boolean => entryFor(wraps, slot) !== undefined

/**
 * The key that `wrapFor` wrapped, with the labels of one slot. Undefined when this slot is in none of the subsets: it is not for this member. Throws Problem:
 * `malformed`, or `unauthenticated` when it is for this slot and does not open (other labels, another context, altered).
 */
export const openWraps = (wraps: Uint8Array, labels: Uint8Array, slot: number, context: BroadcastContext): Secret | undefined => {
  const found = entryFor(wraps, slot)
  if (found === undefined) return undefined
  const { subset, entry } = found
  const label = labelFor(labels, slot, subset)
  if (label === undefined || label.length !== labelLength) throw new Problem('malformed', 'labels that are not whole', { reason: 'broadcast.labels' })
  const { input, subsetAt } = inputOf(context)
  input.set(entry.subarray(0, 4), subsetAt)
  const decipher = createDecipheriv('aes-256-gcm', wrapKey(label, input), iv, { authTagLength: tagLength })
  decipher.setAuthTag(entry.subarray(4 + keyLength))
  try {
    const plain = Buffer.concat([decipher.update(entry.subarray(4, 4 + keyLength)), decipher.final()])
    const secret = new Secret(plain)
    plain.fill(0)
    return secret
  } catch (cause) {
    throw new Problem('unauthenticated', 'the broadcast does not open with these labels', { reason: 'broadcast.open', cause })
  }
}
