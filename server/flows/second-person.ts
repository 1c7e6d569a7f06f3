import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { approvalState, type Approval } from '../access/approval.ts'
import type { Caller } from '../access/caller.ts'
import type { Context, Setting } from './context.ts'
import { hex } from './message.ts'
import { perform, type Transaction } from './perform.ts'
import { findAll } from './rows.ts'

const prefix = 'approval/'
/** What an approval is for when it is a campaign's: this and the campaign's id. */
export const campaignPrefix = 'campaign/'
/** Milliseconds from asking until nobody can use it any more. */
const life = 24 * 3_600_000

const read = ({ value }: Setting): Approval => decode(value) as Approval

/** Every approval that was asked for, oldest first. */
export const approvals = async (ctx: Context): Promise<readonly Approval[]> =>
  (await findAll(ctx.store, 'setting', { prefix })).map(read).toSorted((one, other) => one.askedAt - other.askedAt)

const stored = async (ctx: Context, id: string): Promise<{ readonly setting: Setting; readonly approval: Approval } | undefined> => {
  const setting = await ctx.store.get('setting', `${prefix}${id}`)
  return setting === undefined ? undefined : { setting, approval: read(setting) }
}

const asked = (ctx: Context, caller: Caller, of: Pick<Approval, 'what' | 'detail' | 'reason'>): Approval => {
  const at = ctx.now()
  return { id: hex(ctx.random(8)), ...of, askedBy: caller.id, askedAt: at, expires: at + life, grantedBy: null, grantedAt: null, spentAt: null }
}

/** Adds to a commit: a second person is asked about what it writes. Its id. */
export const askIn = (ctx: Context, tx: Transaction, caller: Caller, of: Pick<Approval, 'what' | 'detail' | 'reason'>): string => {
  const approval = asked(ctx, caller, of)
  tx.insert('setting', { id: `${prefix}${approval.id}`, value: encode(approval) })
  return approval.id
}

/** Whether a second person has said yes, in time. */
export const isGranted = async (ctx: Context, id: string): Promise<boolean> => {
  const found = await stored(ctx, id)
  return found !== undefined && approvalState(found.approval, ctx.now()) === 'granted'
}

/** Adds to a commit: this approval is used up. */
export const spend = async (ctx: Context, tx: Transaction, id: string): Promise<void> => {
  const found = await stored(ctx, id)
  if (found === undefined || approvalState(found.approval, ctx.now()) !== 'granted') throw new Problem('conflict', `approval ${id} is not granted`)
  tx.update('setting', { ...found.setting, value: encode({ ...found.approval, spentAt: ctx.now() }) })
  tx.note(`approved by ${String(found.approval.grantedBy)} (${id})`)
}

/** Asks for a second person, once: what this caller has asked for and can still use is given back. */
export const askApproval = async (ctx: Context, caller: Caller, of: Pick<Approval, 'what' | 'detail' | 'reason'>): Promise<Approval> => {
  const open = (await approvals(ctx)).find(
    (one) => one.what === of.what && one.askedBy === caller.id && ['waiting', 'granted'].includes(approvalState(one, ctx.now())),
  )
  if (open !== undefined) return open
  const approval = asked(ctx, caller, of)
  await perform(ctx, { caller, action: 'approval.ask', subject: approval.id, detail: `${of.what}: ${of.detail}; because ${of.reason}` }, (tx) =>
    tx.insert('setting', { id: `${prefix}${approval.id}`, value: encode(approval) }),
  )
  ctx.step('approval.asked')
  return approval
}

/** The second person says yes. Throws Problem: `not-found`, `forbidden` for one's own request, `conflict` when it is spent, `expired`. Granting twice is harmless. */
export const grantApproval = async (ctx: Context, caller: Caller, id: string): Promise<Approval> => {
  const granted = await perform(ctx, { caller, action: 'approval.grant', subject: id }, async (tx) => {
    const found = await stored(ctx, id)
    if (found === undefined) throw new Problem('not-found', `no approval ${id}`)
    const { setting, approval } = found
    if (approval.askedBy === caller.id) throw new Problem('forbidden', `${caller.id} asked for it: another person has to grant it`, { reason: 'approval.own' })
    const state = approvalState(approval, ctx.now())
    if (state === 'spent') throw new Problem('conflict', `approval ${id} was used`, { reason: 'approval.spent' })
    if (state === 'expired') throw new Problem('expired', `approval ${id} ran out`, { reason: 'approval.expired' })
    if (state === 'granted') return approval
    const next: Approval = { ...approval, grantedBy: caller.id, grantedAt: ctx.now() }
    tx.update('setting', { ...setting, value: encode(next) })
    tx.note(`${approval.what}, asked for by ${approval.askedBy}`)
    return next
  })
  // A crash here: what was asked for is approved; whoever asked carries it out, a campaign that waits for it starts with the server.
  ctx.step('approval.granted')
  if (granted.what.startsWith(campaignPrefix)) ctx.wake(granted.what.slice(campaignPrefix.length))
  return granted
}

/** Uses up, in the commit of the act itself, what another person has granted this caller for exactly that. False when nobody has. */
export const spendApproval = async (ctx: Context, tx: Transaction, caller: Caller, what: string): Promise<boolean> => {
  for (const setting of await findAll(ctx.store, 'setting', { prefix })) {
    const one = read(setting)
    if (one.what !== what || one.askedBy !== caller.id || one.grantedBy === caller.id || approvalState(one, ctx.now()) !== 'granted') continue
    tx.update('setting', { ...setting, value: encode({ ...one, spentAt: ctx.now() }) })
    tx.note(`forced because ${one.reason}; approved by ${String(one.grantedBy)} (${one.id})`)
    return true
  }
  return false
}

/** Adds to a commit: what this operator has asked for is over, and what they have granted waits for another person again, unless it was used. */
export const voidApprovals = async (ctx: Context, tx: Transaction, operator: string): Promise<void> => {
  for (const setting of await findAll(ctx.store, 'setting', { prefix })) {
    const one = read(setting)
    if (one.spentAt !== null || (one.askedBy !== operator && one.grantedBy !== operator)) continue
    // A campaign looks for its approval by name: expired, it tells so.
    const next = one.askedBy === operator ? { ...one, expires: Math.min(one.expires, ctx.now()) } : { ...one, grantedBy: null, grantedAt: null }
    tx.update('setting', { ...setting, value: encode(next) })
    tx.note(`${one.what} (${one.id}) ${one.askedBy === operator ? 'is no longer asked for' : 'waits for another person again'}`)
  }
}
