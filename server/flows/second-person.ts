import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { approvalState, type Approval } from '../access/approval.ts'
import type { Caller } from '../access/caller.ts'
import type { Context, Setting } from './context.ts'
import { hex } from './message.ts'
import { perform, type Transaction } from './perform.ts'
import { findAll } from './rows.ts'

const prefix = 'approval/'
/** Milliseconds from asking until nobody can use it any more. */
const life = 24 * 3_600_000

const read = ({ value }: Setting): Approval => decode(value) as Approval

/** Every approval that was asked for, oldest first. */
export const approvals = async (ctx: Context): Promise<readonly Approval[]> =>
  (await findAll(ctx.store, 'setting', { prefix })).map(read).toSorted((one, other) => one.askedAt - other.askedAt)

/** Asks for a second person, once: what this caller has asked for and can still use is given back. */
export const askApproval = async (ctx: Context, caller: Caller, of: Pick<Approval, 'what' | 'detail' | 'reason'>): Promise<Approval> => {
  const open = (await approvals(ctx)).find(
    (one) => one.what === of.what && one.askedBy === caller.id && ['waiting', 'granted'].includes(approvalState(one, ctx.now())),
  )
  if (open !== undefined) return open
  const id = hex(ctx.random(8))
  const asked: Approval = {
    id,
    ...of,
    askedBy: caller.id,
    askedAt: ctx.now(),
    expires: ctx.now() + life,
    grantedBy: null,
    grantedAt: null,
    spentAt: null,
  }
  await perform(ctx, { caller, action: 'approval.ask', subject: id, detail: `${of.what}: ${of.detail}; because ${of.reason}` }, (tx) =>
    tx.insert('setting', { id: `${prefix}${id}`, value: encode(asked) }),
  )
  ctx.step('approval.asked')
  return asked
}

/** The second person says yes. Throws Problem: `not-found`, `forbidden` for one's own request, `conflict` when it is spent, `expired`. Granting twice is harmless. */
export const grantApproval = async (ctx: Context, caller: Caller, id: string): Promise<Approval> => {
  const granted = await perform(ctx, { caller, action: 'approval.grant', subject: id }, async (tx) => {
    const setting = await ctx.store.get('setting', `${prefix}${id}`)
    if (setting === undefined) throw new Problem('not-found', `no approval ${id}`)
    const asked = read(setting)
    if (asked.askedBy === caller.id) throw new Problem('forbidden', `${caller.id} asked for it: another person has to grant it`, { reason: 'approval.own' })
    const state = approvalState(asked, ctx.now())
    if (state === 'spent') throw new Problem('conflict', `approval ${id} was used`, { reason: 'approval.spent' })
    if (state === 'expired') throw new Problem('expired', `approval ${id} ran out`, { reason: 'approval.expired' })
    if (state === 'granted') return asked
    const next: Approval = { ...asked, grantedBy: caller.id, grantedAt: ctx.now() }
    tx.update('setting', { ...setting, value: encode(next) })
    tx.note(`${asked.what}, asked for by ${asked.askedBy}`)
    return next
  })
  ctx.step('approval.granted')
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
