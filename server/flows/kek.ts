import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import { authorise } from '../access/authorise.ts'
import type { Caller } from '../access/caller.ts'
import type { Base, Context, Table, Tables } from './context.ts'
import { perform, refuse, type Intent, type Transaction } from './perform.ts'
import { findAll } from './rows.ts'
import { inTurn } from './turn.ts'

/**
 * The KEK, and its way to a successor, also one in another back end (new keys are made where the server now has its keys): `next` is made; it wraps from now on
 * while what the `former` ones have wrapped is wrapped anew; `ending` ones are destroyed. What they have wrapped stays as it is beneath: data keys change no byte.
 */
export interface Keks {
  readonly current: string
  readonly next: string | null
  readonly former: readonly string[]
  readonly ending: readonly string[]
  /** When the last command began, milliseconds since 1970; left out before the first. */
  readonly since?: number
  /** When everything was wrapped anew under `current`; null while it is not, left out before there was another. */
  readonly wrappedAt?: number | null
}

/** What a command has come to. `already`: nothing was left to do. `rewrapped`: rows that it has wrapped anew. */
export interface KekOutcome {
  readonly kek: string
  readonly former: readonly string[]
  readonly rewrapped: number
  readonly already: boolean
}

const setting = 'kek'
const first: Keks = { current: 'kek', next: null, former: [], ending: [] }
const system: Caller = { kind: 'system', id: 'kek', from: 'server' }

/** As it is durable. */
export const keksOf = async (ctx: Base): Promise<Keks> => {
  const row = await ctx.store.get('setting', setting)
  return row === undefined ? first : (decode(row.value) as Keks)
}

/** Name of the KEK after this one: `kek`, `kek-2`, `kek-3`. */
const after = (kek: string): string => `kek-${Number(/-(\d+)$/.exec(kek)?.[1] ?? 1) + 1}`

const move = async (ctx: Base, intent: Intent, step: string, change: (keks: Keks) => Keks): Promise<void> => {
  await perform(ctx, intent, async (tx) => {
    const row = await ctx.store.get('setting', setting)
    const value = encode(change(row === undefined ? first : (decode(row.value) as Keks)))
    if (row === undefined) tx.insert('setting', { id: setting, value })
    else tx.update('setting', { ...row, value })
  })
  ctx.step(step)
}

/** A KEK that is there: the first is made when there never was another. */
export const ensureKek = async (ctx: Base): Promise<Keks> => {
  const keks = await keksOf(ctx)
  if ((await ctx.store.get('setting', setting)) === undefined) await ctx.kms.create(keks.current, 'kek')
  // Made anew it would open nothing.
  else if ((await ctx.kms.describe(keks.current)) === undefined)
    throw new Problem('internal', `KEK ${keks.current} is not in the KMS`, { reason: 'kms.no-key' })
  return keks
}

const isOther = (thrown: unknown): boolean => thrown instanceof Problem && thrown.reason === 'kms.unwrap'

/** Opens what this KEK, or one before it that is still there, has wrapped. Throws Problem('internal', reason `kms.unwrap`) when none has. */
export const unwrapUnder = async (ctx: Base, keks: readonly string[], of: { readonly wrapped: Uint8Array; readonly context: Uint8Array }): Promise<Secret> => {
  for (const [at, key] of keks.entries()) {
    try {
      const [secret] = await ctx.kms.unwrap([{ key, ...of }])
      if (secret !== undefined) return secret
    } catch (thrown) {
      if (!isOther(thrown) || at === keks.length - 1) throw thrown
    }
  }
  throw new Problem('internal', 'the KMS opened nothing', { reason: 'kms.unwrap' })
}

/** Rows that hold something under the KEK: where, and what is authenticated with it. */
export interface Wrapped<T extends Table> {
  readonly table: T
  readonly wrapOf: (row: Tables[T]) => Uint8Array | null
  readonly contextOf: (tenant: string, row: Tables[T]) => Uint8Array
  readonly withWrap: (row: Tables[T], wrapped: Uint8Array, kek: string) => Tables[T]
}

/** Wraps anew, under the current KEK, what a former one has wrapped in this table. How many rows. Harmless to repeat. */
export const rewrap = async <T extends Table>(ctx: Context, { current, former }: Keks, intent: Intent, of: Wrapped<T>): Promise<number> => {
  let count = 0
  for (const row of await findAll(ctx.store, of.table)) {
    const old = of.wrapOf(row)
    if (old === null) continue
    const context = of.contextOf(ctx.tenant, row)
    let secret: Secret
    try {
      secret = await unwrapUnder(ctx, former, { wrapped: old, context })
    } catch (thrown) {
      if (!isOther(thrown)) throw thrown
      // Wrapped by the current one already; what nobody can open makes the old ones no more useful.
      continue
    }
    const [wrapped] = await ctx.kms.wrap([{ key: current, plaintext: secret, context }])
    secret.destroy()
    if (wrapped === undefined) throw new Problem('internal', 'the KMS wrapped nothing')
    const done = await perform(ctx, { ...intent, detail: `${of.table} ${row.id}` }, async (tx: Transaction) => {
      const now = await ctx.store.get(of.table, row.id)
      if (now === undefined || Buffer.compare(of.wrapOf(now) ?? new Uint8Array(), old) !== 0) return false
      tx.update(of.table, of.withWrap(now, wrapped, current))
      return true
    })
    if (done) count++
    // A crash here: some rows are under the new KEK, the others under the old one, which is still there; the next start goes on.
    ctx.step('kek.rewrapped')
  }
  return count
}

