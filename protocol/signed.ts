import { createHash, verify, type KeyObject } from 'node:crypto'
import { decode, encode } from './cbor.ts'
import { Envelope } from './messages.ts'
import { Problem } from './problem.ts'
import { importSpki } from './x509/public-key.ts'

/**
 * Signed messages: COSE_Sign1 (RFC 9052 §4.2), tagged 18, protected header {1: -7 (ES256), 4: kid}, empty unprotected header,
 * payload = deterministic CBOR of an `Envelope`, empty external_aad: whatever is bound stands inside the payload.
 */
export interface Signer {
  /** First 8 bytes of SHA-256 of the signer's SubjectPublicKeyInfo. */
  readonly kid: Uint8Array
  /** ECDSA P-256 with SHA-256 over `tbs`: raw r‖s, 64 bytes. */
  sign(tbs: Uint8Array): Promise<Uint8Array>
}

/** A message that parsed; nobody has verified its signature yet. `bytes`: as on the wire; `tbs`: the Sig_structure. */
export interface SignedMessage {
  readonly envelope: Envelope
  readonly kid: Uint8Array
  readonly tbs: Uint8Array
  readonly signature: Uint8Array
  readonly bytes: Uint8Array
}

const tag = 0xd2
const es256 = -7
const none = new Uint8Array(0)

/** First 8 bytes of SHA-256 of a DER SubjectPublicKeyInfo. */
export const keyId = (spki: Uint8Array): Uint8Array => new Uint8Array(createHash('sha256').update(spki).digest().subarray(0, 8))

/** Sig_structure of COSE_Sign1 (RFC 9052 §4.4). */
const toBeSigned = (protectedHeader: Uint8Array, payload: Uint8Array): Uint8Array => encode(['Signature1', protectedHeader, none, payload])

/** The signed message, as it goes on the wire. */
export const signMessage = async (envelope: Envelope, signer: Signer): Promise<Uint8Array> => {
  const protectedHeader = encode(
    new Map<number, unknown>([
      [1, es256],
      [4, signer.kid],
    ]),
  )
  const payload = encode(envelope)
  const signature = await signer.sign(toBeSigned(protectedHeader, payload))
  if (signature.length !== 64) throw new Error(`a signer gave ${signature.length} bytes, not 64`)
  return Buffer.concat([Uint8Array.of(tag), encode([protectedHeader, {}, payload, signature])])
}

/**
 * Parses one message; verify it with `verifyMessage` before believing a word of it. Throws Problem: `malformed` (size, CBOR, COSE layout,
 * unknown or missing field), `unsupported` (another version, algorithm or type).
 */
export const readMessage = (bytes: Uint8Array, limits: { readonly max: number }): SignedMessage => {
  if (bytes.length > limits.max) throw new Problem('malformed', `a message of ${bytes.length} bytes`, { reason: 'message.size' })
  if (bytes[0] !== tag) throw new Problem('malformed', 'not a COSE_Sign1', { reason: 'cose.tag' })
  const outer = decode(bytes.subarray(1), { useMaps: true })
  if (!Array.isArray(outer) || outer.length !== 4) throw new Problem('malformed', 'not a COSE_Sign1', { reason: 'cose.layout' })
  const [protectedHeader, unprotected, payload, signature] = outer as readonly unknown[]
  if (
    !(protectedHeader instanceof Uint8Array && payload instanceof Uint8Array && signature instanceof Uint8Array) ||
    !(unprotected instanceof Map && unprotected.size === 0) ||
    signature.length !== 64
  )
    throw new Problem('malformed', 'not a COSE_Sign1', { reason: 'cose.layout' })
  return { envelope: envelopeOf(decode(payload)), kid: kidOf(protectedHeader), tbs: toBeSigned(protectedHeader, payload), signature, bytes }
}

const kidOf = (protectedHeader: Uint8Array): Uint8Array => {
  const header = decode(protectedHeader, { useMaps: true })
  if (!(header instanceof Map)) throw new Problem('malformed', 'the protected header is no map', { reason: 'cose.header' })
  const kid: unknown = header.get(4)
  if (header.get(1) !== es256) throw new Problem('unsupported', 'the signature algorithm is not ES256', { reason: 'cose.algorithm' })
  if (header.size !== 2 || !(kid instanceof Uint8Array) || kid.length !== 8)
    throw new Problem('malformed', 'the protected header is not {alg, kid}', { reason: 'cose.header' })
  return kid
}

