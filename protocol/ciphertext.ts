import { createCipheriv, createDecipheriv, hkdfSync } from 'node:crypto'
import { decode, encode } from './cbor.ts'
import { Problem } from './problem.ts'
import type { Secret } from './secret.ts'

/**
 * Application data under a managed key: COSE_Encrypt0 (RFC 9052 §5.2, tag 16), A256GCM. Everything that a reader needs stands in the protected header: `alg`, `kid`
 * (`KEY/EPOCH`), `Partial IV`, `kid context`. Many devices share a key, and a device may be put back to an older disk: so nobody encrypts under the managed key itself.
 * Each run of a writer draws a `kid context` and derives a key of its own from it, as OSCORE does (RFC 8613 §3.2.1); under that key it counts (SP 800-38D §8.2.1,
 * deterministic construction). No nonce comes twice unless 128 random bits do, whatever was lost or restored.
 */
export interface CiphertextHead {
  readonly key: string
  readonly epoch: number
  /** `kid context`: 16 bytes, random per run of a writer. */
  readonly run: Uint8Array
  /** Which message of the run: 0, 1, 2, … */
  readonly counter: number
}

/** A ciphertext taken apart; nothing of it is authentic before it was opened. */
export interface Ciphertext extends CiphertextHead {
  readonly header: Uint8Array
  /** With the tag at its end. */
  readonly body: Uint8Array
}

const tag = 0xd0
const label = { alg: 1, kid: 4, partialIv: 6, kidContext: 10 } as const
const a256gcm = 3
export const runLength = 16
const tagLength = 16
const none = new Uint8Array(0)
/** What a ciphertext is longer than its plaintext, at most: framing, header with the longest key name, tag. */
export const ciphertextOverhead = 160

/** The key of one run of a writer: HKDF-SHA256 (RFC 5869) of the managed key's epoch. */
const runKey = (secret: Secret, { key, epoch, run }: Pick<CiphertextHead, 'key' | 'epoch' | 'run'>): Uint8Array =>
  new Uint8Array(hkdfSync('sha256', secret.bytes(), run, encode(['fleetkey/1/encrypt', key, epoch]), 32))

/** Big-endian, as short as it can be; 0 is one zero byte. */
const partialIv = (counter: number): Uint8Array => {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(BigInt(counter))
  const first = bytes.findIndex((byte) => byte !== 0)
  return new Uint8Array(bytes.subarray(first < 0 ? 7 : first))
}
/** RFC 9052 §3.1: the Partial IV, padded with zeros on the left; our context IV is zero. */
const ivOf = (counter: number): Uint8Array => {
  const iv = Buffer.alloc(12)
  iv.writeBigUInt64BE(BigInt(counter), 4)
  return iv
}

/** Enc_structure (RFC 9052 §5.3). */
const aadOf = (header: Uint8Array, external: Uint8Array): Uint8Array => encode(['Encrypt0', header, external])

/** Encrypts under the epoch of a managed key that the head names. The caller sees to it that no counter comes twice in a run. `aad`: external_aad. */
export const encryptData = (secret: Secret, head: CiphertextHead, plaintext: Uint8Array, aad: Uint8Array = none): Uint8Array => {
  const header = encode(
    new Map<number, unknown>([
      [label.alg, a256gcm],
      [label.kid, new TextEncoder().encode(`${head.key}/${head.epoch}`)],
      [label.partialIv, partialIv(head.counter)],
      [label.kidContext, head.run],
    ]),
  )
  const key = runKey(secret, head)
  const cipher = createCipheriv('aes-256-gcm', key, ivOf(head.counter), { authTagLength: tagLength })
  key.fill(0)
  cipher.setAAD(aadOf(header, aad))
  const body = Buffer.concat([cipher.update(plaintext), cipher.final(), cipher.getAuthTag()])
  return new Uint8Array(Buffer.concat([Uint8Array.of(tag), encode([header, new Map(), body])]))
}

const fail = (detail: string): never => {
  throw new Problem('malformed', detail, { reason: 'ciphertext.layout' })
}

/** Takes a ciphertext apart; says which key, epoch and run it wants. Throws Problem('malformed'). */
export const readCiphertext = (bytes: Uint8Array): Ciphertext => {
  if (bytes[0] !== tag) return fail('not a COSE_Encrypt0')
  const outer = decode(bytes.subarray(1), { useMaps: true })
  const [header, unprotected, body] = (Array.isArray(outer) && outer.length === 3 ? outer : []) as readonly unknown[]
  if (!(header instanceof Uint8Array && unprotected instanceof Map && unprotected.size === 0 && body instanceof Uint8Array && body.length >= tagLength))
    return fail('not a COSE_Encrypt0')
  const facts = decode(header, { useMaps: true })
  if (!(facts instanceof Map) || facts.size !== 4 || facts.get(label.alg) !== a256gcm) return fail('not an A256GCM header of kid, Partial IV and kid context')
  const [kid, iv, run]: readonly unknown[] = [facts.get(label.kid), facts.get(label.partialIv), facts.get(label.kidContext)]
  if (!(kid instanceof Uint8Array && iv instanceof Uint8Array && run instanceof Uint8Array && run.length === runLength))
    return fail('not an A256GCM header of kid, Partial IV and kid context')
  const [, key, number] = /^([a-z0-9][a-z0-9-]{0,63})\/([1-9]\d{0,9})$/.exec(new TextDecoder().decode(kid)) ?? []
  const epoch = Number(number)
  if (key === undefined || epoch > 0xffff_ffff) return fail('the kid is not KEY/EPOCH')
  // One spelling of every number: at most six bytes, which a counter never outgrows, and none that is not needed.
  if (iv.length === 0 || iv.length > 6 || (iv.length > 1 && iv[0] === 0)) return fail('no Partial IV')
  return { key, epoch, run, counter: Buffer.from(iv).readUIntBE(0, iv.length), header, body }
}

/** Opens it with the managed key's epoch that it names. Throws Problem('unauthenticated') when it was changed, moved to other `aad`, or made under another key. */
export const decryptData = (secret: Secret, ciphertext: Ciphertext, aad: Uint8Array = none): Uint8Array => {
  const { header, body, counter } = ciphertext
  const key = runKey(secret, ciphertext)
  try {
    const decipher = createDecipheriv('aes-256-gcm', key, ivOf(counter), { authTagLength: tagLength })
    decipher.setAAD(aadOf(header, aad))
    decipher.setAuthTag(body.subarray(-tagLength))
    return new Uint8Array(Buffer.concat([decipher.update(body.subarray(0, -tagLength)), decipher.final()]))
  } catch (cause) {
    throw new Problem('unauthenticated', 'the ciphertext does not authenticate', { reason: 'ciphertext.tag', cause })
  } finally {
    key.fill(0)
  }
}
