import { createPrivateKey, createPublicKey, createSecretKey, generateKeyPairSync, randomBytes, sign, type KeyObject } from 'node:crypto'
import { chmodSync, mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms, KmsKey, KmsKeyPurpose } from '../flows/context.ts'
import { open, seal } from './cell.ts'
import { removeFile, removeLeftovers, replaceFile } from './durable.ts'
import { openMaster } from './master.ts'
import { isKeyName, isPurpose, mustMatch, purposes } from './policy.ts'
import { hasExactly, isCount } from './shape.ts'

export interface FileKmsOptions {
  /** Protects the folder; without one a key file does. */
  readonly passphrase?: Secret | undefined
  /** Where the key file is, when it should not lie beside the keys. Default `<folder>/master.key`. */
  readonly keyFile?: string | undefined
  readonly now?: () => number
  /** Nonces, salts and AES keys. EC keys come from OpenSSL's own generator. */
  readonly random?: (length: number) => Uint8Array
  readonly step?: (name: string) => void
}

const suffix = '.key.cbor'
const maxFile = 4096

interface KeyFile {
  readonly format: 'fleetkey/kms-key/1'
  readonly name: string
  readonly purpose: KmsKeyPurpose
  /** Milliseconds since 1970. */
  readonly createdAt: number
  readonly uses: number
  readonly cell: Uint8Array
}

const isKeyFile = (value: unknown): value is KeyFile =>
  hasExactly(value, ['format', 'name', 'purpose', 'createdAt', 'uses', 'cell']) &&
  value['format'] === 'fleetkey/kms-key/1' &&
  isKeyName(value['name']) &&
  isPurpose(value['purpose']) &&
  Number.isSafeInteger(value['createdAt']) &&
  isCount(value['uses'], 0, Number.MAX_SAFE_INTEGER) &&
  value['cell'] instanceof Uint8Array

interface LiveKey {
  file: KeyFile
  readonly key: KeyObject
  readonly spki: Uint8Array | null
  /** Uses so far; `file.uses` on disk is never below it. */
  uses: number
}

/** Uses are written ahead in steps, so that a crash can only leave a count that is too high. */
const usesAhead = 4096
/** Random 96-bit nonces: at most 2^32 cells per key (SP 800-38D §8.3). */
const maxWraps = 2 ** 32

const keyContext = ({ name, purpose, createdAt }: Pick<KeyFile, 'name' | 'purpose' | 'createdAt'>): Uint8Array =>
  encode(['fleetkey/kms-key/1', name, purpose, createdAt])
const wrapContext = (name: string, context: Uint8Array): Uint8Array => encode(['fleetkey/kms-wrap/1', name, context])

const generate = (purpose: KmsKeyPurpose, random: (length: number) => Uint8Array): Uint8Array =>
  purposes[purpose] === 'aes' ? random(32) : generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey.export({ type: 'pkcs8', format: 'der' })

const live = (file: KeyFile, material: Uint8Array): LiveKey => {
  if (purposes[file.purpose] === 'aes') return { file, key: createSecretKey(material), spki: null, uses: file.uses }
  const key = createPrivateKey({ key: Buffer.from(material), format: 'der', type: 'pkcs8' })
  return { file, key, spki: new Uint8Array(createPublicKey(key).export({ type: 'spki', format: 'der' })), uses: file.uses }
}

const view = ({ file, spki, uses }: LiveKey): KmsKey => ({ name: file.name, purpose: file.purpose, spki: spki?.slice() ?? null, uses })

/** Reads and opens one key file. Its name must be the one inside: a file copied over another is noticed. Throws Problem('internal'). */
const load = (folder: string, entry: string, master: KeyObject): LiveKey => {
  const path = join(folder, entry)
  const tampered = (): Problem => new Problem('internal', `${path} is damaged or was tampered with`, { reason: 'kms.tampered' })
  if (statSync(path).size > maxFile) throw tampered()
  let file: unknown
  try {
    file = decode(readFileSync(path))
  } catch {
    throw tampered()
  }
  if (!isKeyFile(file)) throw tampered()
  const material = entry === `${file.name}${suffix}` ? open(master, file.cell, keyContext(file)) : undefined
  if (material === undefined) throw tampered()
  try {
    return live(file, material)
  } finally {
    material.fill(0)
  }
}

/**
 * KMS in a folder: one file per key, AES-256-GCM under a master key from a passphrase or a key file. Private keys stay inside this
 * module as KeyObjects. Throws Problem at opening: wrong passphrase or key file (`unauthenticated`), a changed file (`internal`,
 * reason `kms.tampered`). For one process at a time: the lock of the data folder sees to that.
 */
