import { Problem } from '@fleetkey/protocol/problem.ts'
import { issuerKeyOf, secondOf, standings, stateOf, type Certificate, type CertificateState, type ProfileName, type Standing } from '../ca/certificate.ts'
import { passing, type Base, type IndexEntry } from './context.ts'
import { othersFirst } from './turn.ts'

/** What to look for; everything that is given has to hold. */
export interface CertificateSearch {
  readonly device?: string | undefined
  /** Devices whose id begins so. */
  readonly devicePrefix?: string | undefined
  /** Serials that begin so, hex. */
  readonly serial?: string | undefined
  readonly profile?: ProfileName | undefined
  /** Name of the issuer's KMS key. */
  readonly issuer?: string | undefined
  readonly state?: CertificateState | undefined
  readonly batch?: string | undefined
  /** Ends then or later; ends before. Milliseconds since 1970. */
  readonly from?: number | undefined
  readonly until?: number | undefined
  readonly limit: number
  /** `next` of the page before. */
  readonly after?: string | undefined
}

export interface CertificatePage {
  readonly certificates: readonly Certificate[]
  /** Where to go on; null: that was all. There may be fewer than asked for, even none, and more to come: a page looks at a bounded number of rows. */
  readonly next: string | null
}

/** Rows that one page passes over because they are not what is looked for, at most: each may be another page of the disk. */
const most = 50
/** Rows that are read before others have their turn. */
const turnSize = 20
/** Entries of an index that are read at a time. */
const chunk = 100
/** Sorts after every text of ids, profiles, names of keys and times. */
const last = '~'

/** A certificate that the index in use offers, and the cursor behind it. */
interface Candidate {
  readonly serial: string
  readonly cursor: string
}
type Candidates = AsyncGenerator<Candidate, void>

const entries = async function* (
  ctx: Base,
  of: {
    readonly table: 'certificate' | 'device'
    readonly index: 'calendar' | 'device' | 'batch'
    readonly from: string
    readonly to: string
    readonly after: IndexEntry | undefined
  },
): AsyncGenerator<IndexEntry, void> {
  const { table, index, from, to } = of
  for (let { after } = of; ;) {
    const page = await ctx.store.scan(table, index as never, { from, to, limit: chunk, ...(after === undefined ? {} : { after }) })
    yield* page
    after = page.at(-1)
    if (page.length < chunk) return
  }
}

const cursorOf = (kind: string, ...parts: readonly string[]): string => [kind, ...parts].join('.')

/** The parts of a cursor that this kind of search has made. Throws Problem('malformed'). */
const partsOf = (after: string | undefined, kind: string, count: number): readonly string[] | undefined => {
  if (after === undefined) return undefined
  const [of, ...parts] = after.split('.')
  if (of !== kind || parts.length !== count || !parts.every((part) => /^[A-Za-z0-9:-]{1,64}$/.test(part)))
    throw new Problem('malformed', 'the cursor is of another search')
  return parts
}

const bySerial = async function* (ctx: Base, { serial = '', after, limit }: CertificateSearch): Candidates {
  const size = Math.min(chunk, limit + 1)
  const [from] = partsOf(after, 's', 1) ?? []
  for (let at = from; ;) {
    const page: readonly Certificate[] = await ctx.store.find('certificate', { prefix: serial, limit: size, ...(at === undefined ? {} : { after: at }) })
    for (const { id } of page) yield { serial: id, cursor: cursorOf('s', id) }
    at = page.at(-1)?.id
    if (page.length < size) return
  }
}

const byDevice = async function* (ctx: Base, { device, devicePrefix = '', after }: CertificateSearch): Candidates {
  const parts = partsOf(after, 'd', 2)
  const range = device === undefined ? { from: devicePrefix, to: `${devicePrefix}${last}` } : { from: device, to: device }
  const cursor = parts === undefined ? undefined : { value: parts[0] ?? '', id: parts[1] ?? '' }
  for await (const { value, id } of entries(ctx, { table: 'certificate', index: 'device', ...range, after: cursor }))
    yield { serial: id, cursor: cursorOf('d', value, id) }
}

