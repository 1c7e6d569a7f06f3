import { createCipheriv, createDecipheriv, createECDH, createHmac, randomBytes } from 'node:crypto'
import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { sealTo, type WrapContext } from '@fleetkey/protocol/wrap.ts'
import type { KeyringTpm } from './keyring.ts'

/** For tests: the three TPM commands that the keyring needs, and deliveries for the device that has them. */
export interface TestDevice {
  readonly tpm: KeyringTpm
  readonly tenant: string
  readonly device: string
  /** `secret` is the key inside; `context` changes what it is wrapped for. */
  delivery(
    epoch: number,
    of?: Partial<BodyOf<'delivery'>> & { readonly secret?: Uint8Array; readonly protection?: 'sealed' | 'tpm'; readonly context?: Partial<WrapContext> },
  ): BodyOf<'delivery'>
}

export const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

const ivLength = 16

/** The recipient key and HMAC keys of one device, in this process: P-256, AES and HMAC of node:crypto. Key blobs open with this device's own key only. */
export const testDevice = (device = 'd-1', tenant = 'plant'): TestDevice => {
  const recipient = createECDH('prime256v1')
  const point = recipient.generateKeys()
  const parent = random(16)
  const crypt = (key: Uint8Array, iv: Uint8Array, data: Uint8Array): Uint8Array => createCipheriv('aes-128-ctr', key, iv).update(data)
  const open = (key: Uint8Array, bytes: Uint8Array): Uint8Array =>
    createDecipheriv('aes-128-ctr', key, bytes.subarray(0, ivLength)).update(bytes.subarray(ivLength))
  const seal = (key: Uint8Array, data: Uint8Array): Uint8Array => {
    const iv = random(ivLength)
    return Buffer.concat([iv, crypt(key, iv, data)])
  }
  return {
    tenant,
    device,
    tpm: {
      point: new Uint8Array(point),
      zgen: async (other) => new Uint8Array(recipient.computeSecret(other)),
      importHmacKey: async (wrapped) => ({ public: wrapped.public, private: seal(parent, open(wrapped.innerKey, wrapped.duplicate)) }),
      hmac: async (key, data) => new Uint8Array(createHmac('sha256', open(parent, key.private)).update(data).digest()),
    },
    delivery(epoch, { secret = random(32), protection = 'sealed', context = {}, ...more } = {}) {
      const key = more.key ?? KeyId.parse('site')
      const inner = random(16)
      const plain = protection === 'tpm' ? inner : secret
      const sealed = sealTo(
        point,
        new Secret(plain),
        Object.assign({ tenant, device, key, epoch, protection, purpose: protection === 'tpm' ? 'inner' : 'key' } as const, context),
      )
      return {
        type: 'delivery',
        key,
        algorithm: protection === 'tpm' ? 'HS256' : 'A256GCM',
        epoch: Epoch.parse(epoch),
        campaign: 'c-1',
        nonce: random(16),
        activate: false,
        readOnly: false,
        wrapped: protection === 'tpm' ? { protection, sealed, public: random(8), duplicate: seal(inner, secret), seed: random(8) } : { protection, sealed },
        ...more,
      }
    },
  }
}
