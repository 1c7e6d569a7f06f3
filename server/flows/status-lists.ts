import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { Certificate } from '../ca/certificate.ts'
import { certListIn } from '../ca/crl.ts'
import type { Listed, MadeList, RoundOrder } from '../ca/revocation-list.ts'
import type { Context } from './context.ts'
import type { Issuer } from './issue.ts'
import { perform } from './perform.ts'
import { eachPage } from './rows.ts'

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
/** What had run out this long before the last complete list was numbered has been on one that was handed out. */
const margin = day

const system: Caller = { kind: 'system', id: 'crl', from: 'server' }

/** What is durable of a CA's lists: the highest number given, and the time of the last complete list. */
interface Kept {
  readonly number: number
  readonly completeAt: number
}

interface Lists {
  readonly name: AuthorityName
  readonly documents: Map<string, Published>
  complete: { readonly number: number; readonly at: number } | undefined
  /** Something happened since the last round. */
  dirty: boolean
}

/** What was revoked, kept and put together beside this thread: lists grow with the fleet. It does one after the other, in the order in which it is asked. */
export interface ListMaker {
  put(authority: string, certificates: readonly Listed[], at: number): void
  /** How much the lists of a CA have in them, and whether anything happened since its last complete one. Rejects once it has gone. */
  standing(authority: string): Promise<{ readonly entries: number; readonly changed: boolean }>
  make(order: RoundOrder): Promise<readonly MadeList[]>
  /** It has ended, and what it kept with it. */
  gone(): boolean
  close(): Promise<void>
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
  /** Ends what makes them; nothing is published any more. */
  close(): Promise<void>
}

const settingOf = (name: AuthorityName): string => `crl/${name}`

/**
 * Revocation lists of both CAs for others: complete, by distribution point, and a delta to each. Complete lists are made hourly while anything changes, deltas
 * whenever something changes. `place`: URL to which the names of lists are appended. `start`: where they are put together. Nothing that is decided here looks at them.
 */
export const statusLists = (ctx: Context, place: string, start: () => ListMaker): StatusLists => {
  const known = new Map<AuthorityName, Lists>()
  /** Lists of every CA that can sign them: of a rollover's next one from when devices are told of it, of a retired one no more. */
  const all = (): readonly Lists[] =>
    [...issuers(ctx).keys()].map((name) => {
      const lists = known.get(name) ?? { name, documents: new Map(), complete: undefined, dirty: false }
      known.set(name, lists)
      return lists
    })
  /** What changes before everything was read. */
  let waiting: Certificate[] | undefined = []
  let maker: ListMaker | undefined
  let turn: Promise<void> = Promise.resolve()

  const take = (certificates: readonly Certificate[]): void => {
    for (const lists of all()) {
      const own = certificates.filter((certificate) => issuerOf(certificate) === lists.name)
      if (own.length === 0) continue
      const listed = own.map(({ id, status, revokedAt, code, notAfter }): Listed => ({
        id,
        status,
        revokedAt,
        notAfter,
        ...(code === undefined ? {} : { code }),
      }))
      maker?.put(lists.name, listed, ctx.now())
      lists.dirty = true
    }
  }

  const kept = async (name: AuthorityName): Promise<Kept | undefined> => {
    const setting = await ctx.store.get('setting', settingOf(name))
    return setting === undefined ? undefined : (decode(setting.value) as Kept)
  }

  /**
   * Everything that is revoked and was not dropped before the last start, once, and again when what kept it has gone. What changes meanwhile is newer than any page read
   * here, and is taken last.
   */
  const load = async (): Promise<ListMaker> => {
    if (maker !== undefined && !maker.gone()) return maker
    await maker?.close()
    waiting ??= []
    maker = start()
    // Deltas that were begun are lost: only a complete list makes good for it.
    for (const lists of known.values()) lists.complete = undefined
    const since = new Map(await Promise.all([...issuers(ctx).keys()].map(async (name) => [name, (await kept(name))?.completeAt ?? 0] as const)))
    for (const withdrawn of ['revoked', 'held'] as const)
      await eachPage(ctx.store, 'certificate', { where: { withdrawn } }, async (page) =>
        take(page.filter((certificate) => certificate.notAfter >= (since.get(issuerOf(certificate)) ?? 0) - margin)),
      )
    const rest = waiting
    waiting = undefined
    take(rest)
    return maker
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

  const sign = async (lists: Lists, { key, purpose }: Issuer, made: readonly MadeList[]): Promise<void> => {
    const signatures = await ctx.kms.sign(made.map(({ tbs }) => ({ key, purpose, data: tbs })))
    if (signatures.length !== made.length) throw new Problem('internal', 'the KMS gave fewer signatures than asked')
    made.forEach((list, at) => {
      const { name, number, thisUpdate, nextUpdate } = list
      lists.documents.set(name, { bytes: certListIn(list, signatures[at] ?? new Uint8Array(0)), number, thisUpdate, nextUpdate })
    })
  }

  const round = async (lists: Lists, by: ListMaker, isOrdered: boolean): Promise<void> => {
    const issuer = issuers(ctx).get(lists.name)
    if (issuer === undefined) throw new Problem('not-found', `the key of ${lists.name} is gone`)
    // Times on lists are whole seconds: what has run out by then has run out by the list.
    const at = Math.floor(ctx.now() / second) * second
    const age = at - (lists.complete?.at ?? Number.NEGATIVE_INFINITY)
    const { entries, changed } = await by.standing(lists.name)
    const isComplete = isOrdered || age >= renewed.unchanged || (age >= renewed.changed && changed)
    if (!isComplete && !lists.dirty) return
    const number = await nextNumber(lists.name, isComplete ? { at } : null, `${isComplete ? 'complete' : 'delta'}, ${entries} entries`)
    // What is put from here on belongs to the next delta.
    lists.dirty = false
    const base = isComplete ? number : (lists.complete?.number ?? number)
    // Bytes of their own: what is sent to a thread takes along whatever its bytes are a part of.
    const [subject, spki] = [Uint8Array.from(issuer.subject), Uint8Array.from(issuer.spki)]
    try {
      await sign(lists, issuer, await by.make({ authority: lists.name, issuer: { subject, spki }, number, at, complete: isComplete, base, place }))
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
        const by = await load()
        // One CA whose key is not at hand does not hold up the other.
        const rounds = await Promise.allSettled(all().map(async (lists) => await round(lists, by, complete)))
        for (const one of rounds) if (one.status === 'rejected') throw one.reason
      })
      turn = next.catch(() => undefined)
      return next
    },
    get: (name) => [...known.values()].find(({ documents }) => documents.has(name))?.documents.get(name),
    all: () => new Map([...known.values()].filter(({ name }) => issuers(ctx).has(name)).flatMap(({ documents }) => [...documents])),
    async close() {
      await turn
      await maker?.close()
    },
  }
}
