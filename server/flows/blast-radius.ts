import type { DeviceId, KeyId } from '@fleetkey/protocol/ids.ts'
import { deviceTopic } from '@fleetkey/protocol/topics.ts'
import { hasIdentity, type Device } from '../fleet/device.ts'
import { exposureOf, type Exposure } from '../keys/exposure.ts'
import type { Window } from '../keys/span.ts'
import type { Context } from './context.ts'
import { keysOf } from './membership.ts'
import { readableKey, type ReadableKey } from './readable-key.ts'
import { needDevice } from './revoke.ts'
import { findAll } from './rows.ts'

/** What one identity could read, and from when to when: answered from what was delivered, acknowledged, granted and rotated. */
export interface BlastRadius {
  readonly device: DeviceId
  readonly state: Device['state']
  /** While it could connect; null: it never had an identity. */
  readonly identity: Window | null
  /** Topics of the broker that it alone may read and write; all that the broker lets it. */
  readonly topics: readonly string[]
  readonly keys: readonly ReadableKey<Exposure>[]
  /** Keys that were granted to its groups and never sent to it: it has read nothing under them. */
  readonly notDelivered: readonly KeyId[]
}

/** While a device could connect; `until` null: it can. Null: it never had an identity. */
export const identityOf = (device: Device): Window | null => {
  if (hasIdentity(device)) return { from: device.enrolledAt, until: null }
  if (device.state === 'suspended') return hasIdentity(device.before) ? { from: device.before.enrolledAt, until: device.suspendedAt } : null
  if (device.state !== 'revoked' || device.keys === null) return null
  // What was revoked before the time was kept: since it was registered, at most.
  return { from: device.enrolledAt ?? device.registeredAt, until: device.revokedAt }
}

/** The blast radius of a device as the ledger has it now. Throws Problem('not-found'). */
export const blastRadius = async (ctx: Context, id: DeviceId): Promise<BlastRadius> => {
  const device = await needDevice(ctx, id)
  const [holdings, granted] = await Promise.all([findAll(ctx.store, 'holding', { where: { device: id } }), keysOf(ctx, id)])
  const held = [...new Set(holdings.map(({ key }) => key))].toSorted()
  const keys = await Promise.all(
    held.map(async (key) => {
      const exposures = await Promise.all(
        holdings
          .filter((holding) => holding.key === key)
          .map(async (holding) => {
            const epoch = await ctx.store.get('epoch', `${key}/${holding.epoch}`)
            return epoch === undefined ? [] : [exposureOf(holding, epoch)]
          }),
      )
      return await readableKey(ctx, key, exposures.flat())
    }),
  )
  const identity = identityOf(device)
  return {
    device: id,
    state: device.state,
    identity,
    topics: identity === null ? [] : [deviceTopic(id, 'up'), deviceTopic(id, 'down')],
    keys: keys.filter((key) => key !== undefined),
    notDelivered: granted.filter((key) => !held.includes(key)),
  }
}