/** Wraps everything anew; which tables there are the caller knows. */
export type RewrapAll = (ctx: Context, keks: Keks, intent: Intent) => Promise<number>

const outcome = ({ current, former }: Keks, rewrapped: number, already = false): KekOutcome => ({ kek: current, former, rewrapped, already })

const ruled = async (ctx: Context, intent: Intent, refused: string | undefined): Promise<void> => {
  // Before the KMS is asked for anything.
  authorise(intent.caller, intent.action)
  if (refused === undefined) return
  const problem = new Problem('conflict', refused, { reason: 'kek.order' })
  await refuse(ctx, intent, problem)
  throw problem
}

const finishRotating = async (ctx: Context, intent: Intent, rewrapAll: RewrapAll): Promise<number> => {
  const { next } = await keksOf(ctx)
  if (next !== null) {
    await ctx.kms.create(next, 'kek')
    // A crash here: a KEK that has wrapped nothing.
    ctx.step('kek.made')
    await move(ctx, intent, 'kek.switched', (keks) =>
      keks.next === next ? { ...keks, current: next, next: null, former: [...keks.former, keks.current], wrappedAt: null } : keks,
    )
    await ctx.authority.reload()
  }
  const keks = await keksOf(ctx)
  if (keks.former.length === 0) return 0
  const rewrapped = await rewrapAll(ctx, keks, intent)
  // A crash here: the next start finds nothing to wrap, and says so.
  if ((keks.wrappedAt ?? null) === null)
    await move(ctx, intent, 'kek.wrapped', (now) => (now.current === keks.current ? { ...now, wrappedAt: ctx.now() } : now))
  return rewrapped
}

const finishRetiring = async (ctx: Context, intent: Intent): Promise<void> => {
  for (const kek of (await keksOf(ctx)).ending) {
    if ((await ctx.kms.describe(kek)) !== undefined) await ctx.kms.destroy(kek)
    // A crash here: it is gone; the next start takes it off the list.
    ctx.step('kek.destroyed')
    await move(ctx, intent, 'kek.retired', (keks) => ({ ...keks, ending: keks.ending.filter((one) => one !== kek) }))
  }
  await ctx.authority.reload()
}

/** Makes another KEK, wraps with it from now on, and wraps anew what the one before has wrapped, which stays until it is retired. */
export const rotateKek = async (ctx: Context, caller: Caller, rewrapAll: RewrapAll): Promise<KekOutcome> =>
  await inTurn(ctx.store, 'kek', async () => {
    const keks = await keksOf(ctx)
    const next = after(keks.current)
    const intent = { caller, action: 'kek.rotate', subject: keks.next ?? next } as const
    await ruled(
      ctx,
      intent,
      keks.next === null && keks.former.length > 0 ? `${keks.former.join(', ')} is not retired: \`kms retire-kek\` comes first` : undefined,
    )
    await move(ctx, intent, 'kek.intended', (now) => (now.next === null && now.former.length === 0 ? { ...now, next, since: ctx.now() } : now))
    // A crash here, and until everything is wrapped anew: the next start goes on.
    const rewrapped = await finishRotating(ctx, intent, rewrapAll)
    return outcome(await keksOf(ctx), rewrapped)
  })

/** Destroys the KEK before, once nothing is left that it has wrapped: what only copies of the database have is then lost for good. */
export const retireKek = async (ctx: Context, caller: Caller, rewrapAll: RewrapAll): Promise<KekOutcome> =>
  await inTurn(ctx.store, 'kek', async () => {
    const keks = await keksOf(ctx)
    const intent = { caller, action: 'kek.retire', subject: keks.former.join(', ') || keks.current } as const
    await ruled(ctx, intent, keks.next === null ? undefined : `${keks.next} is being made: repeat \`kms rotate-kek\``)
    if (keks.former.length === 0 && keks.ending.length === 0) return outcome(keks, 0, true)
    // What was under way when the KEK changed may have been wrapped by the one before.
    const rewrapped = keks.former.length === 0 ? 0 : await rewrapAll(ctx, keks, intent)
    await move(ctx, intent, 'kek.retiring', (now) => ({ ...now, former: [], ending: [...now.ending, ...now.former], since: ctx.now() }))
    await ctx.authority.reload()
    // A crash here: nobody asks it any more; the next start destroys it.
    await finishRetiring(ctx, intent)
    return outcome(await keksOf(ctx), rewrapped)
  })

/** At start: finishes what a crash has left. */
export const settleKek = async (ctx: Context, rewrapAll: RewrapAll): Promise<void> =>
  await inTurn(ctx.store, 'kek', async () => {
    const keks = await keksOf(ctx)
    const intent = { caller: system, action: 'kek.settle', subject: keks.next ?? keks.current } as const
    if (keks.next !== null || keks.former.length > 0) await finishRotating(ctx, intent, rewrapAll)
    if (keks.ending.length > 0) await finishRetiring(ctx, intent)
  })
