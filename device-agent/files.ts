import { createHash } from 'node:crypto'
import { join } from 'node:path'
import type { FileSystem } from './filesystem.ts'

/** One thing the agent remembers: whole or not at all, whatever happens while it is written. */
export interface Document {
  /** The newest copy that is whole; undefined when there is none (`onDamage` is told when there was one). */
  load(): Promise<Uint8Array | undefined>
  /** Resolves when the bytes are on the medium; what was there before is there until then. Rejects when they may not be. */
  save(bytes: Uint8Array): Promise<void>
  /** As `save`, and no older copy is left: for contents that something was erased from. */
  replace(bytes: Uint8Array): Promise<void>
}

const magic = Buffer.from('FKD1')
const headLength = magic.length + 8
const hashLength = 32
const maxLength = 8 << 20

const sealUp = (sequence: number, body: Uint8Array): Uint8Array => {
  const head = Buffer.alloc(headLength)
  magic.copy(head)
  head.writeBigUInt64BE(BigInt(sequence), magic.length)
  const hash = createHash('sha256').update(head).update(body).digest()
  return Buffer.concat([head, hash, body])
}

const open = (bytes: Uint8Array | undefined): { sequence: number; body: Uint8Array } | undefined => {
  if (bytes === undefined || bytes.length < headLength + hashLength || bytes.length > maxLength) return undefined
  const head = Buffer.from(bytes.subarray(0, headLength))
  if (!head.subarray(0, magic.length).equals(magic)) return undefined
  const body = bytes.subarray(headLength + hashLength)
  const hash = createHash('sha256').update(head).update(body).digest()
  if (!hash.equals(bytes.subarray(headLength, headLength + hashLength))) return undefined
  return { sequence: Number(head.readBigUInt64BE(magic.length)), body }
}

/**
 * A document in two slots that are written in turn (`NAME.a`, `NAME.b`), each with sequence and SHA-256. The older slot is replaced by a
 * temporary file that is synced, renamed over it, and made durable by syncing the folder; the newer slot is never touched.
 */
export const openDocument = (of: {
  readonly files: FileSystem
  readonly folder: string
  readonly name: string
  readonly step: (name: string) => void
  /** Both copies are there or were, and neither is whole: what was remembered is lost. */
  readonly onDamage?: (why: string) => void
}): Document => {
  const { files, folder, name, step } = of
  const slots = [join(folder, `${name}.a`), join(folder, `${name}.b`)] as const
  let sequence: number | undefined

  const load = async (): Promise<Uint8Array | undefined> => {
    const copies = await Promise.all(slots.map(async (slot) => await files.read(slot)))
    const found = copies.map(open).filter((one) => one !== undefined)
    if (found.length === 0 && copies.some((copy) => copy !== undefined)) of.onDamage?.(`no copy of ${join(folder, name)} is whole`)
    const newest = found.toSorted((one, other) => other.sequence - one.sequence)[0]
    sequence = newest?.sequence ?? 0
    return newest?.body
  }

  const save = async (bytes: Uint8Array): Promise<void> => {
    if (sequence === undefined) await load()
    const next = (sequence ?? 0) + 1
    const slot = slots[next % 2 === 0 ? 0 : 1]
    await files.write(`${slot}.new`, sealUp(next, bytes), { mode: 0o600 })
    // A crash here: the temporary file is written over by the next save; both slots are as they were.
    step(`${name}.written`)
    await files.rename(`${slot}.new`, slot)
    // A crash here: the slot holds either its old or its new content, both whole.
    step(`${name}.renamed`)
    await files.syncFolder(folder)
    sequence = next
    // A crash here: saved, and nobody was told yet.
    step(`${name}.durable`)
  }

  return {
    load,
    save,
    async replace(bytes) {
      await save(bytes)
      await save(bytes)
    },
  }
}
