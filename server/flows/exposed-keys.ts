import { DeviceId, type GroupId, type KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { hasIdentity } from '../fleet/device.ts'
import { issuingKey, rolloverOf } from './authority.ts'
import type { Context } from './context.ts'
import { keysOf } from './membership.ts'
import { needDevice } from './revoke.ts'
import { findAll, idsWhere } from './rows.ts'
import { signedBy } from './station.ts'
import { issuerKeyOf } from '../ca/certificate.ts'

export type Revocable = 'device' | 'batch' | 'station' | 'ca'

/** What a revocation would rotate: every key that what is revoked could hold. */
export interface Exposed {
  readonly keys: readonly KeyId[]
  /** Groups through which. */
  readonly groups: readonly GroupId[]
  /** Devices that would go with it, of a batch those of its manifest; null: not counted. */
  readonly devices: number | null
}

const pageSize = 500

const keysOfGroups = async (ctx: Context, groups: readonly GroupId[]): Promise<readonly KeyId[]> => {
  const grants = await Promise.all(groups.map(async (group) => await findAll(ctx.store, 'grant', { where: { group } })))
  return [...new Set(grants.flat().map(({ key }) => key))].toSorted()
}

const groupsThat = async (ctx: Context, holds: (group: GroupId) => Promise<boolean>): Promise<readonly GroupId[]> => {
  const groups = await findAll(ctx.store, 'group')
  const found: GroupId[] = []
  for (const { id } of groups) if (await holds(id)) found.push(id)
  return found
}

const ofBatches = async (ctx: Context, batches: readonly string[]): Promise<Exposed> => {
  const groups = await groupsThat(ctx, async (group) => {
    for (const batch of batches) if ((await idsWhere(ctx.store, 'span', { index: 'lot', value: `${group}/${batch}`, limit: 1 })).length > 0) return true
    return false
  })
  const rows = await Promise.all(batches.map(async (batch) => (await ctx.store.get('batch', batch))?.rows ?? 0))
  return { keys: await keysOfGroups(ctx, groups), groups, devices: rows.reduce((sum, count) => sum + count, 0) }
}

/** Whether a certificate in use by this device comes from the CA with this key. */
const isUnder = async (ctx: Context, id: string, issuer: string): Promise<boolean> => {
  const device = await ctx.store.get('device', id)
  if (!hasIdentity(device)) return false
  const serials = [device.ldevidSerial, device.tlsSerial, device.previousTlsSerial].filter((serial) => serial !== null)
  const rows = await Promise.all(serials.map(async (serial) => await ctx.store.get('certificate', serial)))
  return rows.some((row) => row !== undefined && issuerKeyOf(row) === issuer && row.status === 'valid' && row.notAfter > ctx.now())
}

/** Groups with a member whose identity the CA vouches for. Members are read until one is found: long only for a large group that has none. */
const ofCa = async (ctx: Context, number: number): Promise<Exposed> => {
  const { generations } = await rolloverOf(ctx)
  if (!generations.some((one) => one.number === number)) throw new Problem('not-found', `no CA of generation ${number}`)
  const issuer = issuingKey(number)
  const groups = await groupsThat(ctx, async (group) => {
    for (let after: string | undefined; ;) {
      const ids = await idsWhere(ctx.store, 'member', { index: 'group', value: group, limit: pageSize, after })
      for (const id of ids) if (await isUnder(ctx, id.slice(group.length + 1), issuer)) return true
      after = ids.at(-1)
      if (ids.length < pageSize) return false
    }
  })
  return { keys: await keysOfGroups(ctx, groups), groups, devices: null }
}

/**
 * Keys that would have to be rotated if a device, a batch, everything that a station has signed, or everything that a generation of the CA (by number) vouches for
 * were not to be trusted any more. Changes nothing. Throws Problem('not-found').
 */
export const exposedKeys = async (ctx: Context, what: Revocable, id: string): Promise<Exposed> => {
  switch (what) {
    case 'device': {
      const device = await needDevice(ctx, DeviceId.parse(id))
      const groups = (await findAll(ctx.store, 'member', { where: { device: device.id } })).map(({ group }) => group).toSorted()
      return { keys: await keysOf(ctx, device.id), groups, devices: device.state === 'revoked' ? 0 : 1 }
    }
    case 'batch':
      if ((await ctx.store.get('batch', id)) === undefined) throw new Problem('not-found', `no batch ${id}`)
      return await ofBatches(ctx, [id])
    case 'station':
      return await ofBatches(
        ctx,
        (await signedBy(ctx, id)).batches.map((batch) => batch.id),
      )
    case 'ca':
      return await ofCa(ctx, Number(id))
  }
}