export const openFileKms = async (folder: string, options: FileKmsOptions = {}): Promise<Kms> => {
  const { now = Date.now, random = (length) => new Uint8Array(randomBytes(length)), step = () => undefined } = options
  mkdirSync(folder, { recursive: true, mode: 0o700 })
  chmodSync(folder, 0o700)
  removeLeftovers(folder)
  const master = openMaster(folder, { passphrase: options.passphrase, keyFile: options.keyFile, random, step })
  const keys = new Map(
    readdirSync(folder)
      .filter((entry) => entry.endsWith(suffix) && !entry.startsWith('.'))
      .map((entry) => load(folder, entry, master))
      .map((key) => [key.file.name, key]),
  )
  let closed = false
  const pathOf = (name: string): string => join(folder, `${name}${suffix}`)

  const need = (name: string, purpose?: KmsKeyPurpose): LiveKey => {
    if (closed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
    const key = keys.get(name)
    if (key === undefined) throw new Problem('not-found', `no KMS key ${name}`, { reason: 'kms.no-key' })
    if (purpose !== undefined && key.file.purpose !== purpose)
      throw new Problem('forbidden', `KMS key ${name} is for ${key.file.purpose}, not for ${purpose}`, { reason: 'kms.purpose' })
    return key
  }

  const save = (key: LiveKey, uses: number): void => {
    const file = { ...key.file, uses }
    replaceFile(pathOf(file.name), encode(file))
    key.file = file
    step('kms.uses')
  }

  /**
   * Counts before the work. When the disk refuses the count, signing goes on (revocation must not depend on free space, and ECDSA has no
   * limit of uses); wrapping stops, because nonces would run out unseen.
   */
  const use = (key: LiveKey): void => {
    if (key.file.purpose === 'kek' && key.uses >= maxWraps)
      throw new Problem('unavailable', `KMS key ${key.file.name} has made its 2^32 wraps: rotate it`, { reason: 'kms.exhausted' })
    if (key.uses >= key.file.uses) {
      try {
        save(key, key.uses + usesAhead)
      } catch (cause) {
        if (key.file.purpose === 'kek') throw new Problem('unavailable', `cannot count uses of KMS key ${key.file.name}`, { reason: 'kms.disk', cause })
      }
    }
    key.uses++
  }

  const make = (name: string, purpose: KmsKeyPurpose): LiveKey => {
    const material = generate(purpose, random)
    try {
      const place = { name, purpose, createdAt: now() }
      const file: KeyFile = { format: 'fleetkey/kms-key/1', ...place, uses: 0, cell: seal(master, material, keyContext(place), random(12)) }
      replaceFile(pathOf(name), encode(file))
      const key = live(file, material)
      keys.set(name, key)
      // A crash here leaves a key nobody has used; the same create returns it.
      step('kms.key')
      return key
    } catch (cause) {
      throw new Problem('unavailable', `cannot write KMS key ${name}: ${cause instanceof Error ? cause.message : String(cause)}`, { reason: 'kms.disk', cause })
    } finally {
      material.fill(0)
    }
  }

  return {
    async create(name, purpose) {
      if (closed) throw new Problem('unavailable', 'the KMS is closed', { reason: 'kms.closed' })
      if (!isKeyName(name) || !isPurpose(purpose)) throw new Problem('malformed', 'not a name or purpose of a KMS key', { reason: 'kms.name' })
      return view(keys.has(name) ? need(name, purpose) : make(name, purpose))
    },
    async describe(name) {
      return keys.has(name) ? view(need(name)) : undefined
    },
    async list() {
      return [...keys.values()].map(view).toSorted((a, b) => (a.name < b.name ? -1 : 1))
    },
    async sign(batch) {
      // All are checked before the first is signed: a refused batch has signed nothing.
      const ready = batch.map(({ key, purpose, data }) => {
        if (purpose === 'kek') throw new Problem('forbidden', 'the KEK does not sign', { reason: 'kms.purpose' })
        const ready = { key: need(key, purpose), data }
        mustMatch(purpose, data)
        return ready
      })
      return ready.map(({ key, data }) => {
        use(key)
        return new Uint8Array(sign('sha256', data, key.key))
      })
    },
    async wrap(batch) {
      const ready = batch.map((item) => ({ ...item, key: need(item.key, 'kek') }))
      return ready.map(({ key, plaintext, context }) => {
        use(key)
        return seal(key.key, plaintext.bytes(), wrapContext(key.file.name, context), random(12))
      })
    },
    async unwrap(batch) {
      const ready = batch.map((item) => ({ ...item, key: need(item.key, 'kek') }))
      return ready.map(({ key, wrapped, context }) => {
        const plaintext = open(key.key, wrapped, wrapContext(key.file.name, context))
        if (plaintext === undefined)
          throw new Problem('internal', `wrapped by another key than ${key.file.name}, or for another context`, { reason: 'kms.unwrap' })
        try {
          return new Secret(plaintext)
        } finally {
          plaintext.fill(0)
        }
      })
    },
    async destroy(name) {
      need(name)
      removeFile(pathOf(name))
      keys.delete(name)
      // A crash in removeFile leaves the key, or a hidden file that the next start removes; after it the key is gone.
      step('kms.destroyed')
    },
    async close() {
      if (closed) return
      for (const key of keys.values()) {
        try {
          if (key.uses !== key.file.uses) save(key, key.uses)
        } catch {
          // The count on disk is higher than the true one: still a bound.
        }
      }
      closed = true
      keys.clear()
    },
  }
}
