import {
  createCipheriv,
  createDecipheriv,
  createHash,
  createHmac,
  generateKeyPairSync,
  randomBytes,
  randomUUID,
  timingSafeEqual,
  type KeyObject,
} from 'node:crypto'
import { createServer, type IncomingMessage } from 'node:http'
import type { AddressInfo } from 'node:net'
import type { AwsBackend } from '@fleetkey/server/kms/orders.ts'
import { p256 } from '@noble/curves/nist.js'

/**
 * A test part: a local server that speaks the API of AWS KMS (JSON 1.1) as far as this project uses it, with real keys in memory, and refuses every request whose
 * signature (Signature Version 4) is not that of its one user. It is not AWS, and proves nothing about AWS's limits; curl judges its reading of signatures.
 */
export interface AwsKms {
  readonly endpoint: string
  readonly region: string
  readonly credentials: Readonly<Record<'AWS_ACCESS_KEY_ID' | 'AWS_SECRET_ACCESS_KEY', string>>
  /** Requests per operation, refused ones included. */
  readonly asked: ReadonlyMap<string, number>
  keys(): readonly { readonly arn: string; readonly description: string; readonly state: string; readonly tags: Readonly<Record<string, string>> }[]
  /** The next requests of this operation come to nothing: an error of AWS by name, `cut` the connection, or `lose` the answer after the work is done. */
  fail(operation: string, how: { readonly error: string; readonly status?: number } | 'cut' | 'lose', times?: number): void
  /** Puts another key in the place of one. */
  exchange(arn: string): void
  setState(arn: string, state: 'Enabled' | 'Disabled'): void
  stop(): Promise<void>
}

type Material = { readonly kind: 'ec'; readonly private: KeyObject; readonly spki: Buffer } | { readonly kind: 'aes'; readonly key: Buffer }
interface StoredKey {
  readonly id: string
  readonly arn: string
  readonly description: string
  readonly tags: Readonly<Record<string, string>>
  state: string
  material: Material
}

class AwsError extends Error {
  readonly type: string
  readonly status: number
  constructor(type: string, message: string, status = 400) {
    super(message)
    this.type = type
    this.status = status
  }
}

const hash = (data: string | Buffer): string => createHash('sha256').update(data).digest('hex')
const hmac = (key: string | Buffer, data: string): Buffer => createHmac('sha256', key).update(data).digest()

const quarterHour = 900_000

/** Signature Version 4 of one request, by its own rules; throws AwsError. */
const checkSignature = (request: IncomingMessage, body: Buffer, of: { readonly id: string; readonly secret: string; readonly region: string }): void => {
  const given = /^AWS4-HMAC-SHA256 Credential=([^/]+)\/(\d{8})\/([^/]+)\/([^/]+)\/aws4_request, ?SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})$/.exec(
    request.headers.authorization ?? '',
  )
  if (given === null) throw new AwsError('MissingAuthenticationTokenException', 'Missing Authentication Token', 403)
  const [, id = '', day = '', region = '', service = '', signed = '', signature = ''] = given
  if (id !== of.id) throw new AwsError('UnrecognizedClientException', 'The security token included in the request is invalid.')
  if (region !== of.region || service !== 'kms') throw new AwsError('InvalidSignatureException', `Credential should be scoped to ${of.region}/kms.`)
  const date = request.headers['x-amz-date']
  if (typeof date !== 'string' || !/^\d{8}T\d{6}Z$/.test(date) || !date.startsWith(day)) throw new AwsError('IncompleteSignature', 'Date')
  const at = Date.parse(date.replace(/^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/, '$1-$2-$3T$4:$5:$6Z'))
  if (Math.abs(Date.now() - at) > quarterHour) throw new AwsError('InvalidSignatureException', 'Signature expired')
  const names = signed.split(';')
  for (const must of ['host', 'x-amz-date', 'x-amz-target'])
    if (request.headers[must] !== undefined && !names.includes(must)) throw new AwsError('InvalidSignatureException', `${must} is not signed`)
  const headers = names.map((name) => `${name}:${String(request.headers[name] ?? '').trim()}\n`).join('')
  const canonical = [request.method, request.url, '', headers, signed, hash(body)].join('\n')
  const scope = `${day}/${region}/${service}/aws4_request`
  const key = hmac(hmac(hmac(hmac(`AWS4${of.secret}`, day), region), service), 'aws4_request')
  const wanted = hmac(key, ['AWS4-HMAC-SHA256', date, scope, hash(canonical)].join('\n'))
  if (!timingSafeEqual(wanted, Buffer.from(signature, 'hex')))
    throw new AwsError('InvalidSignatureException', 'The request signature we calculated does not match the signature you provided.')
}

