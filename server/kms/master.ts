import { argon2Sync, createSecretKey, type KeyObject } from 'node:crypto'
import { existsSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import { open, seal } from './cell.ts'
import { replaceFile } from './durable.ts'
import { hasExactly, isBytes, isCount } from './shape.ts'

/** RFC 9106 §4, second recommended option: 64 MiB, three passes, four lanes. */
const cost = { memory: 65_536, passes: 3, parallelism: 4 } as const

interface Cost {
  /** KiB. */
  readonly memory: number
  readonly passes: number
  readonly parallelism: number
}
type Header = { readonly format: 'fleetkey/kms/1'; readonly check: Uint8Array } & (
  | { readonly kind: 'file' }
  | ({ readonly kind: 'passphrase'; readonly salt: Uint8Array } & Cost)
)

/** Bounds also what a tampered header could make the process spend: 1 GiB, 64 passes. */
const isHeader = (value: unknown): value is Header => {
  const common = (header: Record<string, unknown>): boolean => header['format'] === 'fleetkey/kms/1' && isBytes(header['check'], 64)
  if (hasExactly(value, ['format', 'kind', 'check'])) return common(value) && value['kind'] === 'file'
  return (
    hasExactly(value, ['format', 'kind', 'salt', 'memory', 'passes', 'parallelism', 'check']) &&
    common(value) &&
    value['kind'] === 'passphrase' &&
    isBytes(value['salt'], 32) &&
    value['salt'].length === 32 &&
    isCount(value['memory'], 8192, 1_048_576) &&
    isCount(value['passes'], 1, 64) &&
    isCount(value['parallelism'], 1, 64)
  )
}

export interface MasterOptions {
  readonly passphrase?: Secret | undefined
  /** Default `<folder>/master.key`. */
  readonly keyFile?: string | undefined
  readonly random: (length: number) => Uint8Array
  readonly step: (name: string) => void
}

const checkContext = encode(['fleetkey/kms-check/1'])

const derive = (passphrase: Secret, header: Cost & { readonly salt: Uint8Array }): KeyObject => {
  const { salt, memory, passes, parallelism } = header
  const derived = argon2Sync('argon2id', { message: passphrase.bytes(), nonce: salt, parallelism, tagLength: 32, memory, passes })
  try {
    return createSecretKey(derived)
  } finally {
    derived.fill(0)
  }
}

/** The key file, made when there is none (and no header yet that was made with another). 32 random bytes, mode 0600. */
const fromFile = (path: string, mayMake: boolean, { random, step }: MasterOptions): KeyObject => {
  if (!existsSync(path)) {
    if (!mayMake)
      throw new Problem('unavailable', `the KMS key file ${path} is missing: restore it, no key can be opened without it`, { reason: 'kms.key-file' })
    replaceFile(path, random(32))
    // A crash here leaves a key file that has encrypted nothing; the next start uses it.
    step('kms.key-file')
  }
  const { mode } = statSync(path)
  if ((mode & 0o077) !== 0)
    throw new Problem('forbidden', `the KMS key file ${path} is readable by others (mode ${(mode & 0o777).toString(8)}): chmod 600`, {
      reason: 'kms.key-file.mode',
    })
  const bytes = readFileSync(path)
  if (bytes.length !== 32) throw new Problem('malformed', `the KMS key file ${path} does not hold 32 bytes`, { reason: 'kms.key-file' })
  try {
    return createSecretKey(bytes)
  } finally {
    bytes.fill(0)
  }
}

const readHeader = (path: string): Header | undefined => {
  if (!existsSync(path)) return undefined
  let value: unknown
  try {
    value = decode(readFileSync(path))
  } catch {
    value = undefined
  }
  if (!isHeader(value)) throw new Problem('internal', `${path} is damaged or was tampered with`, { reason: 'kms.tampered' })
  return value
}

/**
 * The key that encrypts every key of the folder: derived from the passphrase (Argon2id, RFC 9106) or kept in a key file.
 * Throws Problem: `unauthenticated` for a wrong passphrase or key file, `forbidden` for a key file others can read.
 */
export const openMaster = (folder: string, options: MasterOptions): KeyObject => {
  const path = join(folder, 'kms.cbor')
  const header = readHeader(path)
  const keyFile = options.keyFile ?? join(folder, 'master.key')
  if (header === undefined) {
    const salt = options.random(32)
    const master = options.passphrase === undefined ? fromFile(keyFile, true, options) : derive(options.passphrase, { salt, ...cost })
    const check = seal(master, new Uint8Array(0), checkContext, options.random(12))
    const made: Header =
      options.passphrase === undefined
        ? { format: 'fleetkey/kms/1', kind: 'file', check }
        : { format: 'fleetkey/kms/1', kind: 'passphrase', salt, ...cost, check }
    replaceFile(path, encode(made))
    // A crash here leaves a KMS without keys; the next start opens it.
    options.step('kms.header')
    return master
  }
  if (header.kind === 'passphrase' && options.passphrase === undefined)
    throw new Problem('unauthenticated', 'this KMS is protected by a passphrase: none was given', { reason: 'kms.passphrase' })
  if (header.kind === 'file' && options.passphrase !== undefined)
    throw new Problem('unauthenticated', 'this KMS is protected by a key file, not by a passphrase', { reason: 'kms.passphrase' })
  const master = header.kind === 'passphrase' ? derive(options.passphrase as Secret, header) : fromFile(keyFile, false, options)
  if (open(master, header.check, checkContext) === undefined)
    throw new Problem('unauthenticated', header.kind === 'passphrase' ? 'wrong passphrase for this KMS' : `${keyFile} is not the key file of this KMS`, {
      reason: header.kind === 'passphrase' ? 'kms.passphrase' : 'kms.key-file',
    })
  return master
}
