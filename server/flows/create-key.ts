import { Epoch, KeyId, type GroupId } from '@fleetkey/protocol/ids.ts'
import type { KeyAlgorithm, Protection } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Caller } from '../access/caller.ts'
import { checkValueOf } from '../keys/at-rest.ts'
import { gcmLimit } from '../keys/cryptoperiod.ts'
import type { KeyEpoch } from '../keys/key.ts'
import type { Context } from './context.ts'
import { addBroadcasts, deliveryPolicyOf, notByBroadcast, prepareGrant } from './broadcast.ts'
import { convergeMembers } from './converge.ts'
import { perform } from './perform.ts'

/** What each protection can hold: a `tpm` key is an HMAC key inside the TPM, a `sealed` one an AES key in the agent's memory. */
const algorithmOf: Readonly<Record<Protection, KeyAlgorithm>> = { sealed: 'A256GCM', tpm: 'HS256' }
/** Milliseconds that a superseded epoch stays readable unless the key says otherwise: a week. */
const defaultRecipientUsage = 7 * 86_400_000

/** Fresh key material of one epoch, sealed at rest. */
export const newEpoch = (ctx: Context, key: KeyId, epoch: Epoch, state: 'active' | 'pre-activation'): Omit<KeyEpoch, 'version'> => {
  const material = new Secret(ctx.random(32))
  const now = ctx.now()
  const row = {
    id: `${key}/${epoch}`,
    key,
    epoch,
    state,
    material: ctx.vault.seal(key, epoch, material),
    checkValue: checkValueOf(material),
    createdAt: now,
    activatedAt: state === 'active' ? now : null,
    deactivatedAt: null,
    destroyedAt: null,
  }
  material.destroy()
  return row
}

/** Creates a managed key with its first epoch, active at once: nobody holds it until it is granted. `recipientUsage`, `originatorUsage`: milliseconds. */
export const createKey = async (
  ctx: Context,
  caller: Caller,
  of: {
    id: KeyId
    protection: Protection
    algorithm?: KeyAlgorithm | undefined
    recipientUsage?: number | undefined
    originatorUsage?: number | null | undefined
    usageLimit?: number | null | undefined
  },
): Promise<{ id: KeyId; epoch: number }> => {
  const algorithm = algorithmOf[of.protection]
  const first = Epoch.parse(1)
  await perform(ctx, { caller, action: 'key.create', subject: of.id, detail: `${of.protection} ${algorithm}` }, async (tx) => {
    if (of.algorithm !== undefined && of.algorithm !== algorithm)
      throw new Problem('unsupported', `a ${of.protection} key is ${algorithm}, not ${of.algorithm}`, { reason: 'key.algorithm' })
    if ((await ctx.store.get('key', of.id)) !== undefined) throw new Problem('conflict', `key ${of.id} exists`)
    const recipientUsage = of.recipientUsage ?? defaultRecipientUsage
    const { originatorUsage = null, usageLimit = algorithm === 'A256GCM' ? gcmLimit : null } = of
    const common = { id: KeyId.parse(of.id), algorithm, protection: of.protection, createdAt: ctx.now() }
    tx.insert('key', { ...common, current: 1, latest: 1, recipientUsage, originatorUsage, usageLimit })
    tx.insert('epoch', newEpoch(ctx, of.id, first, 'active'))
  })
  ctx.step('key.create')
  return { id: of.id, epoch: 1 }
}

/**
 * Lets the members of a group hold a key; those that are connected get it at once, the others when they next connect. How many devices that concerns.
 * `history`: also epochs from before this grant, whoever joined when.
 */
export const grantKey = async (ctx: Context, caller: Caller, key: KeyId, group: GroupId, history = false): Promise<{ devices: number }> => {
  await prepareGrant(ctx, key, group)
  const devices = await perform(
    ctx,
    { caller, action: 'key.grant', subject: key, detail: `to group ${group}${history ? ', with its history' : ''}` },
    async (tx) => {
      const [row, to] = await Promise.all([ctx.store.get('key', key), ctx.store.get('group', group)])
      if (row === undefined) throw new Problem('not-found', `no key ${key}`)
      if (to === undefined) throw new Problem('not-found', `no group ${group}`)
      if ((await ctx.store.get('grant', `${key}/${group}`)) !== undefined) throw new Problem('conflict', `key ${key} is granted to group ${group} already`)
      if (row.protection !== 'sealed' && deliveryPolicyOf(to).delivery === 'broadcast') throw notByBroadcast(key, group)
      tx.insert('grant', { id: `${key}/${group}`, key, group, grantedAt: ctx.now(), ...(history ? {} : { from: row.current }) })
      const epoch = await ctx.store.get('epoch', `${key}/${row.current}`)
      if (epoch !== undefined) await addBroadcasts(ctx, tx, row, epoch, to)
      return await ctx.store.count('member', { group })
    },
  )
  // A crash here: the grant stands; every member gets the key with its next report.
  ctx.step('key.grant')
  await convergeMembers(ctx, [group])
  return { devices }
}
