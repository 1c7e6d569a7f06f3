import { createPrivateKey, createPublicKey, createSecretKey, generateKeyPairSync, randomBytes, sign, type KeyObject } from 'node:crypto'
import { chmodSync, mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms, KmsKeyPurpose } from '../flows/context.ts'
import { open, seal } from './cell.ts'
import { kmsOf, wrapContext, type HeldKey, type Holder } from './custody.ts'
import { removeFile, removeLeftovers, replaceFile } from './durable.ts'
import { openMaster, removeStaleKeyFile } from './master.ts'
import { isKeyName, isPurpose, purposes } from './policy.ts'
import { hasExactly, isCount } from './shape.ts'
import { splitter, type Splitter } from './shares.ts'

export interface FileKmsOptions {
  /** Protects the folder; without one a key file does. */
  readonly passphrase?: Secret | undefined
  /** Where the key file is, when it should not lie beside the keys. Default `<folder>/master.key`. */
  readonly keyFile?: string | undefined
  /** The master key, where shares gave it: neither of the two is asked for. */
  readonly master?: KeyObject | undefined
  readonly now?: () => number
  /** Nonces, salts and AES keys. EC keys come from OpenSSL's own generator. */
  readonly random?: (length: number) => Uint8Array
  readonly step?: (name: string) => void
}

/** How names of key files end. */
export const fileSuffix = '.key.cbor'
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

/** What opens the folder can be split among people. */
interface FileShares {
  readonly shares: Splitter
}

interface FileKey extends HeldKey {
  file: KeyFile
  readonly material: KeyObject
}

const keyContext = ({ name, purpose, createdAt }: Pick<KeyFile, 'name' | 'purpose' | 'createdAt'>): Uint8Array =>
  encode(['fleetkey/kms-key/1', name, purpose, createdAt])

const generate = (purpose: KmsKeyPurpose, random: (length: number) => Uint8Array): Uint8Array =>
  purposes[purpose] === 'aes' ? random(32) : generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey.export({ type: 'pkcs8', format: 'der' })

const held = (file: KeyFile, material: Uint8Array): FileKey => {
  const { name, purpose, uses: counted } = file
  if (purposes[purpose] === 'aes') return { file, place: 'file', name, purpose, counted, material: createSecretKey(material), spki: null }
  const key = createPrivateKey({ key: Buffer.from(material), format: 'der', type: 'pkcs8' })
  return { file, place: 'file', name, purpose, counted, material: key, spki: new Uint8Array(createPublicKey(key).export({ type: 'spki', format: 'der' })) }
}

/** Reads and opens one key file. Its name must be the one inside: a file copied over another is noticed. Throws Problem('internal'). */
const load = (folder: string, entry: string, master: KeyObject): FileKey => {
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
  const material = entry === `${file.name}${fileSuffix}` ? open(master, file.cell, keyContext(file)) : undefined
  if (material === undefined) throw tampered()
  try {
    return held(file, material)
  } finally {
    material.fill(0)
  }
}

/**
 * Keys in a folder: one file per key, AES-256-GCM under a master key from a passphrase or a key file. Private keys stay inside this
 * module as KeyObjects. Throws Problem at opening: passphrase or key file missing (`unavailable`, reason `kms.sealed`) or wrong (`unauthenticated`),
 * a changed file (`internal`, reason `kms.tampered`). For one process at a time: the lock of the data folder sees to that.
 */
export const openFileHolder = (folder: string, options: FileKmsOptions = {}): Holder<FileKey> & FileShares => {
  const { now = Date.now, random = (length) => new Uint8Array(randomBytes(length)), step = () => undefined } = options
  mkdirSync(folder, { recursive: true, mode: 0o700 })
  chmodSync(folder, 0o700)
  removeLeftovers(folder)
  const master = options.master ?? openMaster(folder, { passphrase: options.passphrase, keyFile: options.keyFile, random, step })
  removeStaleKeyFile(folder)
  const pathOf = (name: string): string => join(folder, `${name}${fileSuffix}`)
  return {
    shares: splitter(folder, master, { random, step }),
    keys: readdirSync(folder)
      .filter((entry) => entry.endsWith(fileSuffix) && !entry.startsWith('.'))
      .map((entry) => load(folder, entry, master)),
    async make(name, purpose) {
      const material = generate(purpose, random)
      try {
        const place = { name, purpose, createdAt: now() }
        const file: KeyFile = { format: 'fleetkey/kms-key/1', ...place, uses: 0, cell: seal(master, material, keyContext(place), random(12)) }
        replaceFile(pathOf(name), encode(file))
        const key = held(file, material)
        // A crash here leaves a key nobody has used; the same create returns it.
        step('kms.key')
        return key
      } catch (cause) {
        throw new Problem('unavailable', `cannot write KMS key ${name}: ${cause instanceof Error ? cause.message : String(cause)}`, {
          reason: 'kms.disk',
          cause,
        })
      } finally {
        material.fill(0)
      }
    },
    async sign(batch) {
      return batch.map(({ key, data }) => {
        const { buffer, byteOffset, length } = sign('sha256', data, key.material)
        return new Uint8Array(buffer, byteOffset, length)
      })
    },
    async wrap(batch) {
      return batch.map(({ key, plaintext, context }) => seal(key.material, plaintext.bytes(), wrapContext(key.name, context), random(12)))
    },
    async unwrap(batch) {
      return batch.map(({ key, wrapped, context }) => {
        const plaintext = open(key.material, wrapped, wrapContext(key.name, context))
        if (plaintext === undefined) return undefined
        try {
          return new Secret(plaintext)
        } finally {
          plaintext.fill(0)
        }
      })
    },
    count(key, uses) {
      const file = { ...key.file, uses }
      replaceFile(pathOf(key.name), encode(file))
      key.file = file
      step('kms.uses')
    },
    async destroy({ name }) {
      removeFile(pathOf(name))
      // A crash in removeFile leaves the key, or a hidden file that the next start removes; after it the key is gone.
      step('kms.destroyed')
    },
    close: async () => await Promise.resolve(),
  }
}

/** The KMS of such a folder. */
export const openFileKms = async (folder: string, options: FileKmsOptions = {}): Promise<Kms & FileShares> => {
  const holder = openFileHolder(folder, options)
  return { ...kmsOf(holder), shares: holder.shares }
}
