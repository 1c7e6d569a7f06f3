import { hash } from 'node:crypto'
import { keyId, rawSignature, signMessage, type Signer } from '@fleetkey/protocol/signed.ts'
import type { Body } from '@fleetkey/protocol/messages.ts'
import { DeviceId, EnrolmentId, GroupAddress, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Base, Kms, KmsKeyPurpose } from './context.ts'

/** A signer of messages whose key stays in the KMS. `spki`: DER public key of the KMS key `name`. */
export const kmsSigner = (kms: Kms, key: string, purpose: KmsKeyPurpose, spki: Uint8Array): Signer => ({
  kid: keyId(spki),
  async sign(tbs) {
    const [der] = await kms.sign([{ key, purpose, data: tbs }])
    if (der === undefined) throw new Error(`the KMS gave no signature of ${key}`)
    return rawSignature(der)
  },
})

const addressee = (name: string): DeviceId | EnrolmentId | GroupAddress =>
  name.startsWith('g/') ? GroupAddress.parse(name) : name.startsWith('e-') ? EnrolmentId.parse(name) : DeviceId.parse(name)

/** One signed message of the server to a client (device id, or `e-…`) or to a shard of a group (its address), with a fresh id. */
export const messageTo = async (ctx: Base, signer: Signer, client: string, body: Body): Promise<Uint8Array> =>
  await signMessage(
    {
      v: 1,
      tenant: TenantId.parse(ctx.tenant),
      device: addressee(client),
      from: 'server',
      id: ctx.random(16),
      seq: ctx.now(),
      body,
    },
    signer,
  )

export const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
export const sha256hex = (bytes: Uint8Array): string => hash('sha256', bytes, 'hex')