const byBatch = async function* (ctx: Base, batch: string, { after }: CertificateSearch): Candidates {
  const parts = partsOf(after, 'b', 2)
  const of = async function* (device: string, before: string | undefined): Candidates {
    const cursor = before === undefined ? undefined : { value: device, id: before }
    for await (const { id } of entries(ctx, { table: 'certificate', index: 'device', from: device, to: device, after: cursor }))
      yield { serial: id, cursor: cursorOf('b', device, id) }
  }
  if (parts !== undefined) yield* of(parts[0] ?? '', parts[1])
  const cursor = parts === undefined ? undefined : { value: batch, id: parts[0] ?? '' }
  for await (const { id } of entries(ctx, { table: 'device', index: 'batch', from: batch, to: batch, after: cursor })) yield* of(id, undefined)
}

/** Standings that a state is looked for under; time says the rest. */
const standingsOf: Readonly<Record<CertificateState, readonly Standing[]>> = {
  valid: ['valid'],
  superseded: ['superseded'],
  suspended: ['held'],
  revoked: ['revoked'],
  expired: ['valid', 'superseded', 'held'],
}

/**
 * `valid/device-tls/issuing-ca/`: everything before the time that certificates of these standings, of this profile and issuer, have in the calendar. Found by
 * leaping over the index: as many look-ups as there are kinds, however many certificates.
 */
export const kindsOf = async (
  ctx: Base,
  { standing, profile, issuer }: { readonly standing: readonly Standing[]; readonly profile?: string | undefined; readonly issuer?: string | undefined },
): Promise<readonly string[]> => {
  const kinds: string[] = []
  for (const one of standing) {
    const start = profile === undefined ? `${one}/` : `${one}/${profile}/`
    for (let from = start; ;) {
      const [found] = await ctx.store.scan('certificate', 'calendar', { from, to: `${start}${last}`, limit: 1 })
      if (found === undefined) break
      const kind = found.value.slice(0, found.value.lastIndexOf('/') + 1)
      if (issuer === undefined || kind.endsWith(`/${issuer}/`)) kinds.push(kind)
      from = `${kind}${last}`
    }
  }
  return kinds
}

/** By their end, then serial: the kinds that are looked for, merged. */
const byEnd = async function* (ctx: Base, search: CertificateSearch, range: { readonly from: string; readonly to: string }): Candidates {
  const { state, profile, issuer, after } = search
  const [second, serial] = partsOf(after, 'e', 2) ?? []
  const begin = second ?? range.from
  const kinds = await kindsOf(ctx, { standing: state === undefined ? standings : standingsOf[state], profile, issuer })
  const streams = kinds.map((kind) =>
    entries(ctx, {
      table: 'certificate',
      index: 'calendar',
      from: `${kind}${begin}`,
      to: `${kind}${range.to}`,
      after: serial === undefined ? undefined : { value: `${kind}${begin}`, id: serial },
    }),
  )
  const heads = await Promise.all(
    streams.map(async (stream, at) => {
      const { value } = await stream.next()
      return { stream, kind: kinds[at] ?? '', entry: value ?? undefined }
    }),
  )
  const rank = ({ kind, entry }: (typeof heads)[number]): string => (entry === undefined ? last : `${entry.value.slice(kind.length)} ${entry.id}`)
  for (;;) {
    const head = heads.reduce<(typeof heads)[number] | undefined>((least, one) => (least === undefined || rank(one) < rank(least) ? one : least), undefined)
    if (head?.entry === undefined) return
    const { value, id } = head.entry
    yield { serial: id, cursor: cursorOf('e', value.slice(head.kind.length), id) }
    head.entry = (await head.stream.next()).value ?? undefined
  }
}

/** Seconds of the calendar between which ends lie; undefined when nothing can. */
const rangeOf = ({ state, from = 0, until = Infinity }: CertificateSearch, now: number): { readonly from: string; readonly to: string } | undefined => {
  const isOver = state === 'expired'
  const isRunning = state === 'valid' || state === 'superseded' || state === 'suspended'
  const [begin, end] = [isRunning ? Math.max(from, now) : from, isOver ? Math.min(until, now) : until]
  // Both ends are judged once more on the row, to the millisecond.
  return begin > end ? undefined : { from: secondOf(Math.floor(begin)), to: secondOf(Math.ceil(Math.min(end, Number.MAX_SAFE_INTEGER))) }
}

