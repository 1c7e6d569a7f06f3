import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { KmsKeyPurpose } from '../../flows/context.ts'
import { removeFile, replaceFile } from '../durable.ts'
import { isKeyName, isPurpose } from '../policy.ts'
import { hasExactly, isBytes, isCount } from '../shape.ts'

/** What the folder remembers of a key in AWS KMS. */
export interface KeyRecord {
  readonly format: 'fleetkey/kms-aws-key/1'
  readonly name: string
  readonly purpose: KmsKeyPurpose
  /** Names the attempt to make it, in the key's own description: a crash in the middle is found again by it. */
  readonly attempt: string
  /** The key's ARN; null while it is being made. */
  readonly arn: string | null
  /** DER SubjectPublicKeyInfo; null for a KEK, and while it is being made. */
  readonly spki: Uint8Array | null
  readonly uses: number
  /** It is being destroyed. */
  readonly ends: boolean
}

export const awsSuffix = '.aws.cbor'
const namespaceFile = 'aws-namespace.cbor'
const maxFile = 4096

const isRecord = (value: unknown): value is KeyRecord =>
  hasExactly(value, ['format', 'name', 'purpose', 'attempt', 'arn', 'spki', 'uses', 'ends']) &&
  value['format'] === 'fleetkey/kms-aws-key/1' &&
  isKeyName(value['name']) &&
  isPurpose(value['purpose']) &&
  typeof value['attempt'] === 'string' &&
  (value['arn'] === null || (typeof value['arn'] === 'string' && value['arn'].length <= 2048)) &&
  (value['spki'] === null || isBytes(value['spki'], 256)) &&
  isCount(value['uses'], 0, Number.MAX_SAFE_INTEGER) &&
  typeof value['ends'] === 'boolean'

const tampered = (path: string): Problem => new Problem('internal', `${path} is damaged or was tampered with`, { reason: 'kms.tampered' })

const readFile = (path: string): unknown => {
  try {
    if (statSync(path).size > maxFile) throw new Error('too long')
    return decode(readFileSync(path))
  } catch {
    throw tampered(path)
  }
}

/** Records of a folder, durable with every change. */
export interface Records {
  /** Tells the keys of several servers in one account apart; 16 hex digits. */
  readonly namespace: string
  all(): readonly KeyRecord[]
  get(name: string): KeyRecord | undefined
  save(record: KeyRecord): void
  forget(name: string): void
}

/** Throws Problem('internal', reason `kms.tampered`). */
export const openRecords = (folder: string, random: (length: number) => Uint8Array): Records => {
  const path = join(folder, namespaceFile)
  // A crash after this leaves a name under which there is nothing yet.
  if (!existsSync(path)) replaceFile(path, encode({ namespace: Buffer.from(random(8)).toString('hex') }))
  const value = readFile(path)
  if (!hasExactly(value, ['namespace']) || typeof value['namespace'] !== 'string' || !/^[0-9a-f]{16}$/.test(value['namespace'])) throw tampered(path)
  const records = new Map(
    readdirSync(folder)
      .filter((entry) => entry.endsWith(awsSuffix) && !entry.startsWith('.'))
      .map((entry) => {
        const record = readFile(join(folder, entry))
        if (!isRecord(record) || entry !== `${record.name}${awsSuffix}`) throw tampered(join(folder, entry))
        return [record.name, record]
      }),
  )
  return {
    namespace: value['namespace'],
    all: () => [...records.values()],
    get: (name) => records.get(name),
    save(record) {
      replaceFile(join(folder, `${record.name}${awsSuffix}`), encode(record))
      records.set(record.name, record)
    },
    forget(name) {
      removeFile(join(folder, `${name}${awsSuffix}`))
      records.delete(name)
    },
  }
}
