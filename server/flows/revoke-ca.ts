import type { KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { reasonIn, type RevocationReason } from '@fleetkey/protocol/x509/reasons.ts'
import type { Caller } from '../access/caller.ts'
import { activeOf, nextOf, published, withRevoked, type Generation, type Revocation } from '../ca/rollover.ts'
import { certifyRoles, issuingKey, issuingSerial, rolloverOf } from './authority.ts'
import type { Context } from './context.ts'
import { settle } from './owed-rotation.ts'
import { callerName, refuse } from './perform.ts'
import { maxReason } from './revoke.ts'
import { done, finishRetiring, inOrder, move, owedBy, ruled, spend, subjectOf, type RolloverOutcome } from './rollover.ts'
import { askApproval } from './second-person.ts'
import { authorityName } from './status-lists.ts'
import { caBlastRadius } from './under-ca.ts'

export type CaRevocation = RolloverOutcome & {
  /** Keys that were rotated away, and the campaigns that do. */
  readonly keys: readonly KeyId[]
  readonly campaigns: readonly string[]
}

/** An issuing CA by whichever of its names: the number of its generation, that of its lists (`issuing-2`), or the serial of its certificate (hex). Throws Problem. */
export const caNamed = async (ctx: Context, name: string): Promise<Generation> => {
  const wanted = name.toLowerCase()
  if (/^root(-\d+)*$/.test(wanted))
    throw new Problem('unsupported', 'nobody can revoke a root: `ca prepare --root` makes the next one, and the CAs under this one are revoked')
  for (const generation of (await rolloverOf(ctx)).generations) {
    const { number, state } = generation
    const serial = state === 'preparing' ? undefined : await issuingSerial(ctx, number)
    if ([String(number), authorityName(issuingKey(number)), serial].includes(wanted)) return generation
  }
  throw new Problem('not-found', `no CA ${name.slice(0, 64)}`)
}

const code = (why: string, given: RevocationReason | undefined): RevocationReason => {
  const said = given ?? reasonIn(why)
  // What a thief has of a CA is the CA (RFC 5280 §5.3.1).
  return said === 'keyCompromise' ? 'cACompromise' : said
}

/**
 * Revokes an issuing CA for good, with a second person's approval. In one commit (which may use the store's reserve) nothing of it is accepted any more and, when
 * it was the one that signs, the next one signs; then every connection over its certificates is cut, its own certificate stands on its root's list and in OCSP,
 * what waits for devices under it is dropped, its key is destroyed, and keys are rotated as the policies of their groups say. The devices prove themselves anew
 * and come back. Repeated after a crash it goes on; repeated once more it changes nothing.
 *
 * Throws Problem('conflict') for the CA that signs unless the next one is distributed and `force` is set. The outcome bears the approval that is waited for.
 */
export const revokeCa = async (
  ctx: Context,
  caller: Caller,
  name: string,
  of: { readonly why: string; readonly code?: RevocationReason | undefined; readonly force: boolean },
): Promise<CaRevocation> => {
  const outcome = await inOrder(ctx, async (): Promise<RolloverOutcome & { readonly keys: readonly KeyId[] }> => {
    const { number } = await caNamed(ctx, name)
    const { do: act, generation, rollover } = await ruled(ctx, caller, 'revoke', number)
    if (generation === null) throw new Problem('internal', 'nothing to revoke')
    if (act === 'already') return { ...done(generation, true), keys: [] }
    if (generation.revoked === undefined) {
      const next = activeOf(rollover).number === number ? nextOf(rollover) : undefined
      if (next !== undefined && !of.force) {
        const problem = new Problem('conflict', `generation ${number} signs everything; \`--force\` has generation ${next.number} take its place at once`, {
          reason: 'rollover.active',
        })
        await refuse(ctx, { caller, action: 'ca.revoke', subject: subjectOf(number) }, problem)
        throw problem
      }
      const asked = await askApproval(ctx, caller, { what: `ca.revoke ${subjectOf(number)}`, detail: await inWords(ctx, generation, next), reason: of.why })
      if (asked.grantedAt === null) return { ...done(generation), approval: asked.id, keys: [] }
      // Message keys are certified before, so that one commit ends the one and begins the other. A crash here: certificates that nobody was shown.
      if (next !== undefined) await certifyRoles(ctx, ctx.authority.profiles, next.number)
      const revoked: Revocation = { at: ctx.now(), by: callerName(caller), reason: of.why.slice(0, maxReason), code: code(of.why, of.code) }
      await move(ctx, { caller, action: 'ca.revoke', number, step: 'rollover.revoking', detail: `${revoked.code}: ${revoked.reason}` }, async (now, tx) => {
        await spend(ctx, tx, caller, { action: 'ca.revoke', number })
        return published(withRevoked(now, number, revoked), revoked.at)
      })
      // A crash here: nothing of it is accepted, no connection has survived; the next start does the rest.
    }
    return { ...done(generation), keys: await finishRetiring(ctx, caller, number) }
  })
  return { ...outcome, campaigns: await settle(ctx, owedBy(outcome.generation)) }
}

/** What the second person decides on. */
const inWords = async (ctx: Context, generation: Generation, next: Generation | undefined): Promise<string> => {
  const { devices, connected, rotated, first } = await caBlastRadius(ctx, generation, { limit: 1 })
  const then = next === undefined ? '' : `; generation ${next.number} signs from then on`
  return `${devices} devices have to prove themselves anew (${connected} connected): ${first.join(', ') || 'none'}; keys rotated: ${rotated.join(', ') || 'none'}${then}`
}
