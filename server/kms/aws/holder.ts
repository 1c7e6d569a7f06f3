import { createHash, createPublicKey, randomBytes, verify, type KeyObject } from 'node:crypto'
import { chmodSync, mkdirSync } from 'node:fs'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { KmsKeyPurpose } from '../../flows/context.ts'
import { wrapContext, type HeldKey, type Holder } from '../custody.ts'
import { removeLeftovers } from '../durable.ts'
import { openRecords, type KeyRecord } from './records.ts'
import { isGone, isRefusedCiphertext, openService, type AwsPlace } from './service.ts'

export interface AwsOptions extends AwsPlace {
  /** Of this process alone: counts, and which key of AWS is which. */
  readonly folder: string
  readonly notice?: ((problem: Problem | null) => void) | undefined
  /** Names; keys and nonces are AWS's. */
  readonly random?: (length: number) => Uint8Array
  readonly step?: ((name: string) => void) | undefined
}

interface AwsKey extends HeldKey {
  readonly arn: string
  /** What its signatures are held against; null for a KEK. */
  readonly public: KeyObject | null
}

/** Of a wrap: tells it from those of other back ends. */
const format = 3
/** What AWS encrypts at once, less one byte ahead of the plaintext, because it encrypts no empty one. */
const maxPlaintext = 4096 - 1
/** Days that AWS keeps a key which is to be destroyed: its least. */
const pendingDays = 7

const descriptionOf = (namespace: string, { name, attempt }: Pick<KeyRecord, 'name' | 'attempt'>): string => `fleetkey/${namespace}/${name}/${attempt}`

/** AWS authenticates a map of texts with each ciphertext; ours has one entry, the hash of what is authenticated elsewhere. */
const contextOf = (name: string, context: Uint8Array): { readonly fleetkey: string } => ({
  fleetkey: createHash('sha256').update(wrapContext(name, context)).digest('base64url'),
})

const publicKeyOf = (spki: Uint8Array, name: string): KeyObject => {
  const key = createPublicKey({ key: Buffer.from(spki), format: 'der', type: 'spki' })
  if (key.asymmetricKeyDetails?.namedCurve !== 'prime256v1') throw new Problem('internal', `AWS KMS: key ${name} is not of P-256`, { reason: 'kms.tampered' })
  return key
}

const ready = ({ name, purpose, arn, spki, uses }: KeyRecord): AwsKey => ({
  place: 'aws',
  name,
  purpose,
  arn: arn ?? '',
  spki,
  counted: uses,
  public: spki === null ? null : publicKeyOf(spki, name),
})

/**
 * Keys in AWS KMS: made there, and never outside it. The folder has their counts and ARNs, and their public keys, which every signature is held against.
 * Throws Problem at opening: `kms.aws`, `kms.aws-credentials`, `kms.aws-key` (one of ours is gone or disabled), `kms.tampered` (it is not the key that it was).
 */
