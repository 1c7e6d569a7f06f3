import type { BodyOf, Wrapped } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { sealTo, type WrapContext } from '@fleetkey/protocol/wrap.ts'
import { wrapForImport } from '@fleetkey/tpm2/import.ts'
import { inTpm, type EnrolledDevice } from '../fleet/device.ts'
import { recipientPoint, recipientPolicy } from '../fleet/firmware.ts'
import type { Holding, KeyEpoch, ManagedKey } from '../keys/key.ts'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { dropSeats } from './broadcast.ts'
import type { Context } from './context.ts'
import type { Transaction } from './perform.ts'
import { findAll } from './rows.ts'

/**
 * Key material for one device only. `sealed`: HPKE to the recipient key. `tpm`: an import blob for the SRK that the AK certified (it never leaves the TPM
 * again) under the same firmware policy as the recipient key, which opens its inner wrapper's key. The record of the key fixes which of the two it is.
 */
const wrappedFor = (ctx: Context, device: EnrolledDevice, key: ManagedKey, epoch: KeyEpoch): Wrapped => {
  const material = ctx.vault.open(epoch)
  const context: WrapContext = { tenant: ctx.tenant, device: device.id, key: key.id, epoch: epoch.epoch, protection: key.protection, purpose: 'key' }
  const { keys } = device
  const recipient = recipientPoint(keys)
  // Entitlement has seen to it already.
  if (recipient === null) throw new Problem('internal', `${device.id} has no recipient key`, { reason: 'key.needs-recipient' })
  try {
    if (key.protection === 'sealed') return { protection: 'sealed', sealed: sealTo(recipient, material, context) }
    // Entitlement has seen to it already: a key that is to be in a TPM never goes anywhere else.
    if (!inTpm(keys)) throw new Problem('internal', `${key.id} is a tpm key, ${device.id} has no TPM`, { reason: 'key.needs-tpm' })
    const blob = wrapForImport({ parent: keys.srk, key: material.bytes(), authPolicy: recipientPolicy(keys), random: ctx.random })
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

/** Adds to a commit: what waits for the device is wrapped to a recipient key that it no longer has, and labels were sealed to it; it is wrapped anew, in another place. */
export const dropDeliveries = async (ctx: Context, tx: Transaction, device: DeviceId): Promise<void> => {
  for (const message of await findAll(ctx.store, 'outbox', { where: { device } })) if (message.subject.startsWith('delivery/')) tx.remove('outbox', message)
  await dropSeats(ctx, tx, device)
  tx.note('new recipient key')
}

export const activateOf = (holding: Holding, campaign: string | null): BodyOf<'activate'> => ({
  type: 'activate',
  key: holding.key,
  epoch: holding.epoch,
  campaign,
  nonce: holding.nonce,
})
