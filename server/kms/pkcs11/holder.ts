import { randomBytes } from 'node:crypto'
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { KmsKeyPurpose } from '../../flows/context.ts'
import { wrapContext, type HeldKey, type Holder } from '../custody.ts'
import { removeFile, removeLeftovers, replaceFile } from '../durable.ts'
import { isKeyName, isPurpose } from '../policy.ts'
import { hasExactly, isCount } from '../shape.ts'
import { ck, type Handle, type Mechanism } from './cryptoki.ts'
import { digestOf, findKeys, generateKey, signDigest, type TokenKey } from './keys.ts'
import { Refused, Token, type Session, type TokenOptions } from './token.ts'

/** What the folder remembers of a key in the token: that it is to be there, and how often it was used. */
interface KeyRecord {
  readonly format: 'fleetkey/kms-token-key/1'
  readonly name: string
  readonly purpose: KmsKeyPurpose
  readonly uses: number
  /** It is being destroyed. */
  readonly ends: boolean
}

export interface Pkcs11Options extends Omit<TokenOptions, 'random' | 'notice'> {
  /** Told when the token is lost (with the reason) and when it is back (null). */
  readonly notice?: ((problem: Problem | null) => void) | undefined
  /** Nonces and names; keys are made by the token. */
  readonly random?: (length: number) => Uint8Array
  readonly step?: ((name: string) => void) | undefined
}

export const tokenSuffix = '.token.cbor'
const namespaceFile = 'namespace.cbor'
const maxFile = 4096
/** Of a wrap, beside what the file back end has: one byte ahead of the plaintext, because tokens encrypt no empty one. */
const format = 2
const overhead = 1 + 12 + 1 + 16

const isRecord = (value: unknown): value is KeyRecord =>
  hasExactly(value, ['format', 'name', 'purpose', 'uses', 'ends']) &&
  value['format'] === 'fleetkey/kms-token-key/1' &&
  isKeyName(value['name']) &&
  isPurpose(value['purpose']) &&
  isCount(value['uses'], 0, Number.MAX_SAFE_INTEGER) &&
  typeof value['ends'] === 'boolean'

const readFile = (path: string): unknown => {
  try {
    return statSync(path).size > maxFile ? undefined : decode(readFileSync(path))
  } catch {
    return undefined
  }
}

const tampered = (path: string): Problem => new Problem('internal', `${path} is damaged or was tampered with`, { reason: 'kms.tampered' })

const readRecords = (folder: string): readonly KeyRecord[] =>
  readdirSync(folder)
    .filter((entry) => entry.endsWith(tokenSuffix) && !entry.startsWith('.'))
    .map((entry) => {
      const record = readFile(join(folder, entry))
      if (!isRecord(record) || entry !== `${record.name}${tokenSuffix}`) throw tampered(join(folder, entry))
      return record
    })

/** Several servers can share a token: each has a name of its own in it, made once. */
const namespaceIn = (folder: string, random: (length: number) => Uint8Array, step: (name: string) => void): string => {
  const path = join(folder, namespaceFile)
  if (!existsSync(path)) {
    replaceFile(path, encode({ namespace: Buffer.from(random(8)).toString('hex') }))
    // A crash here leaves a name under which there is nothing yet.
    step('kms.namespace')
  }
  const value = readFile(path)
  if (!hasExactly(value, ['namespace']) || typeof value['namespace'] !== 'string' || !/^[0-9a-f]{16}$/.test(value['namespace'])) throw tampered(path)
  return value['namespace']
}

const gcm = (nonce: Buffer, context: Buffer): Mechanism => ({
  mechanism: ck.mechanism.aesGcm,
  parameter: { type: ck.gcm, iv: nonce, ivBits: 96, aad: context, tagBits: 128 },
})

/**
 * Keys in a PKCS#11 token: made there, and never outside it. The folder has their counts, and the names of those that have to be there. Throws Problem at
 * opening: `kms.pkcs11` (add-on, library), `kms.token` (not there, or not the one with these keys), `kms.pin`, `kms.tampered`.
 */