/** Whether it is what is looked for, the batch of its device aside. */
const matches = (certificate: Certificate, search: CertificateSearch, now: number): boolean => {
  const { device, devicePrefix, serial, profile, issuer, state, from, until } = search
  return (
    (device === undefined || certificate.device === device) &&
    (devicePrefix === undefined || certificate.device?.startsWith(devicePrefix) === true) &&
    (serial === undefined || certificate.id.startsWith(serial)) &&
    (profile === undefined || certificate.profile === profile) &&
    (issuer === undefined || issuerKeyOf(certificate) === issuer) &&
    (state === undefined || stateOf(certificate, now) === state) &&
    (from === undefined || certificate.notAfter >= from) &&
    (until === undefined || certificate.notAfter < until)
  )
}

const isInBatch = async (ctx: Base, { device }: Certificate, batch: string | undefined): Promise<boolean> =>
  batch === undefined || (device !== null && (await ctx.store.get('device', device))?.batch === batch)

/**
 * One page of the certificates that are looked for, by the index that leads to the fewest: serial, else device, else batch, else the calendar (in order of their
 * ends). Throws Problem('malformed') for a cursor that is not of this search.
 */
export const searchCertificates = async (ctx: Base, search: CertificateSearch): Promise<CertificatePage> => {
  const { serial, device, devicePrefix, batch, limit } = search
  const now = ctx.now()
  const range = rangeOf(search, now)
  if (range === undefined) return { certificates: [], next: null }
  const candidates =
    serial !== undefined
      ? bySerial(ctx, search)
      : device !== undefined || devicePrefix !== undefined
        ? byDevice(ctx, search)
        : batch !== undefined
          ? byBatch(ctx, batch, search)
          : byEnd(ctx, search, range)
  // Whoever looks by the batch alone reads nothing of another one.
  const otherBatches = serial === undefined && device === undefined && devicePrefix === undefined ? undefined : batch
  const certificates: Certificate[] = []
  let [passed, cursor]: [number, string | null] = [0, null]
  for await (const candidate of candidates) {
    const read = passed + certificates.length
    if (passed === most || certificates.length === limit) return { certificates, next: cursor }
    if (read > 0 && read % turnSize === 0) await othersFirst()
    cursor = candidate.cursor
    const certificate = await ctx.store.get('certificate', candidate.serial, passing)
    if (certificate !== undefined && matches(certificate, search, now) && (await isInBatch(ctx, certificate, otherBatches))) certificates.push(certificate)
    else passed++
  }
  return { certificates, next: null }
}

/** One certificate by its serial. Throws Problem('not-found'). */
export const findCertificate = async (ctx: Base, serial: string): Promise<Certificate> => {
  const found = await ctx.store.get('certificate', serial)
  if (found === undefined) throw new Problem('not-found', `no certificate ${serial}`)
  return found
}

/** Certificates of one kind that end on one day (UTC). */
export interface DayCount {
  readonly day: string
  readonly profile: string
  readonly issuer: string
  readonly rows: number
}

/** How many certificates in force end on each day from `from` to `to` (`2027-01-31`, both included), by kind: counted when they changed, not now. */
export const endsByDay = async (
  ctx: Base,
  of: { readonly from: string; readonly to: string; readonly profile?: string | undefined; readonly issuer?: string | undefined },
): Promise<readonly DayCount[]> => {
  const counts: DayCount[] = []
  for (const kind of await kindsOf(ctx, { standing: ['valid'], profile: of.profile, issuer: of.issuer })) {
    const [, profile = '', issuer = ''] = kind.split('/')
    for (const { value, rows } of await ctx.store.tally('certificate', 'calendar', { from: `${kind}${of.from}`, to: `${kind}${of.to}` }))
      counts.push({ day: value.slice(kind.length), profile, issuer, rows })
  }
  return counts
}
