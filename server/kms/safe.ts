import { createECDH, type KeyObject } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { openSealedShare, sealShare, type Share } from '@fleetkey/protocol/share.ts'
import type { HandedIn, Kms, Seal, SealStatus } from '../flows/context.ts'
import { replaceFile } from './durable.ts'
import type { Opened } from './open.ts'
import { isSealed, sealed } from './sealed.ts'
import { hasExactly, isCount } from './shape.ts'
import { isShareOf, masterOf, setsIn, type Splitter } from './shares.ts'
import { readHeader, type SharesSlot } from './slots.ts'

/** Gathered shares are forgotten when none has followed for so long. */
const forgetting = 15 * 60_000
/** How often it looks whether what is missing has come: at first, and after something came that did not open it. */
const looks = { missing: 1_000, refused: 30_000 } as const

/** The back end that holds the keys, once something has opened it. */
export interface Safe extends Seal {
  /** Throws Problem('unavailable', reason `kms.sealed`). */
  readonly kms: () => Kms
  close(): Promise<void>
}

export interface SafeOptions {
  readonly folder: string
  /** The back end: by what its settings name, or by the master key that shares gave. */
  readonly open: (master?: KeyObject) => Promise<Opened>
  readonly step: (name: string) => void
  /** It was opened. */
  readonly onOpen: () => void
}

/** Wrong shares since the last opening by shares, durable: ending the process does not make them forgotten. */
const wrongCount = (folder: string): { readonly value: () => number; readonly set: (count: number) => void } => {
  const path = join(folder, 'unseal.cbor')
  const format = 'fleetkey/unseal/1'
  let count = 0
  if (existsSync(path)) {
    try {
      const read: unknown = decode(readFileSync(path))
      if (hasExactly(read, ['format', 'wrong']) && read['format'] === format && isCount(read['wrong'], 0, Number.MAX_SAFE_INTEGER)) count = read['wrong']
    } catch {
      // Not by us: counting starts anew.
    }
  }
  return {
    value: () => count,
    set(next) {
      if (next === count) return
      count = next
      replaceFile(path, encode({ format, wrong: next }))
    },
  }
}

/**
 * Opens the back end, or stays sealed until it can be: by what was missing, or by shares. Throws the Problem that keeps it closed when that is nothing
 * which may still come.
 */