export const openPkcs11Holder = async (options: Pkcs11Options): Promise<Holder> => {
  const { folder, random = (length) => new Uint8Array(randomBytes(length)), step = () => undefined } = options
  mkdirSync(folder, { recursive: true, mode: 0o700 })
  chmodSync(folder, 0o700)
  removeLeftovers(folder)
  const namespace = namespaceIn(folder, random, step)
  const records = new Map(readRecords(folder).map((record) => [record.name, record]))
  const save = (record: KeyRecord): void => {
    replaceFile(join(folder, `${record.name}${tokenSuffix}`), encode(record))
    records.set(record.name, record)
  }
  const forget = (name: string): void => {
    removeFile(join(folder, `${name}${tokenSuffix}`))
    records.delete(name)
  }
  let found: ReadonlyMap<string, TokenKey> = new Map()

  const token = await Token.open({ ...options, random, notice: options.notice ?? (() => undefined) }, async (session, cryptoki) => {
    const keys = await findKeys(cryptoki, session, { namespace, known: found })
    for (const { name, ends } of records.values())
      if (!ends && !keys.has(name))
        throw new Problem('unavailable', `token ${options.token}: key ${name} is not in it; is it the right token?`, {
          reason: 'kms.token',
          retryAfterSeconds: 5,
        })
    found = keys
  })
  const { cryptoki } = token

  const handleOf = (name: string): Handle => {
    const key = found.get(name)
    if (key === undefined) throw new Problem('not-found', `no KMS key ${name}`, { reason: 'kms.no-key' })
    return key.handle
  }

  const remove = async (name: string): Promise<void> => {
    const { purpose, uses } = records.get(name) ?? { purpose: found.get(name)?.purpose ?? 'kek', uses: 0 }
    save({ format: 'fleetkey/kms-token-key/1', name, purpose, uses, ends: true })
    // A crash here, and anywhere until the record is gone: the next opening goes on.
    step('kms.ending')
    const key = found.get(name)
    if (key !== undefined)
      await token.once(async (session) => {
        cryptoki.C_DestroyObject(session.handle, key.handle)
        if (key.publicHandle !== null) cryptoki.C_DestroyObject(session.handle, key.publicHandle)
        return await Promise.resolve()
      })
    found = new Map([...found].filter(([other]) => other !== name))
    forget(name)
    step('kms.destroyed')
  }

  const held = ({ name, purpose, spki }: TokenKey): HeldKey => ({ name, purpose, spki, counted: records.get(name)?.uses ?? 0, place: 'pkcs11' })
  /** A key that a crash has left without a record: nobody has used it. */
  const adopt = (key: TokenKey): HeldKey => {
    if (!records.has(key.name)) save({ format: 'fleetkey/kms-token-key/1', name: key.name, purpose: key.purpose, uses: 0, ends: false })
    return held(key)
  }

  try {
    for (const { name, ends } of records.values()) if (ends) await remove(name)
    for (const key of found.values()) adopt(key)
  } catch (thrown) {
    token.close()
    throw thrown
  }

  const encrypt = async (session: Session, key: Handle, of: { readonly clear: Buffer; readonly context: Buffer; readonly nonce: Buffer }): Promise<Buffer> => {
    const out = Buffer.alloc(of.clear.length + 16)
    session.held = [of.clear, out, of.nonce, of.context]
    cryptoki.C_EncryptInit(session.handle, gcm(of.nonce, of.context), key)
    return await cryptoki.C_EncryptAsync(session.handle, of.clear, out)
  }
  const decrypt = async (session: Session, key: Handle, of: { readonly body: Buffer; readonly context: Buffer; readonly nonce: Buffer }): Promise<Buffer> => {
    const out = Buffer.alloc(of.body.length)
    session.held = [of.body, out, of.nonce, of.context]
    cryptoki.C_DecryptInit(session.handle, gcm(of.nonce, of.context), key)
    try {
      return await cryptoki.C_DecryptAsync(session.handle, of.body, out)
    } catch (cause) {
      throw new Refused('decrypt', { cause })
    }
  }

  /** Does all of a batch, as many at a time as there are sessions, in its order. */
  const each = async <T, R>(batch: readonly T[], work: (session: Session, item: T) => Promise<R>): Promise<readonly R[]> => {
    const results: R[] = []
    let next = 0
    await Promise.all(
      Array.from({ length: Math.min(token.sessions, batch.length) }, async () => {
        for (let at = next++; at < batch.length; at = next++) results[at] = await token.use(async (session) => await work(session, batch[at] as T))
      }),
    )
    return results
  }

  /** Tokens say of a changed wrap what they also say when they are broken: only one that still works has refused it. */
  const stillWorks = async (name: string): Promise<void> =>
    await token.use(async (session) => {
      const [nonce, context, clear] = [Buffer.from(random(12)), Buffer.from('fleetkey/kms-probe/1'), Buffer.from('works')]
      const body = Buffer.from(await encrypt(session, handleOf(name), { clear, context, nonce }))
      try {
        await decrypt(session, handleOf(name), { body, context, nonce })
      } catch (thrown) {
        throw thrown instanceof Refused ? new Error('it opens nothing', { cause: thrown }) : thrown
      }
    })

  return {
    keys: [...found.values()].map(held),
    async make(name, purpose) {
      const key = found.get(name) ?? (await token.once(async (session) => await generateKey(cryptoki, session, { namespace, name, purpose, id: random(8) })))
      found = new Map([...found, [name, key]])
      // A crash here leaves a key without a record; the next opening writes it.
      step('kms.generated')
      if (key.purpose !== purpose) throw new Problem('forbidden', `KMS key ${name} is for ${key.purpose}, not for ${purpose}`, { reason: 'kms.purpose' })
      try {
        const made = adopt(key)
        step('kms.key')
        return made
      } catch (cause) {
        throw new Problem('unavailable', `cannot write about KMS key ${name}: ${cause instanceof Error ? cause.message : String(cause)}`, {
          reason: 'kms.disk',
          cause,
        })
      }
    },
    sign: async (batch) => await each(batch, async (session, { key, data }) => await signDigest(cryptoki, session, handleOf(key.name), digestOf(data))),
    wrap: async (batch) =>
      await each(batch, async (session, { key, plaintext, context }) => {
        const [nonce, clear] = [Buffer.from(random(12)), Buffer.concat([Buffer.of(0), plaintext.bytes()])]
        try {
          const body = await encrypt(session, handleOf(key.name), { clear, nonce, context: Buffer.from(wrapContext(key.name, context)) })
          return new Uint8Array(Buffer.concat([Buffer.of(format), nonce, body]))
        } finally {
          clear.fill(0)
        }
      }),
    unwrap: async (batch) =>
      await Promise.all(
        batch.map(async ({ key, wrapped, context }) => {
          if (wrapped.length < overhead || wrapped[0] !== format) return undefined
          const [nonce, body] = [Buffer.from(wrapped.subarray(1, 13)), Buffer.from(wrapped.subarray(13))]
          try {
            const clear = await token.use(
              async (session) => await decrypt(session, handleOf(key.name), { body, nonce, context: Buffer.from(wrapContext(key.name, context)) }),
            )
            try {
              return clear[0] === 0 ? new Secret(clear.subarray(1)) : undefined
            } finally {
              clear.fill(0)
            }
          } catch (thrown) {
            if (!(thrown instanceof Refused)) throw thrown
            await stillWorks(key.name)
            return undefined
          }
        }),
      ),
    count(key, uses) {
      const record = records.get(key.name)
      if (record === undefined) throw new Problem('not-found', `no KMS key ${key.name}`, { reason: 'kms.no-key' })
      save({ ...record, uses })
      step('kms.uses')
    },
    destroy: async ({ name }) => await remove(name),
    async close() {
      token.close()
      await Promise.resolve()
    },
  }
}
