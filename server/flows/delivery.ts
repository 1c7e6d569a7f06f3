import type { BodyOf, Wrapped } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { sealTo, type WrapContext } from '@fleetkey/protocol/wrap.ts'
import { wrapForImport } from '@fleetkey/tpm2/import.ts'
import { pointOf } from '@fleetkey/tpm2/structures.ts'
import type { EnrolledDevice } from '../fleet/device.ts'
import { recipientPolicy } from '../fleet/firmware.ts'
import type { Holding, KeyEpoch, ManagedKey } from '../keys/key.ts'
import type { Context } from './context.ts'

/**
 * Key material for one device only. `sealed`: HPKE to the recipient key. `tpm`: an import blob for the SRK that the AK certified (it never leaves the TPM
 * again) under the same firmware policy as the recipient key, which opens its inner wrapper's key. The record of the key fixes which of the two it is.
 */
const wrappedFor = (ctx: Context, device: EnrolledDevice, key: ManagedKey, epoch: KeyEpoch): Wrapped => {
  const material = ctx.vault.open(epoch)
  const context: WrapContext = { tenant: ctx.tenant, device: device.id, key: key.id, epoch: epoch.epoch, protection: key.protection, purpose: 'key' }
  const recipient = pointOf(device.keys.recipient)
  try {
    if (key.protection === 'sealed') return { protection: 'sealed', sealed: sealTo(recipient, material, context) }
    const blob = wrapForImport({ parent: device.keys.srk, key: material.bytes(), authPolicy: recipientPolicy(device.keys), random: ctx.random })
    const inner = new Secret(blob.innerKey)
    const sealed = sealTo(recipient, inner, { ...context, purpose: 'inner' })
    inner.destroy()
    return { protection: 'tpm', sealed, public: blob.public, duplicate: blob.duplicate, seed: blob.seed }
  } finally {
    material.destroy()
  }
}

/** The delivery of one epoch. `as`: what the device is to do with it. */
export const deliveryOf = (
  ctx: Context,
  device: EnrolledDevice,
  of: { key: ManagedKey; epoch: KeyEpoch; as: 'active' | 'readable' | 'install'; nonce: Uint8Array; campaign: string | null },
): BodyOf<'delivery'> => ({
  type: 'delivery',
  key: of.key.id,
  algorithm: of.key.algorithm,
  epoch: of.epoch.epoch,
  campaign: of.campaign,
  nonce: of.nonce,
  activate: of.as === 'active',
  readOnly: of.as === 'readable',
  wrapped: wrappedFor(ctx, device, of.key, of.epoch),
})

export const activateOf = (holding: Holding, campaign: string | null): BodyOf<'activate'> => ({
  type: 'activate',
  key: holding.key,
  epoch: holding.epoch,
  campaign,
  nonce: holding.nonce,
})
