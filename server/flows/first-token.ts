import type { Caller } from '../access/caller.ts'
import type { Base } from './context.ts'
import { sha256hex } from './message.ts'
import { perform } from './perform.ts'

const caller: Caller = { kind: 'system', id: 'setup', from: 'server' }
/** Their token is the one in the data folder; by the name of its file a new one takes its place. */
export const firstOperator = 'owner'
const id = firstOperator

/**
 * The first operator's token: made when there is none, or when the file that held it is gone (`known` undefined), which only who owns the data folder can bring
 * about. 43 characters base64url of 32 random bytes; only its hash is stored. `keep` must be durable when it resolves: it is called before the store knows it.
 */
export const firstToken = async (ctx: Base, known: string | undefined, keep: (token: string) => void): Promise<void> => {
  const row = await ctx.store.get('token', id)
  if (row !== undefined && known !== undefined && row.hash === hashOf(known)) return
  const token = known ?? Buffer.from(ctx.random(32)).toString('base64url')
  keep(token)
  // A crash here: the file holds a token that the store does not know; the next start takes it from there.
  ctx.step('setup.token-file')
  await perform(
    ctx,
    { caller, action: 'server.setup', subject: 'token owner', detail: row === undefined ? 'first token' : 'first token replaced' },
    async (tx) => {
      const old = await ctx.store.get('token', id)
      const fresh = { id, operator: id, roles: ['owner'] as const, hash: hashOf(token), createdAt: ctx.now(), expiresAt: null }
      if (old === undefined) tx.insert('token', fresh)
      else tx.update('token', { ...fresh, version: old.version })
    },
  )
  ctx.step('setup.token')
}

export const hashOf = (token: string): string => sha256hex(new TextEncoder().encode(token))
