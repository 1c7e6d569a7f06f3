import { createCipheriv, createDecipheriv } from 'node:crypto'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'

/** What bytes at rest are. All of it is authenticated: they cannot be put in another place. */
export interface RestContext {
  readonly tenant: string
  /** Empty where the device id is inside, not yet known. */
  readonly device: string
  readonly key: string
  readonly epoch: number
  readonly kind: 'identity' | 'renewal' | 'keyring' | 'labels' | 'sealed' | 'tpm'
}

const ivLength = 12
const tagLength = 16

const aadOf = (of: RestContext): Uint8Array => encode(['fleetkey/1/rest', of.tenant, of.device, of.key, of.epoch, of.kind])

/** AES-256-GCM under the storage key that the TPM seals: iv ‖ ciphertext ‖ tag. */
export const sealAtRest = (storage: Secret, plaintext: Uint8Array, context: RestContext, random: (length: number) => Uint8Array): Uint8Array => {
  const iv = random(ivLength)
  const cipher = createCipheriv('aes-256-gcm', storage.bytes(), iv, { authTagLength: tagLength })
  cipher.setAAD(aadOf(context))
  return new Uint8Array(Buffer.concat([iv, cipher.update(plaintext), cipher.final(), cipher.getAuthTag()]))
}

/** What `sealAtRest` sealed under one of these keys for this context. Throws Problem('unauthenticated') for anything else. */
export const openAtRest = (storage: Secret | readonly Secret[], bytes: Uint8Array, context: RestContext): Secret => {
  const [key, ...others] = storage instanceof Secret ? [storage] : storage
  const fail = (cause?: unknown): Secret => {
    if (others.length > 0) return openAtRest(others, bytes, context)
    throw new Problem('unauthenticated', `${context.kind} at rest does not open`, { reason: 'rest.open', cause })
  }
  if (key === undefined || bytes.length < ivLength + tagLength) return fail()
  const decipher = createDecipheriv('aes-256-gcm', key.bytes(), bytes.subarray(0, ivLength), { authTagLength: tagLength })
  decipher.setAAD(aadOf(context))
  decipher.setAuthTag(bytes.subarray(-tagLength))
  try {
    const plain = Buffer.concat([decipher.update(bytes.subarray(ivLength, -tagLength)), decipher.final()])
    const secret = new Secret(plain)
    plain.fill(0)
    return secret
  } catch (cause) {
    return fail(cause)
  }
}
