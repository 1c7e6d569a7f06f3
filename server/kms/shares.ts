import { createHash, createSecretKey, timingSafeEqual, type KeyObject } from 'node:crypto'
import { combine, split } from 'shamir-secret-sharing'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { shareLength, type Share } from '@fleetkey/protocol/share.ts'
import type { SplitOrder } from '../flows/context.ts'
import { removeStaleKeyFile } from './master.ts'
import { putMaster, readHeader, takeMaster, writeHeader, type Header, type SharesSlot, type Slot } from './slots.ts'

/**
 * Shamir's shares of a key that is a way to the master key. The library checks nothing: a wrong share would only give a wrong key. So each share has a proof
 * in the header, and what they give together has to open the cell there.
 */
const proofOf = ({ set, index, value }: Share): Uint8Array =>
  createHash('sha256').update(`fleetkey/1/share-proof ${set} ${index} `).update(value.bytes()).digest()

const isShares = (slot: Slot): slot is SharesSlot => slot.kind === 'shares'

/** Sets of shares that open the keys of this folder: the one in force, and one that nobody has confirmed yet. */
export const setsIn = (folder: string): readonly SharesSlot[] => readHeader(folder)?.slots.filter(isShares) ?? []

/** Whether it is a share of this set, to the bit. */
export const isShareOf = ({ set, proofs }: SharesSlot, share: Share): boolean => {
  const proof = proofs[share.index - 1]
  return share.set === set && share.value.length === shareLength && proof !== undefined && timingSafeEqual(proof, proofOf(share))
}

const wiped = (bytes: Uint8Array): KeyObject => {
  try {
    return createSecretKey(bytes)
  } finally {
    bytes.fill(0)
  }
}

/** The master key from as many proven shares as their set asks for. Throws Problem('internal') when the header does not fit them. */
export const masterOf = async (folder: string, slot: SharesSlot, shares: readonly Share[]): Promise<KeyObject> => {
  // The library asks for its own class of bytes, no subclass.
  const key = wiped(await combine(shares.slice(0, slot.threshold).map(({ value }) => Uint8Array.from(value.bytes()))))
  const header = readHeader(folder)
  const master = header === undefined ? undefined : takeMaster(folder, header, slot, key)
  if (master === undefined) throw new Problem('internal', `the header of ${folder} does not fit its own shares`, { reason: 'kms.tampered' })
  return master
}

export interface NewSet {
  readonly set: string
  readonly shares: readonly Share[]
}

/** Makes and confirms sets of shares, while the master key is at hand. */
export interface Splitter {
  /** A new set, beside the one in force until it is confirmed; one that was never confirmed gives way to it. */
  split(order: SplitOrder): Promise<NewSet>
  /** Only this set opens the keys from now on, besides the other ways, or instead of them. Throws Problem('not-found'). */
  confirm(set: string): void
}

export const splitter = (
  folder: string,
  master: KeyObject,
  { random, step }: { readonly random: (length: number) => Uint8Array; readonly step: (name: string) => void },
): Splitter => {
  const header = (): Header => {
    const found = readHeader(folder)
    if (found === undefined) throw new Problem('internal', `${folder} has lost its header: restore it`, { reason: 'kms.tampered' })
    return found
  }
  return {
    async split({ shares, threshold, only }) {
      const set = Buffer.from(random(8)).toString('hex')
      const secret = Uint8Array.from(random(32))
      const parts = await split(secret, shares, threshold)
      const made = parts.map((part, at) => ({ set, index: at + 1, value: new Secret(part) }))
      for (const part of parts) part.fill(0)
      const cell = putMaster(master, wiped(secret), { kind: 'shares', set }, random(12))
      const slot: SharesSlot = { kind: 'shares', set, threshold, proofs: made.map(proofOf), confirmed: false, only, cell }
      const { check, slots } = header()
      writeHeader(folder, { check, slots: [...slots.filter((one) => !isShares(one) || one.confirmed), slot] })
      // A crash here: a set that nobody has, beside the one in force; the next split takes its place.
      step('seal.split')
      return { set, shares: made }
    },
    confirm(set) {
      const { check, slots } = header()
      const slot = slots.find((one) => isShares(one) && one.set === set)
      if (slot === undefined || !isShares(slot)) throw new Problem('not-found', `no set of shares ${set}`, { reason: 'seal.set' })
      const others = slot.only ? [] : slots.filter((one) => !isShares(one))
      writeHeader(folder, { check, slots: [...others, { ...slot, confirmed: true }] })
      // A crash here leaves the new set in force, and perhaps a key file that is no way any more: the next start removes it.
      step('seal.confirmed')
      if (slot.only) removeStaleKeyFile(folder)
    },
  }
}