export const openSafe = async ({ folder, open, step, onOpen }: SafeOptions): Promise<Safe> => {
  // A damaged header is nothing that shares would mend.
  readHeader(folder)
  const mine = createECDH('prime256v1')
  mine.generateKeys()
  const recipient = new Uint8Array(mine.getPublicKey())
  const wrong = wrongCount(folder)
  const gathered = new Map<string, Map<number, Share>>()
  let opened: Opened | undefined
  let reason = ''
  let [timer, forget]: (NodeJS.Timeout | undefined)[] = []
  let closed = false
  /** It changes while something is awaited. */
  const isOpen = (): boolean => opened !== undefined

  const clear = (): void => {
    clearTimeout(forget)
    for (const shares of gathered.values()) for (const { value } of shares.values()) value.destroy()
    gathered.clear()
  }
  const take = (kms: Opened): void => {
    clearTimeout(timer)
    clear()
    opened = kms
    onOpen()
  }
  /** Looks again later: a file that comes back, a token that is put in. */
  const look = (after: number): void => {
    timer = setTimeout(() => {
      open().then(
        (kms) => (isOpen() || closed ? void kms.close() : take(kms)),
        (thrown: unknown) => {
          if (isOpen() || closed) return
          const problem = toProblem(thrown)
          reason = problem.message
          look(isSealed(problem) ? looks.missing : looks.refused)
        },
      )
    }, after)
  }
  try {
    opened = await open()
  } catch (thrown) {
    const problem = toProblem(thrown)
    if (!isSealed(problem)) throw problem
    reason = problem.message
    look(looks.missing)
  }

  const viewOf = ({ set, threshold, proofs, confirmed, only }: SharesSlot): SealStatus['sets'][number] => ({
    set,
    shares: proofs.length,
    threshold,
    confirmed,
    only,
    gathered: [...(gathered.get(set)?.keys() ?? [])].toSorted((one, other) => one - other),
  })
  const status = (): SealStatus => ({
    sealed: opened === undefined,
    reason: opened === undefined ? reason : null,
    ways: readHeader(folder)?.slots.flatMap(({ kind }) => (kind === 'shares' ? [] : [kind])) ?? [],
    sets: setsIn(folder).map(viewOf),
    wrong: wrong.value(),
    recipient,
  })

  /** The set of a share that is one of it. A wrong one is counted, durably, before it is refused. */
  const setOf = (share: Share, sets: readonly SharesSlot[]): SharesSlot => {
    const slot = sets.find(({ set }) => set === share.set)
    if (slot !== undefined && isShareOf(slot, share)) return slot
    share.value.destroy()
    try {
      wrong.set(wrong.value() + 1)
    } catch {
      // A full disk: it is counted as long as this process lives.
    }
    step('seal.wrong')
    throw slot === undefined
      ? new Problem('forbidden', `share ${share.index} is of set ${share.set}, which opens nothing here: these keys are split as ${namesOf(sets)}`, {
          reason: 'seal.share.set',
        })
      : new Problem('forbidden', `share ${share.index} of set ${share.set} is not the one that was handed out`, { reason: 'seal.share.wrong' })
  }

  const splitting = (): Splitter => {
    if (opened === undefined) throw sealed(reason)
    if (opened.shares === undefined)
      throw new Problem('unsupported', 'the keys of this back end are not opened by shares: what opens them is its own PIN or access', {
        reason: 'seal.unsupported',
      })
    return opened.shares
  }

  return {
    kms() {
      if (opened === undefined) throw sealed(`the keys are sealed: ${reason}`)
      return opened
    },
    status: () => Promise.resolve(status()),
    async unseal(bytes, reset) {
      if (isOpen()) throw new Problem('conflict', 'the keys are not sealed', { reason: 'seal.open' })
      const sets = setsIn(folder)
      if (sets.length === 0) throw new Problem('conflict', `these keys were never split into shares: ${reason}`, { reason: 'seal.no-shares' })
      const share = openSealedShare(mine, 'in', bytes)
      const slot = setOf(share, sets)
      // Only who holds a share may have the others forgotten.
      if (reset) clear()
      const shares = gathered.get(slot.set) ?? new Map<number, Share>()
      gathered.set(slot.set, shares)
      const fresh = !shares.has(share.index)
      const handedIn = (): HandedIn => ({ status: status(), set: share.set, index: share.index, fresh })
      shares.set(share.index, share)
      clearTimeout(forget)
      forget = setTimeout(clear, forgetting)
      if (shares.size < slot.threshold) return handedIn()
      const kms = await open(await masterOf(folder, slot, [...shares.values()]))
      // Two last shares at once, or a file that came back meanwhile: it is open already.
      if (isOpen() || closed) await kms.close()
      else take(kms)
      try {
        wrong.set(0)
      } catch {
        // The count stays too high.
      }
      step('seal.opened')
      return handedIn()
    },
    async split(order, to) {
      const { set, shares } = await splitting().split(order)
      try {
        return { set, shares: shares.map((share) => sealShare(to, 'out', share)) }
      } finally {
        for (const { value } of shares) value.destroy()
      }
    },
    async confirm(set) {
      splitting().confirm(set)
      return await Promise.resolve(status())
    },
    async close() {
      closed = true
      clearTimeout(timer)
      clear()
      await opened?.close()
    },
  }
}

const namesOf = (sets: readonly SharesSlot[]): string =>
  sets.map(({ set, threshold, proofs, confirmed }) => `set ${set} (${threshold} of ${proofs.length}${confirmed ? '' : ', not confirmed'})`).join(' and ')
