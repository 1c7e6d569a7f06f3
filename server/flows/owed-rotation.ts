import { KeyId } from '@fleetkey/protocol/ids.ts'
import type { Caller } from '../access/caller.ts'
import type { Context, Setting } from './context.ts'
import { perform, type Transaction } from './perform.ts'
import { rotateKeys } from './rotate.ts'
import { findAll } from './rows.ts'

/**
 * A rotation that a revocation or a departure owes: written in the same commit as its cause, removed when the campaigns exist.
 * A crash in between leaves the marker, and the start-up sweep pays the debt.
 */
interface Owed {
  readonly keys: readonly string[]
  readonly because: string
  /** Client whose live session must end first. */
  readonly kick: string | null
}

const prefix = 'owed-rotation/'
const system: Caller = { kind: 'system', id: 'rotation', from: 'server' }

const read = (setting: Setting): Owed => JSON.parse(new TextDecoder().decode(setting.value)) as Owed

/** Adds the marker to a commit. `name` is unique per cause, such as `revoke/<device>`. */
export const owe = (tx: Transaction, name: string, owed: Owed): void =>
  tx.insert('setting', { id: `${prefix}${name}`, value: new TextEncoder().encode(JSON.stringify(owed)) })

/** Ends the session, starts the campaigns, removes the marker. Harmless to repeat. The ids of the campaigns. */
export const settle = async (ctx: Context, name: string): Promise<readonly string[]> => {
  const setting = await ctx.store.get('setting', `${prefix}${name}`)
  if (setting === undefined) return []
  const { keys, because, kick } = read(setting)
  if (kick !== null) await ctx.bus.kick(kick, because)
  // A crash here: the session is gone with the process; the sweep rotates.
  ctx.step('rotation.kicked')
  const campaigns = await rotateKeys(
    ctx,
    keys.map((key) => KeyId.parse(key)),
    because,
  )
  // A crash here: the keys rotate once more after the restart, which costs an epoch and harms nobody.
  ctx.step('rotation.started')
  await perform(ctx, { caller: system, action: 'rotation.settle', subject: name, detail: `${because}: ${keys.join(', ') || 'no keys'}` }, async (tx) => {
    const now = await ctx.store.get('setting', setting.id)
    if (now !== undefined) tx.remove('setting', now)
  })
  ctx.step('rotation.settled')
  return campaigns
}

/** Start-up sweep: pays every debt that a crash left. */
export const settleOwedRotations = async (ctx: Context): Promise<void> => {
  for (const { id } of await findAll(ctx.store, 'setting', { prefix })) await settle(ctx, id.slice(prefix.length))
}
