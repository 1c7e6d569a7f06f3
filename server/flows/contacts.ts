import { hasIdentity } from '../fleet/device.ts'
import type { Caller } from '../access/caller.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'

/** A device's record takes its time of last contact at most this often, milliseconds. */
export const contactEvery = 600_000

/** Devices in one commit: a transaction of this size holds the event loop for some milliseconds. */
const atOnce = 50
const system: Caller = { kind: 'system', id: 'contacts', from: 'server' }

/**
 * Puts the last contacts into the records, many devices to a commit and one audit entry for them: a fleet that reports every few minutes, and does nothing else,
 * costs next to nothing. A crash before it forgets when those devices were heard last, and nothing else.
 */
export const storeContacts = async (ctx: Context): Promise<void> => {
  for (let some = ctx.sessions.heard(atOnce); some.length > 0; some = ctx.sessions.heard(atOnce)) {
    const contacts = some
    await perform(ctx, { caller: system, action: 'device.report', subject: 'fleet', detail: `last contact of ${contacts.length} devices` }, async (tx) => {
      for (const [id, { at, agent }] of contacts) {
        const device = await ctx.store.get('device', id)
        if (hasIdentity(device) && device.lastSeenAt < at) tx.update('device', { ...device, lastSeenAt: at, agent })
      }
    })
    ctx.step('contacts.stored')
  }
}
