import { createECDH, createPrivateKey, createPublicKey, generateKeyPairSync, sign, type KeyObject } from 'node:crypto'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { z } from 'zod'
import type { Document } from './files.ts'
import type { KeyringTpm } from './keyring.ts'

/**
 * The keys of a device without a TPM. They lie in a file that only the agent's account can read: whoever has that account, or the disk, has them. Everything
 * else at rest is encrypted under the storage key among them, so that this is the one file to protect.
 */
export interface SoftwareKeys {
  /** They were here before this start. */
  readonly known: boolean
  /** Device id of an earlier enrolment. */
  readonly device: string | null
  readonly ldevid: { readonly spki: Uint8Array; sign(data: Uint8Array): Promise<Uint8Array> }
  readonly recipient: KeyringTpm & { readonly spki: Uint8Array }
  readonly storage: Secret
  /** Remembers, durably, which device this is. */
  settle(device: string): Promise<void>
}

const bytes = z.custom<Uint8Array>((value) => value instanceof Uint8Array)
const Stored = z.strictObject({ v: z.literal(1), device: DeviceId.nullable(), ldevid: bytes, recipient: bytes, storage: bytes })
type Stored = z.infer<typeof Stored>

const newKey = (): Uint8Array => {
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  return new Uint8Array(privateKey.export({ format: 'der', type: 'pkcs8' }))
}
const keyOf = (pkcs8: Uint8Array): KeyObject => createPrivateKey({ key: Buffer.from(pkcs8), format: 'der', type: 'pkcs8' })
const spkiOf = (key: KeyObject): Uint8Array => new Uint8Array(createPublicKey(key).export({ format: 'der', type: 'spki' }))

/** x coordinate of the key times a point (SP 800-56A: the point is checked by OpenSSL). */
const dhOf = (key: KeyObject): ((point: Uint8Array) => Promise<Uint8Array>) => {
  const ecdh = createECDH('prime256v1')
  const { d } = key.export({ format: 'jwk' })
  ecdh.setPrivateKey(Buffer.from(d ?? '', 'base64url'))
  return async (point) => new Uint8Array(ecdh.computeSecret(point))
}

const noTpm = async (): Promise<never> => {
  throw new Problem('unsupported', 'this device has no TPM to hold such a key', { reason: 'key.needs-tpm' })
}

/** Opens what is stored, or makes the keys of a device that is new. */
export const openSoftwareKeys = async (of: {
  readonly document: Document
  readonly random: (length: number) => Uint8Array
  readonly step: (name: string) => void
}): Promise<SoftwareKeys> => {
  const { document, random, step } = of
  const read = async (): Promise<Stored | undefined> => {
    const found = await document.load()
    if (found === undefined) return undefined
    const stored = Stored.parse(decode(found))
    found.fill(0)
    return stored
  }
  const save = async (next: Stored): Promise<void> => {
    const plain = encode(next)
    // No other keys stay on the medium beside these.
    await document.replace(plain)
    plain.fill(0)
  }
  const wipe = ({ ldevid, recipient, storage }: Stored): void => {
    for (const secret of [ldevid, recipient, storage]) secret.fill(0)
  }

  const there = await read()
  const stored: Stored = there ?? { v: 1, device: null, ldevid: newKey(), recipient: newKey(), storage: random(32) }
  if (there === undefined) {
    await save(stored)
    // A crash here: keys that nobody knows yet; they are used by the next hello.
    step('software-keys.stored')
  }
  const [ldevid, recipient, storage] = [keyOf(stored.ldevid), keyOf(stored.recipient), new Secret(stored.storage)]
  const recipientSpki = spkiOf(recipient)
  let known: string | null = stored.device
  wipe(stored)
  return {
    known: there !== undefined,
    get device() {
      return known
    },
    ldevid: { spki: spkiOf(ldevid), sign: async (data) => new Uint8Array(sign('sha256', data, { key: ldevid, dsaEncoding: 'ieee-p1363' })) },
    recipient: { spki: recipientSpki, point: recipientSpki.subarray(-65), zgen: dhOf(recipient), importHmacKey: noTpm, hmac: noTpm },
    storage,
    async settle(device) {
      if (known === device) return
      const now = await read()
      if (now === undefined) throw new Problem('unavailable', 'the keys of this device are gone from its disk', { reason: 'software-keys' })
      await save({ ...now, device: DeviceId.parse(device) })
      wipe(now)
      // A crash here: the device knows who it is, whatever becomes of its identity.
      step('software-keys.settled')
      known = device
    },
  }
}
