import type { DeviceId, Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Context } from './context.ts'
import { rotateWhatIsDue } from './rotate-due.ts'
import { countUsage } from './usage.ts'

/**
 * Takes a device's count of messages that it has protected under an epoch, since it has that epoch (the caller has verified whose it is). When all its holders together
 * come near the key's limit, it is rotated. Counts only grow: a lower one, of a device restored from an old copy, changes nothing.
 */
export const reportUsage = async (
  ctx: Context,
  device: DeviceId,
  of: { readonly key: KeyId; readonly epoch: Epoch; readonly messages: number },
): Promise<void> => {
  if (await countUsage(ctx, device, of)) await rotateWhatIsDue(ctx, of.key)
}