const knownTypes: ReadonlySet<unknown> = new Set(Envelope.shape.body.options.map((option) => option.shape.type.value))

const envelopeOf = (value: unknown): Envelope => {
  const parsed = Envelope.safeParse(value)
  if (parsed.success) return parsed.data
  const { v, body } = (typeof value === 'object' && value !== null ? value : {}) as { v?: unknown; body?: { type?: unknown } }
  if (Number.isInteger(v) && v !== 1) throw new Problem('unsupported', `version ${String(v)}`, { reason: 'message.version' })
  if (typeof body?.type === 'string' && !knownTypes.has(body.type))
    throw new Problem('unsupported', `message type ${body.type.slice(0, 40)}`, { reason: 'message.type' })
  const issue = parsed.error.issues[0]
  throw new Problem('malformed', `${issue?.path.join('.') ?? ''}: ${issue?.message ?? 'invalid'}`.slice(0, 300), { reason: 'message.schema' })
}

/** A public key from its DER SubjectPublicKeyInfo; throws Problem('malformed'), or ('unsupported') for a key that is not of P-256. */
export const p256Key = (spki: Uint8Array): KeyObject => {
  const key = importSpki(spki)
  if (key.asymmetricKeyType !== 'ec' || key.asymmetricKeyDetails?.namedCurve !== 'prime256v1')
    throw new Problem('unsupported', 'not a P-256 key', { reason: 'key.curve' })
  return key
}

/** ECDSA P-256 with SHA-256; `signature` raw r‖s. False, never an exception, for a signature that is not one. */
export const verifySignature = (spki: Uint8Array, data: Uint8Array, signature: Uint8Array): boolean =>
  signature.length === 64 && verifyWith(p256Key(spki), data, signature)

/** The same with a P-256 key that was imported already. */
export const verifyWith = (key: KeyObject, data: Uint8Array, signature: Uint8Array): boolean =>
  signature.length === 64 && verify('sha256', data, { key, dsaEncoding: 'ieee-p1363' }, signature)

/** Throws Problem('unauthenticated') unless the owner of this key (DER SubjectPublicKeyInfo) signed the message. */
export const verifyMessage = (message: SignedMessage, spki: Uint8Array): void => {
  if (Buffer.compare(message.kid, keyId(spki)) !== 0) throw new Problem('unauthenticated', 'signed by another key', { reason: 'message.kid' })
  if (!verifySignature(spki, message.tbs, message.signature))
    throw new Problem('unauthenticated', 'the signature does not verify', { reason: 'message.signature' })
}

/** Raw r‖s (64 bytes) of a DER Ecdsa-Sig-Value of P-256 (RFC 3279 §2.2.3). Throws Problem('malformed'). */
export const rawSignature = (der: Uint8Array): Uint8Array => {
  const raw = new Uint8Array(64)
  let at = 2
  const fail = (): never => {
    throw new Problem('malformed', 'not a DER signature of P-256', { reason: 'signature.der' })
  }
  if (der[0] !== 0x30 || der[1] !== der.length - 2 || der.length > 72) fail()
  for (const end of [32, 64]) {
    const length = der[at + 1] ?? 0
    if (der[at] !== 0x02 || length === 0 || at + 2 + length > der.length) fail()
    const integer = der.subarray(at + 2, at + 2 + length)
    const value = integer[0] === 0 ? integer.subarray(1) : integer
    // A zero byte only where the next one would make the number negative (X.690 §8.3.2): one signature, one encoding.
    if (value.length > 32 || (integer[0] ?? 0) >= 0x80 || (integer[0] === 0 && length > 1 && (value[0] ?? 0) < 0x80)) fail()
    raw.set(value, end - value.length)
    at += 2 + length
  }
  return at === der.length ? raw : fail()
}

/** DER Ecdsa-Sig-Value of a raw r‖s signature (64 bytes). */
export const derSignature = (raw: Uint8Array): Uint8Array => {
  const integer = (value: Uint8Array): Uint8Array => {
    let start = 0
    while (start < value.length - 1 && value[start] === 0) start++
    const trimmed = value.subarray(start)
    const padded = (trimmed[0] ?? 0) >= 0x80 ? Buffer.concat([Uint8Array.of(0), trimmed]) : trimmed
    return Buffer.concat([Uint8Array.of(0x02, padded.length), padded])
  }
  const body = Buffer.concat([integer(raw.subarray(0, 32)), integer(raw.subarray(32, 64))])
  return Buffer.concat([Uint8Array.of(0x30, body.length), body])
}
