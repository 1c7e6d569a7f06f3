import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller, Role } from '../access/caller.ts'
import type { Base, Context } from './context.ts'
import { firstOperator, hashOf } from './first-token.ts'
import { perform } from './perform.ts'
import { voidApprovals } from './second-person.ts'

/** Another operator. The token (43 characters base64url of 32 random bytes) is in the answer and nowhere else. Throws Problem('conflict') when there is one of this name. */
export const addOperator = async (ctx: Base, caller: Caller, of: { readonly id: string; readonly roles: readonly Role[] }): Promise<string> => {
  const token = Buffer.from(ctx.random(32)).toString('base64url')
  await perform(ctx, { caller, action: 'operator.add', subject: of.id, detail: of.roles.join(', ') }, async (tx) => {
    if ((await ctx.store.get('token', of.id)) !== undefined) throw new Problem('conflict', `there is an operator ${of.id}`)
    tx.insert('token', { id: of.id, operator: of.id, roles: of.roles, hash: hashOf(token), createdAt: ctx.now(), expiresAt: null })
  })
  // A crash here: an operator whose token nobody knows.
  ctx.step('operator.added')
  return token
}

/**
 * Takes an operator's token back: whoever has it is refused from the next request on. What they have asked for or granted and nobody has used yet is void in the
 * same commit, so that the next one of that name inherits nothing. The first operator's token is replaced by who has the data folder (firstToken), never taken.
 * Throws Problem: `not-found`, `conflict`.
 */
export const removeOperator = async (ctx: Context, caller: Caller, id: string): Promise<void> => {
  await perform(ctx, { caller, action: 'operator.remove', subject: id }, async (tx) => {
    const row = await ctx.store.get('token', id)
    if (row === undefined) throw new Problem('not-found', `no operator ${id}`)
    if (id === firstOperator)
      throw new Problem('conflict', 'the first operator has the token in cli.json: remove that file and start the server again, and a new one takes its place')
    tx.remove('token', row)
    await voidApprovals(ctx, tx, id)
  })
  // A crash here: it is gone.
  ctx.step('operator.removed')
}
