import type { KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import {
  activeOf,
  isRootNeeded,
  nextOf,
  published,
  ruling,
  withNext,
  withState,
  type Command,
  type Generation,
  type Revocation,
  type Rollover,
} from '../ca/rollover.ts'
import type { Action } from '../access/authorise.ts'
import { certifyRoles, issuingKey, issuingSerial, makeGeneration, rolloverOf, rootKey, setRollover } from './authority.ts'
import type { Context } from './context.ts'
import { owe } from './owed-rotation.ts'
import { perform, refuse, type Transaction } from './perform.ts'
import { askApproval, spendApproval } from './second-person.ts'
import { announceTrust, devicesUnder, readiness } from './trust.ts'
import { inTurn } from './turn.ts'
import { cutSessionsUnder, emptyUnder } from './under-ca.ts'

/** What a command has come to. `already`: nothing was left to do. `approval`: it waits for a second person, and nothing was done. */
export interface RolloverOutcome {
  readonly generation: number
  readonly already: boolean
  readonly approval: string | null
}

/** An operator's word that it is to be done although devices are lost by it, and why. */
export interface Force {
  readonly reason: string
}

const system: Caller = { kind: 'system', id: 'rollover', from: 'server' }

/** One command at a time; whichever order they come in, each is ruled on what is durable. */
export const inOrder = async <R>(ctx: Context, work: () => Promise<R>): Promise<R> => await inTurn(ctx.store, 'ca/rollover', work)

/** The generation that a command is about, or `already`. Throws Problem('conflict') with the reason, audited, when it is out of order. */
export const ruled = async (ctx: Context, caller: Caller, command: Command, number?: number) => {
  const rollover = await rolloverOf(ctx)
  const found = ruling(rollover, command, number)
  if (!('refused' in found)) return { rollover, ...found }
  const problem = new Problem('conflict', found.refused, { reason: 'rollover.order' })
  await refuse(ctx, { caller, action: `ca.${command}`, subject: number === undefined ? 'ca' : `generation ${number}` }, problem)
  throw problem
}

export const subjectOf = (number: number): string => `generation ${number}`

/** One durable step of a rollover: `change` is run on what is stored then, and again when somebody was faster. */
export const move = async (
  ctx: Context,
  of: { readonly caller: Caller; readonly action: Action; readonly number: number; readonly step: string; readonly detail?: string },
  change: (rollover: Rollover, tx: Transaction) => Rollover | Promise<Rollover>,
): Promise<void> => {
  const { caller, action, number, detail } = of
  await perform(ctx, { caller, action, subject: subjectOf(number), ...(detail === undefined ? {} : { detail }) }, async (tx) => {
    const next = await change(await rolloverOf(ctx), tx)
    await setRollover(ctx, tx, next)
    tx.note(`trust bundle ${next.version}`)
  })
  ctx.step(of.step)
}

export const done = (generation: Generation | null, already = false): RolloverOutcome => ({ generation: generation?.number ?? 1, already, approval: null })

/**
 * Makes the next CA: keys in the KMS, its certificate under the present root, or under a new root (`root`) which it and the present one certify. Nothing is signed
 * for others by it, nobody is told. Repeated after a crash it goes on. Throws Problem('conflict') while another one is under way.
 */
export const prepareCa = async (ctx: Context, caller: Caller, { root }: { readonly root: boolean }): Promise<RolloverOutcome> =>
  await inOrder(ctx, async () => {
    const { do: act, generation } = await ruled(ctx, caller, 'prepare')
    if (act === 'already') return done(generation, true)
    if (generation === null) {
      const detail = root ? 'with a new root' : 'under the present root'
      const number = Math.max(...ctx.authority.rollover.generations.map((one) => one.number)) + 1
      await move(ctx, { caller, action: 'ca.prepare', number, step: 'rollover.intended', detail }, (now) =>
        nextOf(now) === undefined ? withNext(now, root, ctx.now()) : now,
      )
    }
    // A crash here, and anywhere in what follows: it stands as preparing, and the next start, or the same command, goes on.
    return done(await finishPreparing(ctx, caller))
  })

const finishPreparing = async (ctx: Context, caller: Caller): Promise<Generation> => {
  const rollover = await rolloverOf(ctx)
  const next = nextOf(rollover)
  if (next === undefined) throw new Problem('conflict', 'nothing is being prepared')
  await makeGeneration(ctx, ctx.authority.profiles, { ...next, before: activeOf(rollover).root })
  await move(ctx, { caller, action: caller.kind === 'system' ? 'ca.settle' : 'ca.prepare', number: next.number, step: 'rollover.prepared' }, (now) =>
    withState(now, next.number, 'prepared', ctx.now()),
  )
  await ctx.authority.reload()
  return next
}

/** Tells every device of the next CA, by the next version of the trust bundle: connected ones now, the others when they come. Each acknowledges it in its reports. */
export const distributeCa = async (ctx: Context, caller: Caller): Promise<RolloverOutcome> =>
  await inOrder(ctx, async () => {
    const { do: act, generation } = await ruled(ctx, caller, 'distribute')
    if (generation === null) throw new Problem('internal', 'nothing to distribute')
    if (act === 'distribute')
      await move(ctx, { caller, action: 'ca.distribute', number: generation.number, step: 'rollover.distributed' }, (now) =>
        published(withState(now, generation.number, 'distributed', ctx.now()), ctx.now()),
      )
    // A crash here: every device hears it after its next report.
    await ctx.authority.reload()
    await announceTrust(ctx)
    return done(generation, act === 'already')
  })

/** Whether an act that strands devices may go on: in its own commit it uses up what a second person has granted. Undefined: it may; otherwise the request that waits. */
const forced = async (
  ctx: Context,
  caller: Caller,
  of: { readonly action: Action; readonly number: number; readonly trouble: string; readonly force: Force | null },
): Promise<string | undefined> => {
  const { action, number, trouble, force } = of
  if (force === null) {
    const problem = new Problem('conflict', `${trouble}; \`--force\` asks a second person`, { reason: 'rollover.stranded' })
    await refuse(ctx, { caller, action, subject: subjectOf(number) }, problem)
    throw problem
  }
  const what = `${action} ${subjectOf(number)}`
  const asked = await askApproval(ctx, caller, { what, detail: trouble, reason: force.reason })
  return asked.grantedAt === null ? asked.id : undefined
}

export const spend = async (ctx: Context, tx: Transaction, caller: Caller, of: { readonly action: Action; readonly number: number }): Promise<void> => {
  if (!(await spendApproval(ctx, tx, caller, `${of.action} ${subjectOf(of.number)}`)))
    throw new Problem('forbidden', 'nobody else has approved it', { reason: 'approval.missing' })
}

/** The version of the bundle that first told of this generation. */
const toldAt = ({ version, history }: Rollover, { since }: Generation): number => history.find(({ at }) => at >= since)?.version ?? version

/**
 * The next CA takes its place: the server's message keys are certified by it, then it signs whatever is issued, then the server's own TLS certificate is renewed,
 * with the chain to older roots beside it; message keys stay, so that a device that knows the older certificates understands every message. Refused while a
 * connected device has not acknowledged it or one that is away would find no way back, unless a second person has approved that.
 */
export const activateCa = async (ctx: Context, caller: Caller, force: Force | null): Promise<RolloverOutcome> =>
  await inOrder(ctx, async () => {
    const { do: act, generation, rollover } = await ruled(ctx, caller, 'activate')
    if (generation === null || act === 'already') return done(generation, true)
    const { number } = generation
    if (generation.state === 'distributed') {
      const { waiting, stranded, first } = await readiness(ctx, toldAt(rollover, generation), generation)
      const trouble = waiting + stranded > 0
      if (trouble) {
        const names = first.map(({ device, because }) => `${device} (${because})`).join(', ')
        const words = `${waiting} connected devices have not acknowledged it, ${stranded} would be stranded: ${names}`
        const approval = await forced(ctx, caller, { action: 'ca.activate', number, trouble: words, force })
        if (approval !== undefined) return { ...done(generation), approval }
      }
      await move(ctx, { caller, action: 'ca.activate', number, step: 'rollover.activating' }, async (now, tx) => {
        if (trouble) await spend(ctx, tx, caller, { action: 'ca.activate', number })
        return withState(now, number, 'activating', ctx.now())
      })
    }
    // A crash here, and until it is active: the one before still signs everything; the next start goes on.
    await finishActivating(ctx, caller, number)
    return done(generation)
  })

const finishActivating = async (ctx: Context, caller: Caller, number: number): Promise<void> => {
  await certifyRoles(ctx, ctx.authority.profiles, number)
  const action = caller.kind === 'system' ? 'ca.settle' : 'ca.activate'
  await move(ctx, { caller, action, number, step: 'rollover.activated' }, (now) => published(withState(now, number, 'active', ctx.now()), ctx.now()))
  // A crash here: the next start reads that it is active, and its TLS certificate comes from it.
  await ctx.authority.reload()
  await announceTrust(ctx)
}

/**
 * Nothing of that CA's making signs for the server any more; what it has issued to devices is accepted, and they are told to renew within `within` seconds, each
 * at a moment of its own. `number`: the oldest that is superseded when left out.
 */
export const taintCa = async (ctx: Context, caller: Caller, of: { readonly number?: number | undefined; readonly within: number }): Promise<RolloverOutcome> =>
  await inOrder(ctx, async () => {
    const { do: act, generation } = await ruled(ctx, caller, 'taint', of.number)
    if (generation === null) throw new Problem('internal', 'nothing to taint')
    if (act === 'taint')
      await move(ctx, { caller, action: 'ca.taint', number: generation.number, step: 'rollover.tainted', detail: `within ${of.within} s` }, (now) =>
        published({ ...withState(now, generation.number, 'tainted', ctx.now()), renewWithin: of.within }, ctx.now()),
      )
    await ctx.authority.reload()
    await announceTrust(ctx)
    return done(generation, act === 'already')
  })

/**
 * Nothing of that CA is accepted any more: its chains are refused, connections over them cut, its key is destroyed (and that of its root, when nothing else is
 * under it), and the next version of the trust bundle leaves it out. Refused while devices have certificates of it, unless a second person has approved that:
 * those have to prove themselves anew.
 */
export const retireCa = async (
  ctx: Context,
  caller: Caller,
  of: { readonly number?: number | undefined; readonly force: Force | null },
): Promise<RolloverOutcome> =>
  await inOrder(ctx, async () => {
    const { do: act, generation } = await ruled(ctx, caller, 'retire', of.number)
    if (generation === null) throw new Problem('internal', 'nothing to retire')
    if (act === 'already') return done(generation, true)
    const { number } = generation
    if (generation.state === 'tainted') {
      const under = await devicesUnder(ctx, issuingKey(number))
      if (under.length > 0) {
        const words = `${under.length} devices have certificates of it and would have to enrol again: ${under.slice(0, 20).join(', ')}`
        const approval = await forced(ctx, caller, { action: 'ca.retire', number, trouble: words, force: of.force })
        if (approval !== undefined) return { ...done(generation), approval }
      }
      await move(ctx, { caller, action: 'ca.retire', number, step: 'rollover.retiring' }, async (now, tx) => {
        if (under.length > 0) await spend(ctx, tx, caller, { action: 'ca.retire', number })
        return published(withState(now, number, 'retiring', ctx.now()), ctx.now())
      })
    }
    // A crash here: from now on its chains are refused; the next start destroys the key.
    await finishRetiring(ctx, caller, number)
    return done(generation)
  })

/** Carries out what is durable: nothing of it is accepted. Keys that are to be rotated, which a retired CA leaves none of. */
export const finishRetiring = async (ctx: Context, caller: Caller, number: number): Promise<readonly KeyId[]> => {
  await ctx.authority.reload()
  const rollover = await rolloverOf(ctx)
  const { root = 1, revoked } = rollover.generations.find((one) => one.number === number) ?? {}
  await cutSessionsUnder(ctx, issuingKey(number), `the CA of its certificate was ${revoked === undefined ? 'retired' : 'revoked'}`)
  const isRootOver = !isRootNeeded(rollover, root)
  const action = caller.kind === 'system' ? 'ca.settle' : revoked === undefined ? 'ca.retire' : 'ca.revoke'
  if (!isRootOver) await revokeIssuing(ctx, { caller, action, number, revoked })
  const keys = revoked === undefined ? [] : await emptyUnder(ctx, { key: issuingKey(number), since: revoked.at })
  for (const key of [issuingKey(number), ...(isRootOver ? [rootKey(root)] : [])]) {
    if ((await ctx.kms.describe(key)) !== undefined) await ctx.kms.destroy(key)
    // A crash here: the key is gone, and the next start goes on from there.
    ctx.step('rollover.destroyed')
  }
  await move(
    ctx,
    { caller, action, number, step: 'rollover.retired', detail: `key destroyed${isRootOver ? ', and that of its root' : ''}` },
    async (now, tx) => {
      // The marker of a start that was faster stands already.
      const isOwed = keys.length > 0 && now.generations.some((one) => one.number === number && one.state === 'retiring')
      if (isOwed) owe(tx, owedBy(number), { keys, because: `the CA of ${subjectOf(number)} was revoked`, kick: null })
      if (revoked !== undefined) tx.note(`keys: ${keys.join(', ') || 'none'}`)
      return withState(now, number, 'retired', ctx.now())
    },
  )
  await ctx.authority.reload()
  await announceTrust(ctx)
  return keys
}

/** The rotation that the revocation of this generation owes. */
export const owedBy = (number: number): string => `ca/${number}`

/** For others, who ask the root: its issuing CA works no more (RFC 5280 §5.3.1). */
const revokeIssuing = async (
  ctx: Context,
  of: { readonly caller: Caller; readonly action: Action; readonly number: number; readonly revoked: Revocation | undefined },
): Promise<void> => {
  const { caller, action, number, revoked } = of
  const { at, reason, code } = revoked ?? { at: ctx.now(), reason: 'the CA was retired', code: 'cessationOfOperation' as const }
  const serial = await issuingSerial(ctx, number)
  const ended = await perform(ctx, { caller, action, subject: subjectOf(number), detail: `certificate ${serial} revoked` }, async (tx) => {
    const row = await ctx.store.get('certificate', serial)
    if (row === undefined || row.status === 'revoked') return undefined
    const next = { ...row, status: 'revoked', revokedAt: at, reason, code } as const
    tx.update('certificate', next)
    return next
  })
  // A crash here: the next start lists it, as everything that is revoked.
  ctx.step('rollover.revoked')
  if (ended !== undefined) ctx.certificatesChanged([ended])
}

/** At start: finishes what a crash has left. */
export const settleRollover = async (ctx: Context): Promise<void> =>
  await inOrder(ctx, async () => {
    for (const { number, state } of (await rolloverOf(ctx)).generations) {
      if (state === 'preparing') await finishPreparing(ctx, system)
      if (state === 'activating') await finishActivating(ctx, system, number)
      if (state === 'retiring') await finishRetiring(ctx, system, number)
    }
  })
