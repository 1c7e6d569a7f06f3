import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { Certificate } from '../ca/certificate.ts'
import { certListOf, tbsCertList, type ListOrder } from '../ca/crl.ts'
import { points, RevocationList, type Point } from '../ca/revocation-list.ts'
import type { Context } from './context.ts'
import type { Issuer } from './issue.ts'
import { perform } from './perform.ts'

/** A CA that revokes, with lists of its own: `root`, `issuing`, and of later generations `root-2`, `issuing-2`. */
export type AuthorityName = `root${string}` | `issuing${string}`

/** `root-ca-2` is the key of `root-2`. */
export const authorityName = (key: string): AuthorityName => key.replace('-ca', '') as AuthorityName

/** Who has issued a certificate; rows from before there was more than one CA do not say. */
export const issuerOf = ({ profile, issuer }: Pick<Certificate, 'profile' | 'issuer'>): AuthorityName =>
  issuer === undefined ? (profile === 'root-ca' || profile === 'issuing-ca' ? 'root' : 'issuing') : authorityName(issuer)

/** Those whose key is at hand. */
export const issuers = (ctx: Context): ReadonlyMap<AuthorityName, Issuer> =>
  new Map([...ctx.authority.issuers].map(([key, issuer]) => [authorityName(key), issuer]))

/** A list as it is handed out. */
export interface Published {
  readonly bytes: Uint8Array
  readonly number: number
  readonly thisUpdate: number
  readonly nextUpdate: number
}

const second = 1000
const hour = 3_600_000
const day = 24 * hour
/** How old a complete list grows before the next one is made: when something has changed since, and when nothing has. */
const renewed = { changed: hour, unchanged: 12 * hour } as const
/** How long lists may be relied on. */
const validity = { complete: 7 * day, delta: day } as const

/** What had run out this long before the last complete list was numbered has been on one that was handed out. */
const margin = day

const system: Caller = { kind: 'system', id: 'crl', from: 'server' }
const pageSize = 1000

/** What is durable of a CA's lists: the highest number given, and the time of the last complete list. */
interface Kept {
  readonly number: number
  readonly completeAt: number
}

interface Lists {
  readonly name: AuthorityName
  readonly list: RevocationList
  readonly documents: Map<string, Published>
  complete: { readonly number: number; readonly at: number } | undefined
  /** Something happened since the last round. */
  dirty: boolean
}

export interface StatusLists {
  /** Takes rows that have become durable. */
  changed(certificates: readonly Certificate[]): void
  /** Makes the lists that are due; `complete` makes complete ones whether due or not. Rounds have their turn one after the other. Harmless to repeat. */
  publish(options?: { readonly complete?: boolean }): Promise<void>
  /** `issuing.crl`, `issuing-delta.crl`, `issuing-7.crl`, `issuing-7-delta.crl`, the same of `root`; undefined before the first round. */
  get(name: string): Published | undefined
  /** Lists that are handed out, by name. */
  all(): ReadonlyMap<string, Published>
  /** Entries of all lists. */
  size(): number
}

/** `issuing-7-delta.crl` */
export const listName = (of: { readonly authority: AuthorityName; readonly point: Point | null; readonly delta: boolean }): string =>
  `${of.authority}${of.point === null ? '' : `-${of.point}`}${of.delta ? '-delta' : ''}.crl`

const settingOf = (name: AuthorityName): string => `crl/${name}`

/**
 * Revocation lists of both CAs for others: complete, by distribution point, and a delta to each. Complete lists are made hourly while anything changes, deltas
 * whenever something changes. `place`: URL of a list by its name. Nothing that is decided here looks at them.
 */
