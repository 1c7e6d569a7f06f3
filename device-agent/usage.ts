import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { z } from 'zod'
import type { Document } from './files.ts'

/** How many messages this device has protected under one epoch of a key; never less than it did. */
export interface Usage {
  readonly key: string
  readonly epoch: number
  readonly messages: number
}

/** Counters of use, ahead of use on the medium: what a crash loses is counted as used. */
export interface UsageCounters {
  /** Counts messages under an epoch before they are made. Throws Problem('unavailable'), reason `key.exhausted`, beyond what an epoch may be used for. */
  count(key: string, epoch: number, messages?: number): Promise<void>
  /** Of these epochs those that were used, the most used first. */
  of(epochs: readonly Omit<Usage, 'messages'>[]): readonly Usage[]
  /** Drops the counters of all epochs but these: the others are erased. */
  keepOnly(epochs: readonly Omit<Usage, 'messages'>[]): Promise<void>
  /** Writes the exact counts. */
  settle(): Promise<void>
}

/** SP 800-38D §8.3: invocations of GCM under one key. Runs have keys of their own (ciphertext.ts); an application that takes the bytes may draw its nonces at random. */
export const usageLimit = 2 ** 32
/** So many messages are counted on the medium at a time. */
const block = 1_024

const Stored = z.strictObject({
  v: z.literal(1),
  epochs: z.array(z.strictObject({ key: KeyId, epoch: Epoch, messages: z.int().min(0) })).max(8_192),
})

interface Counter {
  readonly key: string
  readonly epoch: number
  used: number
  /** What the medium says: never less than `used` when a message goes out. */
  durable: number
}

/** Opens the counters. A document that cannot be read counts as none (`onLoss` is told); the server keeps the highest count it has heard. */
export const openUsage = async (of: {
  readonly document: Document
  readonly step: (name: string) => void
  readonly onLoss: (why: string) => void
}): Promise<UsageCounters> => {
  const { document, step } = of
  const counters = new Map<string, Counter>()
  let turn: Promise<unknown> = Promise.resolve()
  const nameOf = ({ key, epoch }: Omit<Usage, 'messages'>): string => `${key}/${epoch}`

  const stored = await document.load()
  if (stored !== undefined) {
    try {
      for (const { key, epoch, messages } of Stored.parse(decode(stored)).epochs)
        counters.set(nameOf({ key, epoch }), { key, epoch, used: messages, durable: messages })
    } catch (thrown) {
      of.onLoss(thrown instanceof Error ? thrown.message : String(thrown))
    }
  }

  const inTurn = async (work: () => Promise<void>): Promise<void> => {
    const mine = turn.then(work, work)
    turn = mine.catch(() => undefined)
    await mine
  }
  /** Writes the counts as they are to be, and believes them once they are there. */
  const save = async (countOf: (one: Counter) => number): Promise<void> => {
    const next = [...counters.values()].map((one) => ({ one, messages: countOf(one) }))
    await document.save(encode({ v: 1, epochs: next.map(({ one: { key, epoch }, messages }) => ({ key, epoch, messages })) }))
    for (const { one, messages } of next) one.durable = messages
    // A crash here: counted ahead of use; what was not used counts as used.
    step('usage.counted')
  }
  const ahead = ({ used, durable }: Counter): number => (used > durable ? used + block : durable)

  return {
    async count(key, epoch, messages = 1) {
      const name = nameOf({ key, epoch })
      const counter = counters.get(name) ?? { key, epoch, used: 0, durable: 0 }
      counters.set(name, counter)
      if (counter.used + messages > usageLimit)
        throw new Problem('unavailable', `epoch ${epoch} of ${key} has protected ${counter.used} messages: it has to be rotated`, { reason: 'key.exhausted' })
      counter.used += messages
      if (counter.used <= counter.durable) return
      await inTurn(async () => {
        if (counter.used > counter.durable) await save(ahead)
      })
    },
    of: (epochs) =>
      epochs
        .flatMap(({ key, epoch }): Usage[] => {
          const used = counters.get(nameOf({ key, epoch }))?.used ?? 0
          return used === 0 ? [] : [{ key, epoch, messages: used }]
        })
        .toSorted((one, other) => other.messages - one.messages),
    async keepOnly(epochs) {
      const kept = new Set(epochs.map(nameOf))
      const gone = [...counters.keys()].filter((name) => !kept.has(name))
      for (const name of gone) counters.delete(name)
      if (gone.length > 0) await inTurn(async () => await save(ahead))
    },
    async settle() {
      if ([...counters.values()].some(({ used, durable }) => used !== durable)) await inTurn(async () => await save(({ used }) => used))
    },
  }
}
