import type { KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { ManagedKey } from '../keys/key.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'

/** A change of some parts of a key's cryptoperiod and usage limit. */
export type KeyPolicyChange = { readonly [P in 'recipientUsage' | 'originatorUsage' | 'usageLimit']?: ManagedKey[P] | undefined }

/** Changes how long, and for how much, epochs of a key are used; the epoch in use is judged by it within a minute. The key afterwards. */
export const setKeyPolicy = async (ctx: Context, caller: Caller, id: KeyId, change: KeyPolicyChange): Promise<ManagedKey> => {
  await perform(ctx, { caller, action: 'key.policy', subject: id, detail: JSON.stringify(change) }, async (tx) => {
    const key = await ctx.store.get('key', id)
    if (key === undefined) throw new Problem('not-found', `no key ${id}`)
    const given = Object.fromEntries(Object.entries(change).filter(([, value]) => value !== undefined)) as Partial<ManagedKey>
    tx.update('key', { ...key, ...given })
  })
  // A crash here: the policy holds.
  ctx.step('key.policy')
  const key = await ctx.store.get('key', id)
  if (key === undefined) throw new Problem('not-found', `no key ${id}`)
  return key
}
