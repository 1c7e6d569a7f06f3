import { argon2Sync, createSecretKey, type KeyObject } from 'node:crypto'
import { existsSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import { removeFile, replaceFile } from './durable.ts'
import { sealed } from './sealed.ts'
import { makeCheck, putMaster, readHeader, takeMaster, writeHeader, type Cost, type Header, type Slot } from './slots.ts'

/** RFC 9106 §4, second recommended option: 64 MiB, three passes, four lanes. */
const cost = { memory: 65_536, passes: 3, parallelism: 4 } as const

export interface MasterOptions {
  readonly passphrase?: Secret | undefined
  /** Default `<folder>/master.key`. */
  readonly keyFile?: string | undefined
  readonly random: (length: number) => Uint8Array
  readonly step: (name: string) => void
}

const derive = (passphrase: Secret, header: Cost & { readonly salt: Uint8Array }): KeyObject => {
  const { salt, memory, passes, parallelism } = header
  const derived = argon2Sync('argon2id', { message: passphrase.bytes(), nonce: salt, parallelism, tagLength: 32, memory, passes })
  try {
    return createSecretKey(derived)
  } finally {
    derived.fill(0)
  }
}

/** The key file: 32 bytes, for its owner only. */
const fromFile = (path: string): KeyObject => {
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

const fresh = (random: (length: number) => Uint8Array): KeyObject => {
  const bytes = random(32)
  try {
    return createSecretKey(bytes)
  } finally {
    bytes.fill(0)
  }
}

/** A random master key, with the one way to it that was asked for. */
const make = (folder: string, keyFile: string, { passphrase, random, step }: MasterOptions): KeyObject => {
  const master = fresh(random)
  let slot: Slot
  if (passphrase === undefined) {
    if (!existsSync(keyFile)) {
      replaceFile(keyFile, random(32))
      // A crash here leaves a key file that has encrypted nothing; the next start uses it.
      step('kms.key-file')
    }
    slot = { kind: 'file', cell: putMaster(master, fromFile(keyFile), { kind: 'file' }, random(12)) }
  } else {
    const salted = { salt: random(32), ...cost }
    slot = { kind: 'passphrase', ...salted, cell: putMaster(master, derive(passphrase, salted), { kind: 'passphrase' }, random(12)) }
  }
  writeHeader(folder, { check: makeCheck(master, random(12)), slots: [slot] })
  // A crash here leaves a KMS without keys; the next start opens it.
  step('kms.header')
  return master
}

const byPassphrase = (folder: string, header: Header, passphrase: Secret): KeyObject => {
  const slot = header.slots.find(({ kind }) => kind === 'passphrase')
  if (slot?.kind !== 'passphrase') {
    if (!header.slots.some(({ kind }) => kind === 'file')) throw sealed('nothing but shares opens these keys: the passphrase is not one of the ways any more')
    throw new Problem('unauthenticated', 'this KMS is protected by a key file, not by a passphrase', { reason: 'kms.passphrase' })
  }
  const master = takeMaster(folder, header, slot, derive(passphrase, slot))
  if (master === undefined) throw new Problem('unauthenticated', 'wrong passphrase for this KMS', { reason: 'kms.passphrase' })
  return master
}

const byKeyFile = (folder: string, header: Header, keyFile: string): KeyObject => {
  const slot = header.slots.find(({ kind }) => kind === 'file')
  if (slot === undefined)
    throw sealed(
      header.slots.some(({ kind }) => kind === 'passphrase')
        ? 'these keys are protected by a passphrase: none was given'
        : 'nothing but shares opens these keys',
    )
  if (!existsSync(keyFile)) throw sealed(`the KMS key file ${keyFile} is missing`)
  const master = takeMaster(folder, header, slot, fromFile(keyFile))
  if (master === undefined) throw new Problem('unauthenticated', `${keyFile} is not the key file of this KMS`, { reason: 'kms.key-file' })
  return master
}

const keyFileIn = (folder: string): string => join(folder, 'master.key')

/** Where nothing but shares opens the keys, a key file that is still there: what a crash has kept from being removed. */
export const removeStaleKeyFile = (folder: string): void => {
  const onlyShares = readHeader(folder)?.slots.every(({ kind }) => kind === 'shares') ?? false
  if (onlyShares && existsSync(keyFileIn(folder))) removeFile(keyFileIn(folder))
}

/**
 * The key that encrypts every key of the folder, by a passphrase (Argon2id, RFC 9106) or a key file; made when there is none yet. Throws Problem: reason
 * `kms.sealed` when what would open it is missing, `unauthenticated` for a wrong passphrase or key file, `forbidden` for a key file others can read.
 */
export const openMaster = (folder: string, options: MasterOptions): KeyObject => {
  const keyFile = options.keyFile ?? keyFileIn(folder)
  const header = readHeader(folder)
  if (header === undefined) return make(folder, keyFile, options)
  return options.passphrase === undefined ? byKeyFile(folder, header, keyFile) : byPassphrase(folder, header, options.passphrase)
}