export const openAwsHolder = async (options: AwsOptions): Promise<Holder<AwsKey>> => {
  const { folder, notice = () => undefined, random = (length) => new Uint8Array(randomBytes(length)), step = () => undefined } = options
  mkdirSync(folder, { recursive: true, mode: 0o700 })
  chmodSync(folder, 0o700)
  removeLeftovers(folder)
  const {
    CreateKeyCommand,
    DecryptCommand,
    DescribeKeyCommand,
    EncryptCommand,
    GetPublicKeyCommand,
    ListKeysCommand,
    ScheduleKeyDeletionCommand,
    SignCommand,
  } = await import('@aws-sdk/client-kms')
  const records = openRecords(folder, random)
  const service = await openService(options, notice)

  const publicKey = async (arn: string, name: string): Promise<Uint8Array> => {
    const { PublicKey } = await service.ask(`the public key of ${name}`, async (client) => await client.send(new GetPublicKeyCommand({ KeyId: arn })))
    return new Uint8Array(PublicKey ?? [])
  }

  /** The key that an attempt has made before a crash; undefined when it had not come to that. Asks for every key of the account: for this case alone. */
  const findMade = async (record: KeyRecord): Promise<string | undefined> => {
    const wanted = descriptionOf(records.namespace, record)
    for (let marker: string | undefined; ;) {
      const page = await service.ask('the list of keys', async (client) => await client.send(new ListKeysCommand({ Limit: 1000, Marker: marker })))
      for (const { KeyArn: arn } of page.Keys ?? []) {
        // Keys that this role may not look at are not its own.
        const found = await service.ask(
          `key ${arn ?? ''}`,
          async (client) => (await client.send(new DescribeKeyCommand({ KeyId: arn }))).KeyMetadata ?? null,
          (thrown) => (thrown instanceof Error && thrown.name === 'AccessDeniedException' ? null : undefined),
        )
        if (found?.Description === wanted && found.KeyState === 'Enabled') return arn
      }
      if (page.Truncated !== true || page.NextMarker === undefined) return undefined
      marker = page.NextMarker
    }
  }

  const finish = async (record: KeyRecord, arn: string): Promise<KeyRecord> => {
    const spki = record.purpose === 'kek' ? null : await publicKey(arn, record.name)
    if (spki !== null) publicKeyOf(spki, record.name)
    const made: KeyRecord = { ...record, arn, spki }
    try {
      records.save(made)
    } catch (cause) {
      throw new Problem('unavailable', `cannot write about KMS key ${record.name}`, { reason: 'kms.disk', cause })
    }
    step('kms.key')
    return made
  }

  const create = async (record: KeyRecord): Promise<KeyRecord> => {
    const { purpose, name } = record
    const answer = await service.askOnce(
      `making key ${name}`,
      async (client) =>
        await client.send(
          new CreateKeyCommand({
            Description: descriptionOf(records.namespace, record),
            ...(purpose === 'kek' ? { KeyUsage: 'ENCRYPT_DECRYPT', KeySpec: 'SYMMETRIC_DEFAULT' } : { KeyUsage: 'SIGN_VERIFY', KeySpec: 'ECC_NIST_P256' }),
            Tags: [
              { TagKey: 'fleetkey-namespace', TagValue: records.namespace },
              { TagKey: 'fleetkey-key', TagValue: name },
              { TagKey: 'fleetkey-purpose', TagValue: purpose },
            ],
          }),
        ),
    )
    const arn = answer.KeyMetadata?.Arn
    if (arn === undefined) throw new Problem('unavailable', `AWS KMS has made key ${name} and not said which it is`, { reason: 'kms.aws' })
    // A crash here leaves a key that nobody has used; the next opening finds it by its description.
    step('kms.generated')
    return await finish(record, arn)
  }

  const remove = async (record: KeyRecord): Promise<void> => {
    records.save({ ...record, ends: true })
    // A crash here, and anywhere until the record is gone: the next opening goes on.
    step('kms.ending')
    const { arn } = record
    if (arn !== null)
      await service.ask(
        `the end of key ${record.name}`,
        async (client) => await client.send(new ScheduleKeyDeletionCommand({ KeyId: arn, PendingWindowInDays: pendingDays })),
        (thrown) => (isGone(thrown) ? { $metadata: {} } : undefined),
      )
    records.forget(record.name)
    step('kms.destroyed')
  }

  /** It is there, enabled, and the one that it was. */
  const check = async ({ name, arn, spki }: KeyRecord): Promise<void> => {
    const { KeyMetadata } = await service.ask(`key ${name}`, async (client) => await client.send(new DescribeKeyCommand({ KeyId: arn ?? '' })))
    if (KeyMetadata?.KeyState !== 'Enabled')
      throw new Problem('unavailable', `AWS KMS: key ${name} (${arn ?? ''}) is ${KeyMetadata?.KeyState ?? 'not described'}`, { reason: 'kms.aws-key' })
    if (spki !== null && arn !== null && Buffer.compare(await publicKey(arn, name), spki) !== 0)
      throw new Problem('internal', `AWS KMS: ${arn} is not the key that ${name} was`, { reason: 'kms.tampered' })
  }

  try {
    // One question at least: whether it is reached, and with which rights, is known before anything depends on it.
    if (records.all().length === 0) await service.ask('the list of keys', async (client) => await client.send(new ListKeysCommand({ Limit: 1 })))
    for (const record of records.all()) {
      if (record.ends) await remove(record)
      else if (record.arn === null) {
        const arn = await findMade(record)
        if (arn === undefined) records.forget(record.name)
        else await finish(record, arn)
      }
    }
    await Promise.all(records.all().map(check))
  } catch (thrown) {
    service.close()
    throw thrown
  }

  const sign = async (key: AwsKey, data: Uint8Array): Promise<Uint8Array> => {
    const { Signature } = await service.ask(
      `a signature by ${key.name}`,
      async (client) =>
        await client.send(
          new SignCommand({
            KeyId: key.arn,
            Message: createHash('sha256').update(data).digest(),
            MessageType: 'DIGEST',
            SigningAlgorithm: 'ECDSA_SHA_256',
          }),
        ),
    )
    const signature = new Uint8Array(Signature ?? [])
    // Whoever stands between here and AWS cannot put a signature of another key in its place.
    if (key.public === null || !verify('sha256', data, key.public, signature))
      throw new Problem('unavailable', `AWS KMS: the signature by ${key.name} does not verify`, { reason: 'kms.aws' })
    return signature
  }

  const wrap = async (key: AwsKey, plaintext: Secret, context: Uint8Array): Promise<Uint8Array> => {
    if (plaintext.length > maxPlaintext) throw new Problem('malformed', `${plaintext.length} bytes to wrap, at most ${maxPlaintext}`, { reason: 'kms.size' })
    const clear = Buffer.concat([Uint8Array.of(0), plaintext.bytes()])
    try {
      const { CiphertextBlob } = await service.ask(
        `a wrap by ${key.name}`,
        async (client) => await client.send(new EncryptCommand({ KeyId: key.arn, Plaintext: clear, EncryptionContext: contextOf(key.name, context) })),
      )
      if (CiphertextBlob === undefined) throw new Problem('unavailable', `AWS KMS gave no wrap by ${key.name}`, { reason: 'kms.aws' })
      return Uint8Array.of(format, ...CiphertextBlob)
    } finally {
      clear.fill(0)
    }
  }

  const unwrap = async (key: AwsKey, wrapped: Uint8Array, context: Uint8Array): Promise<Secret | undefined> => {
    // AWS takes at most 6144 bytes, and at least one.
    if (wrapped[0] !== format || wrapped.length < 2 || wrapped.length > 6145) return undefined
    const answer = await service.ask<{ readonly Plaintext?: Uint8Array | undefined }>(
      `opening a wrap by ${key.name}`,
      async (client) =>
        await client.send(new DecryptCommand({ KeyId: key.arn, CiphertextBlob: wrapped.subarray(1), EncryptionContext: contextOf(key.name, context) })),
      (thrown) => (isRefusedCiphertext(thrown) ? {} : undefined),
    )
    const clear = answer.Plaintext
    if (clear === undefined || clear.length === 0) return undefined
    try {
      return new Secret(clear.subarray(1))
    } finally {
      clear.fill(0)
    }
  }

  return {
    keys: records.all().map(ready),
    async make(name: string, purpose: KmsKeyPurpose) {
      const record: KeyRecord = {
        format: 'fleetkey/kms-aws-key/1',
        name,
        purpose,
        attempt: Buffer.from(random(8)).toString('hex'),
        arn: null,
        spki: null,
        uses: 0,
        ends: false,
      }
      const before = records.get(name)
      // An attempt that failed on the way may have made it all the same.
      const arn = before?.arn === null ? await findMade(before) : undefined
      if (before !== undefined && arn !== undefined) return ready(await finish(before, arn))
      try {
        records.save(record)
      } catch (cause) {
        throw new Problem('unavailable', `cannot write about KMS key ${name}`, { reason: 'kms.disk', cause })
      }
      // A crash here leaves an attempt that has made nothing; the next opening forgets it.
      step('kms.attempt')
      return ready(await create(record))
    },
    sign: async (batch) => await Promise.all(batch.map(async ({ key, data }) => await sign(key, data))),
    wrap: async (batch) => await Promise.all(batch.map(async ({ key, plaintext, context }) => await wrap(key, plaintext, context))),
    unwrap: async (batch) => await Promise.all(batch.map(async ({ key, wrapped, context }) => await unwrap(key, wrapped, context))),
    count({ name }, uses) {
      const record = records.get(name)
      if (record !== undefined) records.save({ ...record, uses })
    },
    async destroy({ name }) {
      const record = records.get(name)
      if (record !== undefined) await remove(record)
    },
    close: async () => await Promise.resolve(service.close()),
  }
}
