import { createCipheriv, createDecipheriv } from 'node:crypto'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { KeyAlgorithm, Protection } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Keyring } from './keyring.ts'

/** One key as a local application sees it. */
export interface LocalKey {
  readonly key: string
  readonly algorithm: KeyAlgorithm
  readonly protection: Protection
  /** The epoch in use; null when none is yet. */
  readonly current: number | null
  readonly epochs: readonly number[]
}

/** What local applications may do with the keys. Every method throws Problem: `not-found`, `forbidden`, `unsupported`, `malformed`, `unauthenticated`, `unavailable`. */
export interface LocalKeys {
  list(): readonly LocalKey[]
  /** A copy of the key bytes: `sealed` keys only. */
  get(key: string, epoch?: number): { readonly key: string; readonly epoch: number; readonly algorithm: KeyAlgorithm; readonly material: Uint8Array }
  /** COSE_Encrypt0 (RFC 9052 §5.2), A256GCM, kid `KEY/EPOCH`, under the epoch in use; `aad` is the external_aad. */
  encrypt(key: string, plaintext: Uint8Array, aad?: Uint8Array): { readonly epoch: number; readonly ciphertext: Uint8Array }
  decrypt(key: string, ciphertext: Uint8Array, aad?: Uint8Array): { readonly epoch: number; readonly plaintext: Uint8Array }
  /** HMAC-SHA256 inside the TPM over "fleetkey/1 app\0" ‖ data. */
  mac(key: string, data: Uint8Array): Promise<{ readonly epoch: number; readonly mac: Uint8Array }>
  verify(key: string, epoch: number, data: Uint8Array, mac: Uint8Array): Promise<boolean>
}

const tag = 0xd0
const a256gcm = 3
const none = new Uint8Array(0)
const headerOf = (key: string, epoch: number): Uint8Array =>
  encode(
    new Map<number, unknown>([
      [1, a256gcm],
      [4, new TextEncoder().encode(`${key}/${epoch}`)],
    ]),
  )
const aadOf = (header: Uint8Array, external: Uint8Array): Uint8Array => encode(['Encrypt0', header, external])

const fail = (detail: string): never => {
  throw new Problem('malformed', detail, { reason: 'ciphertext.layout' })
}

/** Header, epoch, iv and ciphertext of a COSE_Encrypt0 that `encrypt` made under `key`. */
const parse = (key: string, bytes: Uint8Array) => {
  if (bytes[0] !== tag) return fail('not a COSE_Encrypt0')
  const outer = decode(bytes.subarray(1), { useMaps: true })
  const [header, unprotected, ciphertext] = (Array.isArray(outer) && outer.length === 3 ? outer : []) as readonly unknown[]
  if (!(header instanceof Uint8Array && unprotected instanceof Map && ciphertext instanceof Uint8Array && ciphertext.length >= 16))
    return fail('not a COSE_Encrypt0')
  const iv: unknown = unprotected.get(5)
  const facts = decode(header, { useMaps: true })
  const kid: unknown = facts instanceof Map && facts.size === 2 && facts.get(1) === a256gcm ? facts.get(4) : undefined
  if (!(kid instanceof Uint8Array && iv instanceof Uint8Array && iv.length === 12 && unprotected.size === 1))
    return fail('not an A256GCM COSE_Encrypt0 with kid and iv')
  const [, name, number] = /^([a-z0-9-]+)\/([1-9]\d{0,9})$/.exec(new TextDecoder().decode(kid)) ?? []
  if (name !== key || number === undefined) throw new Problem('not-found', `encrypted under another key than ${key}`, { reason: 'ciphertext.key' })
  return { header, epoch: Number(number), iv, ciphertext }
}

/** Use of the keys by local applications; `keyring` is asked at every call, it may not be open yet. */
export const localKeys = (keyring: () => Keyring, random: (length: number) => Uint8Array): LocalKeys => {
  const encryptionKey = (key: string, epoch?: number) => {
    const { algorithm } = keyring().heldOf(key) ?? {}
    if (algorithm === 'HS256') throw new Problem('unsupported', `${key} is a MAC key`, { reason: 'key.algorithm' })
    return keyring().material(key, epoch)
  }
  return {
    list: () =>
      keyring()
        .held()
        .filter(({ epochs }) => epochs.length > 0)
        .map(({ key, algorithm, protection, current, epochs }) => ({ key, algorithm, protection, current, epochs: epochs.map(({ epoch }) => epoch) })),

    get(key, epoch) {
      const found = keyring().material(key, epoch)
      return { key, epoch: found.epoch, algorithm: keyring().heldOf(key)?.algorithm ?? 'A256GCM', material: Uint8Array.from(found.secret.bytes()) }
    },

    encrypt(key, plaintext, aad = none) {
      const { epoch, secret } = encryptionKey(key)
      const header = headerOf(key, epoch)
      const iv = random(12)
      const cipher = createCipheriv('aes-256-gcm', secret.bytes(), iv, { authTagLength: 16 })
      cipher.setAAD(aadOf(header, aad))
      const body = Buffer.concat([cipher.update(plaintext), cipher.final(), cipher.getAuthTag()])
      return { epoch, ciphertext: new Uint8Array(Buffer.concat([Uint8Array.of(tag), encode([header, new Map([[5, iv]]), body])])) }
    },

    decrypt(key, bytes, aad = none) {
      const { header, epoch, iv, ciphertext } = parse(key, bytes)
      const { secret } = encryptionKey(key, epoch)
      const decipher = createDecipheriv('aes-256-gcm', secret.bytes(), iv, { authTagLength: 16 })
      decipher.setAAD(aadOf(header, aad))
      decipher.setAuthTag(ciphertext.subarray(-16))
      try {
        return { epoch, plaintext: new Uint8Array(Buffer.concat([decipher.update(ciphertext.subarray(0, -16)), decipher.final()])) }
      } catch (cause) {
        throw new Problem('unauthenticated', 'the ciphertext does not authenticate', { reason: 'ciphertext.tag', cause })
      }
    },

    mac: async (key, data) => await keyring().mac(key, data),
    verify: async (key, epoch, data, mac) => await keyring().verify({ key, epoch, data, mac }),
  }
}
