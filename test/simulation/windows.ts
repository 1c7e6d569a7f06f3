import assert from 'node:assert/strict'
import { windowAt } from '@fleetkey/server/campaigns/window.ts'
import type { Store } from '@fleetkey/server/flows/context.ts'
import { rows } from '../invariants/evidence.ts'

/** Of campaigns with a maintenance window no wave opens, no epoch is sent to be installed and none is activated while it is closed, by the audit log. */
export const nothingOutsideItsWindow = async (store: Store): Promise<void> => {
  const windowed = (await rows(store, 'campaign')).flatMap(({ id, key, from, to, createdAt, policy }) =>
    policy.window === null ? [] : [{ id, key, isNew: from !== to, to, since: createdAt, window: policy.window }],
  )
  if (windowed.length === 0) return
  const { size } = await store.checkpoint()
  for (const { at, action, subject, detail } of await store.audit({ after: 0, limit: size })) {
    // Without a new epoch, what is sent may be another rotation's.
    const campaign = windowed.find(({ id, key, isNew, to, since }) =>
      action === 'campaign.step'
        ? subject === id && / opens$|^epoch \d+ active/.test(detail)
        : isNew &&
          at >= since &&
          ((action === 'key.deliver' && detail.includes(`deliver ${key}/${to} as install`)) || (action === 'key.broadcast' && subject === `${key}/${to}`)),
    )
    if (campaign !== undefined)
      assert.ok(windowAt(campaign.window, at).open, `outside the window of ${campaign.id}: ${subject} ${detail} at ${new Date(at).toISOString()}`)
  }
}
