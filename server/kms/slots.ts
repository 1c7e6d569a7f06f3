import { createSecretKey, type KeyObject } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { maxShares } from '@fleetkey/protocol/share.ts'
import { open, seal } from './cell.ts'
import { replaceFile } from './durable.ts'
import { hasExactly, isBytes, isCount } from './shape.ts'

/** What Argon2id (RFC 9106) costs. */
export interface Cost {
  /** KiB. */
  readonly memory: number
  readonly passes: number
  readonly parallelism: number
}

/** One way to the master key: a cell that holds it, under the key that this way gives. Null: that key is the master key itself, as before there were slots. */
interface Way {
  readonly cell: Uint8Array | null
}
export interface FileSlot extends Way {
  readonly kind: 'file'
}
export interface PassphraseSlot extends Way, Cost {
  readonly kind: 'passphrase'
  readonly salt: Uint8Array
}
export interface SharesSlot {
  readonly kind: 'shares'
  /** 16 hex digits. */
  readonly set: string
  readonly threshold: number
  /** SHA-256 over each share, by its index: a wrong one is told at once, and none spoils the others. A share has 256 bits, which no hash gives away. */
  readonly proofs: readonly Uint8Array[]
  /** Whoever asked for the set has received it: sets before it no longer open. */
  readonly confirmed: boolean
  /** Once it is confirmed no other way is left. */
  readonly only: boolean
  readonly cell: Uint8Array
}
export type Slot = FileSlot | PassphraseSlot | SharesSlot

/** What is known of the master key: how to tell it, and every way to it. */
export interface Header {
  readonly check: Uint8Array
  readonly slots: readonly Slot[]
}

const [first, second] = ['fleetkey/kms/1', 'fleetkey/kms/2']
const maxCell = 128
const maxSlots = 4

/** Bounds also what a tampered header could make the process spend: 1 GiB, 64 passes. */
const isCost = (value: Record<string, unknown>): boolean =>
  isBytes(value['salt'], 32) &&
  value['salt'].length === 32 &&
  isCount(value['memory'], 8192, 1_048_576) &&
  isCount(value['passes'], 1, 64) &&
  isCount(value['parallelism'], 1, 64)

const isCell = (value: unknown): boolean => value === null || isBytes(value, maxCell)

const kinds: Readonly<Record<Slot['kind'], (value: unknown) => boolean>> = {
  file: (value) => hasExactly(value, ['kind', 'cell']) && isCell(value['cell']),
  passphrase: (value) => hasExactly(value, ['kind', 'salt', 'memory', 'passes', 'parallelism', 'cell']) && isCost(value) && isCell(value['cell']),
  shares: (value) =>
    hasExactly(value, ['kind', 'set', 'threshold', 'proofs', 'confirmed', 'only', 'cell']) &&
    typeof value['set'] === 'string' &&
    /^[0-9a-f]{16}$/.test(value['set']) &&
    Array.isArray(value['proofs']) &&
    isCount(value['proofs'].length, 2, maxShares) &&
    value['proofs'].every((one) => isBytes(one, 32) && one.length === 32) &&
    isCount(value['threshold'], 2, value['proofs'].length) &&
    typeof value['confirmed'] === 'boolean' &&
    typeof value['only'] === 'boolean' &&
    isBytes(value['cell'], maxCell),
}

const isSlot = (value: unknown): value is Slot => {
  const kind = typeof value === 'object' && value !== null && 'kind' in value ? value.kind : undefined
  return typeof kind === 'string' && Object.hasOwn(kinds, kind) && kinds[kind as Slot['kind']](value)
}

/** A header from before there were slots has one way, which gives the master key itself. */
const asHeader = (value: unknown): Header | undefined => {
  if (hasExactly(value, ['format', 'check', 'slots']) && value['format'] === second) {
    const { check, slots } = value
    return isBytes(check, 64) && Array.isArray(slots) && isCount(slots.length, 1, maxSlots) && slots.every(isSlot) ? { check, slots } : undefined
  }
  const old = hasExactly(value, ['format', 'kind', 'check']) || hasExactly(value, ['format', 'kind', 'salt', 'memory', 'passes', 'parallelism', 'check'])
  if (!old || value['format'] !== first || !isBytes(value['check'], 64)) return undefined
  const { format: _, check, ...way } = value
  const slot = { ...way, cell: null }
  return isSlot(slot) ? { check: check as Uint8Array, slots: [slot] } : undefined
}

const pathIn = (folder: string): string => join(folder, 'kms.cbor')

/** Undefined when there is none yet. Throws Problem('internal', reason `kms.tampered`). */
export const readHeader = (folder: string): Header | undefined => {
  const path = pathIn(folder)
  if (!existsSync(path)) return undefined
  let header: Header | undefined
  try {
    header = asHeader(decode(readFileSync(path)))
  } catch {
    header = undefined
  }
  if (header === undefined) throw new Problem('internal', `${path} is damaged or was tampered with`, { reason: 'kms.tampered' })
  return header
}

/** In one step: a crash leaves the ways there were, or the new ones. */
export const writeHeader = (folder: string, { check, slots }: Header): void => replaceFile(pathIn(folder), encode({ format: second, check, slots: [...slots] }))

const checkContext = encode(['fleetkey/kms-check/1'])
export const makeCheck = (master: KeyObject, nonce: Uint8Array): Uint8Array => seal(master, new Uint8Array(0), checkContext, nonce)

/** `of`: what else of a slot must not be changed; the set of a slot of shares. */
const cellContext = (kind: Slot['kind'], of: string): Uint8Array => encode(['fleetkey/kms-slot/2', kind, of])

/** The master key under the key of one way to it. */
export const putMaster = (master: KeyObject, under: KeyObject, of: { readonly kind: Slot['kind']; readonly set?: string }, nonce: Uint8Array): Uint8Array => {
  const bytes = master.export()
  try {
    return seal(under, bytes, cellContext(of.kind, of.set ?? ''), nonce)
  } finally {
    bytes.fill(0)
  }
}

/** The master key by this way; undefined when the key is not the right one. Throws Problem('internal') when the header was put together from two. */
export const takeMaster = (folder: string, { check }: Header, slot: Slot, under: KeyObject): KeyObject | undefined => {
  const held = slot.cell === null ? undefined : open(under, slot.cell, cellContext(slot.kind, slot.kind === 'shares' ? slot.set : ''))
  if (slot.cell !== null && held === undefined) return undefined
  const master = held === undefined ? under : createSecretKey(held)
  held?.fill(0)
  if (open(master, check, checkContext) !== undefined) return master
  if (slot.cell === null) return undefined
  throw new Problem('internal', `${pathIn(folder)} is damaged or was tampered with`, { reason: 'kms.tampered' })
}