const makeMaterial = (spec: string): Material => {
  if (spec === 'SYMMETRIC_DEFAULT') return { kind: 'aes', key: randomBytes(32) }
  if (spec !== 'ECC_NIST_P256') throw new AwsError('ValidationException', `KeySpec ${spec}`)
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  return { kind: 'ec', private: privateKey, spki: publicKey.export({ type: 'spki', format: 'der' }) }
}

const contextBytes = (context: unknown): Buffer =>
  Buffer.from(JSON.stringify(Object.entries((context ?? {}) as Record<string, string>).toSorted(([one], [other]) => (one < other ? -1 : 1))))

const textIn = (value: unknown): string => {
  if (typeof value !== 'string') throw new AwsError('ValidationException', 'not a text')
  return value
}

const bytesIn = (value: unknown, least: number, most: number): Buffer => {
  const bytes = Buffer.from(typeof value === 'string' ? value : '', 'base64')
  if (bytes.length < least || bytes.length > most) throw new AwsError('ValidationException', `a blob of ${bytes.length} bytes`)
  return bytes
}

export const startAwsKms = async (): Promise<AwsKms> => {
  const region = 'eu-central-1'
  const user = { id: 'AKIDFLEETKEYTEST', secret: randomBytes(20).toString('hex'), region }
  const keys = new Map<string, StoredKey>()
  const asked = new Map<string, number>()
  const failures: { operation: string; how: { error: string; status?: number } | 'cut' | 'lose'; left: number }[] = []

  const keyOf = (of: unknown, usable = true): StoredKey => {
    const id = textIn(of)
    const key = keys.get(id.split('/').at(-1) ?? '')
    if (key === undefined) throw new AwsError('NotFoundException', `Key '${id}' does not exist`)
    if (usable && key.state === 'Disabled') throw new AwsError('DisabledException', `${key.arn} is disabled.`)
    if (usable && key.state === 'PendingDeletion') throw new AwsError('KMSInvalidStateException', `${key.arn} is pending deletion.`)
    return key
  }
  const metadata = ({ id, arn, description, state }: StoredKey) => ({
    KeyId: id,
    Arn: arn,
    Description: description,
    KeyState: state,
    Enabled: state === 'Enabled',
  })

  const operations: Readonly<Record<string, (of: Readonly<Record<string, unknown>>) => unknown>> = {
    CreateKey(of) {
      const id = randomUUID()
      const tags = Object.fromEntries((of['Tags'] as { TagKey: string; TagValue: string }[]).map(({ TagKey, TagValue }) => [TagKey, TagValue]))
      const key: StoredKey = {
        id,
        arn: `arn:aws:kms:${region}:111122223333:key/${id}`,
        description: textIn(of['Description']),
        tags,
        state: 'Enabled',
        material: makeMaterial(textIn(of['KeySpec'])),
      }
      keys.set(id, key)
      return { KeyMetadata: metadata(key) }
    },
    DescribeKey: (of) => ({ KeyMetadata: metadata(keyOf(of['KeyId'], false)) }),
    ListKeys(of) {
      // Small pages, so that reading on is needed.
      const all = [...keys.values()]
      const from = Number(of['Marker'] ?? 0)
      const to = from + Math.min(Number(of['Limit'] ?? 100), 3)
      const page = all.slice(from, to).map(({ id, arn }) => ({ KeyId: id, KeyArn: arn }))
      return { Keys: page, Truncated: to < all.length, ...(to < all.length ? { NextMarker: String(to) } : {}) }
    },
    GetPublicKey(of) {
      const { material, arn } = keyOf(of['KeyId'])
      if (material.kind !== 'ec') throw new AwsError('UnsupportedOperationException', arn)
      return { KeyId: arn, PublicKey: material.spki.toString('base64'), KeySpec: 'ECC_NIST_P256', KeyUsage: 'SIGN_VERIFY' }
    },
    Sign(of) {
      const { material, arn } = keyOf(of['KeyId'])
      if (material.kind !== 'ec' || of['SigningAlgorithm'] !== 'ECDSA_SHA_256' || of['MessageType'] !== 'DIGEST')
        throw new AwsError('InvalidKeyUsageException', arn)
      return { KeyId: arn, Signature: signDigest(material.private, bytesIn(of['Message'], 32, 32)).toString('base64') }
    },
    Encrypt(of) {
      const { material, arn, id } = keyOf(of['KeyId'])
      if (material.kind !== 'aes') throw new AwsError('InvalidKeyUsageException', arn)
      const nonce = randomBytes(12)
      const cipher = createCipheriv('aes-256-gcm', material.key, nonce).setAAD(contextBytes(of['EncryptionContext']))
      const body = Buffer.concat([cipher.update(bytesIn(of['Plaintext'], 1, 4096)), cipher.final()])
      return { KeyId: arn, CiphertextBlob: Buffer.concat([Buffer.from(id), nonce, cipher.getAuthTag(), body]).toString('base64') }
    },
    Decrypt(of) {
      const { material, arn, id } = keyOf(of['KeyId'])
      const blob = bytesIn(of['CiphertextBlob'], 1, 6144)
      if (material.kind !== 'aes' || blob.length < 65) throw new AwsError('InvalidCiphertextException', '')
      if (blob.subarray(0, 36).toString() !== id)
        throw new AwsError(keys.has(blob.subarray(0, 36).toString()) ? 'IncorrectKeyException' : 'InvalidCiphertextException', '')
      try {
        const decipher = createDecipheriv('aes-256-gcm', material.key, blob.subarray(36, 48)).setAAD(contextBytes(of['EncryptionContext']))
        decipher.setAuthTag(blob.subarray(48, 64))
        const plaintext = Buffer.concat([decipher.update(blob.subarray(64)), decipher.final()])
        return { KeyId: arn, Plaintext: plaintext.toString('base64') }
      } catch {
        throw new AwsError('InvalidCiphertextException', '')
      }
    },
    ScheduleKeyDeletion(of) {
      const key = keyOf(of['KeyId'])
      key.state = 'PendingDeletion'
      return { KeyId: key.arn, KeyState: key.state }
    },
  }

  const server = createServer((request, response) => {
    const parts: Buffer[] = []
    request.on('data', (part: Buffer) => void parts.push(part))
    request.on('end', () => {
      const operation = /^TrentService\.(\w+)$/.exec(String(request.headers['x-amz-target']))?.[1] ?? ''
      asked.set(operation, (asked.get(operation) ?? 0) + 1)
      const answer = (status: number, value: unknown): void => {
        response.writeHead(status, { 'content-type': 'application/x-amz-json-1.1', 'x-amzn-requestid': randomUUID() })
        response.end(JSON.stringify(value))
      }
      try {
        const body = Buffer.concat(parts)
        checkSignature(request, body, user)
        const failure = failures.find((one) => one.operation === operation && one.left > 0)
        if (failure !== undefined) failure.left--
        if (failure?.how === 'cut') return void request.socket.destroy()
        if (failure !== undefined && failure.how !== 'lose') throw new AwsError(failure.how.error, 'as told', failure.how.status)
        const work = operations[operation]
        if (work === undefined) throw new AwsError('UnknownOperationException', operation)
        const result = work(JSON.parse(body.toString()) as Record<string, unknown>)
        if (failure?.how === 'lose') return void request.socket.destroy()
        answer(200, result)
      } catch (thrown) {
        if (thrown instanceof AwsError) answer(thrown.status, { __type: thrown.type, message: thrown.message })
        else answer(500, { __type: 'KMSInternalException', message: String(thrown) })
      }
    })
  })
  await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
  return {
    endpoint: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    region,
    credentials: { AWS_ACCESS_KEY_ID: user.id, AWS_SECRET_ACCESS_KEY: user.secret },
    asked,
    keys: () => [...keys.values()].map(({ arn, description, state, tags }) => ({ arn, description, state, tags })),
    fail: (operation, how, times = 1) => void failures.push({ operation, how, left: times }),
    exchange: (arn) => void (keyOf(arn, false).material = makeMaterial('ECC_NIST_P256')),
    setState: (arn, state) => void (keyOf(arn, false).state = state),
    stop: async () =>
      await new Promise<void>((resolve) => {
        server.close(() => resolve())
        server.closeAllConnections()
      }),
  }
}

/** ECDSA over a digest that comes from outside: node's own hashes whatever it signs. */
const signDigest = (key: KeyObject, digest: Buffer): Buffer => {
  const { d = '' } = key.export({ format: 'jwk' })
  return Buffer.from(p256.sign(digest, Buffer.from(d, 'base64url'), { prehash: false, format: 'der' }))
}

/** What a KMS process is told to reach it. */
export const awsBackend = ({ region, endpoint, credentials }: AwsKms): AwsBackend => ({
  kind: 'aws',
  region,
  endpoint,
  variables: credentials,
  files: { kind: 'file', passphraseFile: null, keyFile: null },
})
