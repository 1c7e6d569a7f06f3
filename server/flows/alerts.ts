import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { Caller } from '../access/caller.ts'
import { alertsDue, type Alert, type DayOfEnds, type Deadline } from '../ca/alerts.ts'
import { profileNames } from '../ca/profiles.ts'
import { dayText } from './calendar.ts'
import type { Context } from './context.ts'
import { endsByDay } from './inventory.ts'
import { perform } from './perform.ts'
import { findAll } from './rows.ts'

/** An alert as it is kept. `dropped`: more waited than the queue holds; it was raised all the same. */
export interface RaisedAlert extends Alert {
  readonly raisedAt: number
  readonly state: 'waiting' | 'delivered' | 'dropped'
  readonly deliveredAt: number | null
}

const day = 86_400_000
const system: Caller = { kind: 'system', id: 'alerts', from: 'server' }
const prefix = 'alert/'
/** Alerts that wait for their receiver, and alerts of one round, at most. */
const most = { waiting: 1000, round: 200 } as const
/** How long they are kept after what they were about. */
const kept = 90 * day

/** Every alert that was raised and is remembered, oldest first. */
export const raisedAlerts = async (ctx: Pick<Context, 'store'>): Promise<readonly RaisedAlert[]> =>
  (await findAll(ctx.store, 'setting', { prefix }))
    .map(({ value }) => decode(value) as RaisedAlert)
    .toSorted((one, other) => one.raisedAt - other.raisedAt || (one.id < other.id ? -1 : 1))

/** What the fleet's certificates come to in the time of the longest mark: one line for each kind and day, however many there are. */
const daysOfEnds = async (ctx: Context, marks: readonly number[]): Promise<readonly DayOfEnds[]> => {
  const now = ctx.now()
  const counts = await endsByDay(ctx, { from: dayText(now), to: dayText(now + Math.max(...marks) + day) })
  return counts.flatMap(({ day: date, profile, issuer, rows }) => {
    const name = profileNames.find((one) => one === profile)
    if (name !== 'device-identity' && name !== 'device-tls' && name !== 'station') return []
    return [{ at: Date.parse(`${date}T00:00:00Z`), profile: name, issuer, certificates: rows, life: ctx.authority.profiles[name].life }]
  })
}

/** Raises what is due and was not raised before, forgets what is long over. The new ones, durable. */
export const raiseAlerts = async (
  ctx: Context,
  of: { readonly deadlines: readonly Deadline[]; readonly marks: readonly number[] },
): Promise<readonly RaisedAlert[]> => {
  const now = ctx.now()
  const due = alertsDue({ tenant: ctx.tenant, deadlines: of.deadlines, days: await daysOfEnds(ctx, of.marks), marks: of.marks, now })
  const before = await raisedAlerts(ctx)
  const known = new Set(before.map(({ id }) => id))
  const over = before.filter(({ at, raisedAt, state }) => state !== 'waiting' && Math.max(at, raisedAt) + kept < now)
  const fresh = due.filter(({ id }) => !known.has(id)).slice(0, most.round)
  if (fresh.length + over.length === 0) return []
  const room = most.waiting - before.filter(({ state }) => state === 'waiting').length
  const raised = fresh.map((alert, at): RaisedAlert => ({ ...alert, raisedAt: now, state: at < room ? 'waiting' : 'dropped', deliveredAt: null }))
  const subject = raised.length === 1 ? (raised[0]?.subject ?? '') : `${raised.length} alerts`
  const detail = raised.map((one) => `${one.type} ${one.subject}`).join(', ')
  await perform(ctx, { caller: system, action: 'alert.raise', subject, detail: detail.slice(0, 1000) }, async (tx) => {
    for (const alert of raised) tx.insert('setting', { id: `${prefix}${alert.id}`, value: encode(alert) })
    for (const { id } of over) {
      const row = await ctx.store.get('setting', `${prefix}${id}`)
      if (row !== undefined) tx.remove('setting', row)
    }
  })
  // A crash here: raised and not sent; the next start finds it waiting and sends it.
  ctx.step('alert.raised')
  return raised
}

/** The receiver has taken it. A crash before this is durable: it is sent once more, under the same id, by which the receiver drops it. */
export const alertDelivered = async (ctx: Context, alert: RaisedAlert): Promise<void> => {
  await perform(ctx, { caller: system, action: 'alert.deliver', subject: alert.subject, detail: `${alert.type} ${alert.id}` }, async (tx) => {
    const row = await ctx.store.get('setting', `${prefix}${alert.id}`)
    if (row !== undefined) tx.update('setting', { ...row, value: encode({ ...alert, state: 'delivered', deliveredAt: ctx.now() }) })
  })
  ctx.step('alert.delivered')
}