export const statusLists = (ctx: Context, place: (name: string) => string): StatusLists => {
  const known = new Map<AuthorityName, Lists>()
  /** Lists of every CA that can sign them: of a rollover's next one from when devices are told of it, of a retired one no more. */
  const all = (): readonly Lists[] =>
    [...issuers(ctx).keys()].map((name) => {
      const lists = known.get(name) ?? { name, list: new RevocationList(), documents: new Map(), complete: undefined, dirty: false }
      known.set(name, lists)
      return lists
    })
  let waiting: Certificate[] | undefined = []
  let turn: Promise<void> = Promise.resolve()

  const take = (certificates: readonly Certificate[]): void => {
    const every = all()
    for (const certificate of certificates) {
      const lists = every.find(({ name }) => name === issuerOf(certificate))
      if (lists === undefined) continue
      lists.list.put(certificate, ctx.now())
      lists.dirty = true
    }
  }

  const kept = async (name: AuthorityName): Promise<Kept | undefined> => {
    const setting = await ctx.store.get('setting', settingOf(name))
    return setting === undefined ? undefined : (decode(setting.value) as Kept)
  }

  /** Everything that is revoked and was not dropped before the last start. What changes meanwhile is newer than any page read here, and is taken last. */
  const load = async (): Promise<void> => {
    if (waiting === undefined) return
    const since = new Map(await Promise.all([...issuers(ctx).keys()].map(async (name) => [name, (await kept(name))?.completeAt ?? 0] as const)))
    for (const status of ['revoked', 'held'] as const)
      for (let after: string | undefined; ;) {
        const page: readonly Certificate[] = await ctx.store.find('certificate', {
          where: { status },
          limit: pageSize,
          ...(after === undefined ? {} : { after }),
        })
        take(page.filter((certificate) => certificate.notAfter >= (since.get(issuerOf(certificate)) ?? 0) - margin))
        after = page.at(-1)?.id
        if (page.length < pageSize) break
      }
    const rest = waiting
    waiting = undefined
    take(rest)
  }

  /** The number is durable before a list bears it. A crash after it: a number that no list has; the next one is higher. */
  const nextNumber = async (name: AuthorityName, complete: { readonly at: number } | null, detail: string): Promise<number> => {
    const number = await perform(ctx, { caller: system, action: 'crl.publish', subject: name, detail }, async (tx) => {
      const setting = await ctx.store.get('setting', settingOf(name))
      const before = setting === undefined ? { number: 0, completeAt: 0 } : (decode(setting.value) as Kept)
      const value = encode({ number: before.number + 1, completeAt: complete?.at ?? before.completeAt })
      if (setting === undefined) tx.insert('setting', { id: settingOf(name), value })
      else tx.update('setting', { ...setting, value })
      tx.note(`number ${before.number + 1}`)
      return before.number + 1
    })
    ctx.step('crl.numbered')
    return number
  }

  const orders = (lists: Lists, of: { number: number; at: number; complete: boolean; base: number }): ReadonlyMap<string, ListOrder> => {
    const made = new Map<string, ListOrder>()
    // The root revokes a handful in its life: one list will do.
    const scopes: readonly (Point | null)[] = lists.name.startsWith('root') ? [null] : [null, ...points]
    const changed = new Set(lists.list.changed())
    for (const point of scopes) {
      const name = listName({ authority: lists.name, point, delta: false })
      const delta = listName({ authority: lists.name, point, delta: true })
      const common = { number: of.number, thisUpdate: of.at, point: point === null ? null : place(name) }
      if (of.complete)
        made.set(name, { ...common, nextUpdate: of.at + validity.complete, body: lists.list.complete(point), base: null, freshest: place(delta) })
      // A delta goes with the complete list of its time as well; those where nothing happened stay as they are.
      const body = of.complete ? new Uint8Array(0) : lists.list.delta(point)
      if (of.complete || point === null || changed.has(point))
        made.set(delta, { ...common, nextUpdate: of.at + validity.delta, body, base: of.base, freshest: null })
    }
    return made
  }

  const sign = async (lists: Lists, ordered: readonly (readonly [string, ListOrder])[]): Promise<void> => {
    const found = issuers(ctx).get(lists.name)
    if (found === undefined) throw new Problem('not-found', `the key of ${lists.name} is gone`)
    const { key, purpose, ...issuer } = found
    const tbs = ordered.map(([, order]) => tbsCertList(issuer, order))
    const signatures = await ctx.kms.sign(tbs.map((data) => ({ key, purpose, data })))
    if (signatures.length !== ordered.length) throw new Problem('internal', 'the KMS gave fewer signatures than asked')
    ordered.forEach(([name, { number, thisUpdate, nextUpdate }], index) => {
      const [data = new Uint8Array(0), signature = new Uint8Array(0)] = [tbs[index], signatures[index]]
      lists.documents.set(name, { bytes: certListOf(data, signature), number, thisUpdate, nextUpdate })
    })
  }

  const round = async (lists: Lists, isOrdered: boolean): Promise<void> => {
    const at = Math.floor(ctx.now() / second) * second
    const age = at - (lists.complete?.at ?? Number.NEGATIVE_INFINITY)
    const isComplete = isOrdered || age >= renewed.unchanged || (age >= renewed.changed && lists.list.changed().length > 0)
    if (!isComplete && !lists.dirty) return
    // Times on lists are whole seconds: what has run out by then has run out by the list.
    const number = await nextNumber(lists.name, isComplete ? { at } : null, `${isComplete ? 'complete' : 'delta'}, ${lists.list.size} entries`)
    // No waiting from here to `begin`: what changes after it belongs to the next delta.
    lists.dirty = false
    const base = isComplete ? number : (lists.complete?.number ?? number)
    const ordered = [...orders(lists, { number, at, complete: isComplete, base })]
    if (isComplete) lists.list.begin(at)
    try {
      await sign(lists, ordered)
    } catch (thrown) {
      // The changes may be gone from the delta: only a complete list makes good for it.
      lists.complete = undefined
      throw thrown
    }
    if (isComplete) lists.complete = { number, at }
  }

  return {
    changed(certificates) {
      if (waiting === undefined) take(certificates)
      else waiting.push(...certificates)
    },
    publish({ complete = false } = {}) {
      const next = turn.then(async () => {
        await load()
        // One CA whose key is not at hand does not hold up the other.
        const rounds = await Promise.allSettled(all().map(async (lists) => await round(lists, complete)))
        for (const one of rounds) if (one.status === 'rejected') throw one.reason
      })
      turn = next.catch(() => undefined)
      return next
    },
    get: (name) => [...known.values()].find(({ documents }) => documents.has(name))?.documents.get(name),
    all: () => new Map([...known.values()].filter(({ name }) => issuers(ctx).has(name)).flatMap(({ documents }) => [...documents])),
    size: () => [...known.values()].reduce((sum, { list }) => sum + list.size, 0),
  }
}
