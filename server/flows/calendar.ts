import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import type { Deadline } from '../ca/alerts.ts'
import { rootState } from '../ca/rollover.ts'
import type { Base, Context } from './context.ts'
import { endsByDay } from './inventory.ts'

const day = 86_400_000
export type Span = 'day' | 'week' | 'month'

/** Midnight (UTC) with which the day, week (from Monday) or month begins that holds this time. */
export const spanBegins = (by: Span, at: number): number => {
  const midnight = Math.floor(at / day) * day
  if (by === 'day') return midnight
  const date = new Date(midnight)
  // The first of January 1970 was a Thursday.
  return by === 'week' ? midnight - ((midnight / day + 3) % 7) * day : Date.UTC(date.getUTCFullYear(), date.getUTCMonth(), 1)
}
/** When the next one begins. */
export const spanEnds = (by: Span, at: number): number => {
  const begin = spanBegins(by, at)
  if (by !== 'month') return begin + (by === 'day' ? day : 7 * day)
  const date = new Date(begin)
  return Date.UTC(date.getUTCFullYear(), date.getUTCMonth() + 1, 1)
}

/** `2027-01-31` */
export const dayText = (at: number): string => new Date(at).toISOString().slice(0, 10)

export interface CalendarSpan {
  readonly from: number
  readonly until: number
  readonly certificates: number
  readonly kinds: { readonly profile: string; readonly issuer: string; readonly certificates: number }[]
}

const defaultSpans = 60

/** Certificates in force by the span in which they end, spans without any left out. Costs as much as there are days and kinds, however many certificates. */
export const calendar = async (
  ctx: Base,
  of: {
    readonly by: Span
    readonly from?: number | undefined
    readonly until?: number | undefined
    readonly profile?: string | undefined
    readonly issuer?: string | undefined
  },
): Promise<readonly CalendarSpan[]> => {
  const { by, from = ctx.now(), profile, issuer } = of
  const begin = spanBegins(by, from)
  let end = begin
  for (let count = 0; count < defaultSpans; count++) end = spanEnds(by, end)
  const counts = await endsByDay(ctx, { from: dayText(begin), to: dayText(of.until ?? end - 1), profile, issuer })
  const spans = new Map<number, Map<string, number>>()
  for (const { day: date, profile: of, issuer: by_, rows } of counts) {
    const at = spanBegins(by, Date.parse(`${date}T00:00:00Z`))
    const kinds = spans.get(at) ?? new Map<string, number>()
    spans.set(at, kinds.set(`${of}/${by_}`, (kinds.get(`${of}/${by_}`) ?? 0) + rows))
  }
  return [...spans]
    .toSorted(([one], [other]) => one - other)
    .map(([at, kinds]) => ({
      from: at,
      until: spanEnds(by, at),
      certificates: [...kinds.values()].reduce((sum, rows) => sum + rows, 0),
      kinds: [...kinds]
        .toSorted(([one], [other]) => (one < other ? -1 : 1))
        .map(([kind, certificates]) => {
          const [of = '', by_ = ''] = kind.split('/')
          return { profile: of, issuer: by_, certificates }
        }),
    }))
}

const timesOf = (certificate: Uint8Array): { readonly begins: number; readonly at: number } => {
  const { notBefore, notAfter } = parseCertificate(certificate)
  return { begins: notBefore, at: notAfter }
}

/** CAs that are not retired, certificates that sign messages and OCSP answers. */
export const ownCertificates = async (ctx: Context): Promise<readonly Deadline[]> => {
  const { rollover, certificates, roles } = ctx.authority
  const retired = new Set(
    rollover.generations.flatMap(({ number, root, state }) => [
      ...(state === 'retired' ? [named('issuing', number)] : []),
      ...(rootState(rollover, root) === 'retired' ? [named('root', root)] : []),
    ]),
  )
  const cas = [...certificates].map(([file, certificate]): Deadline => {
    const name = file.replace(/\.cer$/, '')
    return { name, kind: 'ca', ...timesOf(certificate) }
  })
  const signing = Object.entries(roles).map(([role, { certificate }]): Deadline => ({
    name: `${role}-signing`,
    kind: 'role',
    ...timesOf(certificate),
  }))
  const settings = await ctx.store.find('setting', { prefix: 'ca/ocsp/', limit: 100 })
  const responders = settings
    .map(({ id, value }): Deadline => ({ name: `ocsp-${id.slice('ca/ocsp/'.length)}`, kind: 'ocsp', ...timesOf(value) }))
    .filter(({ name }) => !retired.has(name.slice('ocsp-'.length)))
  return [...cas.filter(({ name }) => !retired.has(name)), ...signing, ...responders]
}
const named = (kind: 'root' | 'issuing', number: number): string => (number === 1 ? kind : `${kind}-${number}`)
