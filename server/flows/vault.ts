import type { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { openCell, sealCell, type Place } from '../keys/at-rest.ts'
import type { Shard } from '../keys/broadcast.ts'
import type { KeyEpoch } from '../keys/key.ts'
import type { Base } from './context.ts'
import type { Wrapped } from './kek.ts'
import { perform } from './perform.ts'

/** Seals and opens the key material of epochs under the data key, which the KEK in the KMS wraps. */
export interface Vault {
  seal(key: KeyId, epoch: Epoch, material: Secret): Uint8Array
  /** Throws Problem('conflict') for a destroyed epoch, Problem('internal') when the cell does not open. Destroy the result after use. */
  open(epoch: KeyEpoch): Secret
  /** Generation masters of shards. */
  sealMaster(shard: string, generation: number, master: Secret): Uint8Array
  openMaster(shard: Shard): Secret
}

const dataKeyId = 'dek-1'
const contextOf = (tenant: string, id: string): Uint8Array => encode(['fleetkey/1/data-key', tenant, id])

export const wrappedDataKey: Wrapped<'dataKey'> = {
  table: 'dataKey',
  wrapOf: ({ wrapped }) => wrapped,
  contextOf: (tenant, { id }) => contextOf(tenant, id),
  withWrap: (row, wrapped, kek) => ({ ...row, wrapped, kek }),
}

/** Makes the data key at first start, unwraps it at every start: the database alone decrypts nothing. */
export const openVault = async (ctx: Base, kek: string): Promise<Vault> => {
  const context = contextOf(ctx.tenant, dataKeyId)
  let row = await ctx.store.get('dataKey', dataKeyId)
  if (row === undefined) {
    const fresh = new Secret(ctx.random(32))
    const [wrapped] = await ctx.kms.wrap([{ key: kek, plaintext: fresh, context }])
    fresh.destroy()
    if (wrapped === undefined) throw new Problem('internal', 'the KMS wrapped nothing')
    await perform(ctx, { caller: { kind: 'system', id: 'setup', from: 'server' }, action: 'server.setup', subject: dataKeyId, detail: 'data key' }, (tx) =>
      tx.insert('dataKey', { id: dataKeyId, kek, wrapped, createdAt: ctx.now() }),
    )
    // A crash here: the data key is there and wraps nothing yet.
    ctx.step('setup.data-key')
    row = await ctx.store.get('dataKey', dataKeyId)
  }
  if (row === undefined) throw new Problem('internal', 'the data key was written and is not there')
  const [key] = await ctx.kms.unwrap([{ key: row.kek, wrapped: row.wrapped, context }])
  if (key === undefined) throw new Problem('internal', 'the KMS opened nothing')
  const place = (id: string): Place => ({ tenant: ctx.tenant, table: 'epoch', row: id, column: 'material' })
  const masterPlace = (shard: string, generation: number): Place => ({ tenant: ctx.tenant, table: 'shard', row: `${shard}/${generation}`, column: 'master' })
  return {
    seal: (id, epoch, material) => sealCell(key, place(`${id}/${epoch}`), material, ctx.random(12)),
    open(epoch) {
      if (epoch.material === null) throw new Problem('conflict', `epoch ${epoch.id} is destroyed`)
      return openCell(key, place(epoch.id), epoch.material)
    },
    sealMaster: (shard, generation, master) => sealCell(key, masterPlace(shard, generation), master, ctx.random(12)),
    openMaster: ({ id, generation, master }) => openCell(key, masterPlace(id, generation), master),
  }
}
