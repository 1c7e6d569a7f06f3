import { KeyId } from '@fleetkey/protocol/ids.ts'
import type { Caller } from '../access/caller.ts'
import type { Context, Setting, Store } from './context.ts'
import { perform, type Transaction } from './perform.ts'
import { rotateKeys } from './rotate.ts'
import { findAll } from './rows.ts'
import { inTurn } from './turn.ts'

/**
 * A rotation that a revocation or a departure owes: written in the same commit as its cause, removed when the campaigns exist.
 * A crash in between leaves the marker, and the start-up sweep pays the debt; after a failure (a full disk, say) the clock does.
 */
interface Owed {
  readonly keys: readonly string[]
  readonly because: string
  /** Client whose live session must end first. */
  readonly kick: string | null
}

export const owedRotation = 'owed-rotation/'
const system: Caller = { kind: 'system', id: 'rotation', from: 'server' }

const read = (setting: Setting): Owed => JSON.parse(new TextDecoder().decode(setting.value)) as Owed

/** Adds the marker to a commit. `name` is unique per cause, such as `revoke/<device>`. */
export const owe = (tx: Transaction, name: string, owed: Owed): void =>
  tx.insert('setting', { id: `${owedRotation}${name}`, value: new TextEncoder().encode(JSON.stringify(owed)) })

/** What this process has already begun of what is owed: a key that cannot be rotated now does not have the others rotated again with every attempt. */
const begun = new WeakMap<Store, Map<string, Map<KeyId, readonly string[]>>>()

/** Ends the session, starts the campaigns, removes the marker. Harmless to repeat. The ids of the campaigns. */
export const settle = async (ctx: Context, name: string): Promise<readonly string[]> =>
  await inTurn(ctx.store, `owed/${name}`, async () => {
    const setting = await ctx.store.get('setting', `${owedRotation}${name}`)
    if (setting === undefined) return []
    const { keys, because, kick } = read(setting)
    if (kick !== null) await ctx.bus.kick(kick, because)
    // A crash here: the session is gone with the process; the sweep rotates.
    ctx.step('rotation.kicked')
    const all = begun.get(ctx.store) ?? new Map<string, Map<KeyId, readonly string[]>>()
    begun.set(ctx.store, all)
    const campaigns = all.get(name) ?? new Map<KeyId, readonly string[]>()
    all.set(name, campaigns)
    for (const key of keys.map((one) => KeyId.parse(one))) if (!campaigns.has(key)) campaigns.set(key, await rotateKeys(ctx, [key], because))
    // A crash here: the keys rotate once more after the restart, which costs an epoch and harms nobody.
    ctx.step('rotation.started')
    await perform(ctx, { caller: system, action: 'rotation.settle', subject: name, detail: `${because}: ${keys.join(', ') || 'no keys'}` }, async (tx) => {
      const now = await ctx.store.get('setting', setting.id)
      if (now !== undefined) tx.remove('setting', now)
    })
    all.delete(name)
    ctx.step('rotation.settled')
    return [...campaigns.values()].flat()
  })

/** Start-up sweep: pays every debt that a crash left. */
export const settleOwedRotations = async (ctx: Context): Promise<void> => {
  for (const { id } of await findAll(ctx.store, 'setting', { prefix: owedRotation })) await settle(ctx, id.slice(owedRotation.length))
}
