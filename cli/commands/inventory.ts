import { CertificateProfile, CertificateState, type ResponseOf } from '@fleetkey/protocol/admin.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { certificateBytes } from '@fleetkey/protocol/x509/pem.ts'
import type { z } from 'zod'
import { Refused } from '../client.ts'
import { date, exit, number, readStart, text, UsageError, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'

const string = { type: 'string' } as const

const oneOf = <E extends Record<string, string>>(call: Invocation, option: string, of: z.ZodEnum<E>): E[keyof E] | undefined => {
  const given = text(call, option)
  if (given === undefined) return undefined
  const parsed = of.safeParse(given)
  if (!parsed.success) throw new UsageError(`--${option} takes one of ${of.options.join(', ')}, not ${given}`)
  return parsed.data
}

const matching = (call: Invocation, option: string, form: RegExp, what: string): string | undefined => {
  const given = text(call, option)
  if (given !== undefined && !form.test(given)) throw new UsageError(`--${option} ${given}: not ${what}`)
  return given
}

/** `gw-1`, or with a star at its end every device whose id begins so. */
const deviceOf = (call: Invocation): { device?: string; devicePrefix?: string } => {
  const given = matching(call, 'device', /^[a-z0-9][a-z0-9-]{0,63}\*?$/, 'a device id, or how one begins and a star')
  if (given === undefined) return {}
  return given.endsWith('*') ? { devicePrefix: given.slice(0, -1) } : { device: given }
}

const issuerOf = (call: Invocation): string | undefined =>
  matching(call, 'issuer', /^(root|issuing)(-[1-9]\d{0,5})?$/, 'a CA such as root, issuing or issuing-2')

type Row = ResponseOf<'certificate.list'>['items'][number]

const listed = (items: readonly Row[]): string =>
  table([
    ['SERIAL', 'PROFILE', 'ISSUER', 'DEVICE', 'STATE', 'UNTIL'],
    ...items.map(({ serial, profile, issuer, device, station, state, notAfter }) => [serial, profile, issuer, device ?? station ?? '-', state, when(notAfter)]),
  ])

/** The certificate in a file, PEM or DER. */
const certificateIn = (path: string): { readonly serial: string; readonly fingerprint: string } => {
  const bytes = readStart(path, 64 << 10)
  try {
    return parseCertificate(certificateBytes(bytes))
  } catch (error) {
    throw new UsageError(`${path}: no certificate: ${error instanceof Error ? error.message : String(error)}`)
  }
}

/** Pages until there are `most`, or no more. */
const search = async (call: Invocation, most: number): Promise<{ items: Row[]; next: string | null }> => {
  const [before, after] = [date(call, 'expires-before'), date(call, 'expires-after')]
  const query = {
    ...deviceOf(call),
    serial: matching(call, 'serial', /^[0-9a-f]{1,40}$/, 'a serial in hex, or how one begins'),
    profile: oneOf(call, 'profile', CertificateProfile),
    issuer: issuerOf(call),
    state: oneOf(call, 'state', CertificateState),
    batch: text(call, 'batch'),
    expiresBefore: before,
    ...(after === undefined ? {} : { expiresFrom: after + 1 }),
  }
  const items: Row[] = []
  let next: string | null = text(call, 'after') ?? null
  do {
    const page: { items: Row[]; next: string | null } = await call
      .client()
      .call('certificate.list', { query: { ...query, limit: Math.min(1000, most - items.length), ...(next === null ? {} : { after: next }) } })
    items.push(...page.items)
    next = page.next
  } while (next !== null && items.length < most)
  return { items, next }
}

const day = 86_400_000
const spanText = (from: number, until: number): string => {
  const text = (at: number): string => new Date(at).toISOString().slice(0, 10)
  return until - from <= day ? text(from) : `${text(from)} to ${text(until - day)}`
}

type Own = ResponseOf<'certificate.calendar'>['own'][number]

/** Kinds of what the server itself rests on, first what a person has to replace, and who does that. */
const kinds: readonly (readonly [Own['kind'], string])[] = [
  ['ca', 'you: fleetkey ca prepare'],
  ['tls', 'the server'],
  ['role', 'the server'],
  ['ocsp', 'the server'],
  ['crl', 'the server'],
]

/** What ends first comes first within its kind. Revocation lists that are in time are one line: there may be hundreds, and each lasts a few days at most. */
const ownText = (own: readonly Own[], all: boolean, now: number): string => {
  const isQuiet = ({ kind, at }: Own): boolean => !all && kind === 'crl' && at > now
  const quiet = own.filter(isQuiet)
  const shown = kinds.flatMap(([kind, by]) =>
    own
      .filter((one) => one.kind === kind && !isQuiet(one))
      .toSorted((one, other) => one.at - other.at)
      .map(({ name, at }) => [name, kind, `${when(at)}${at > now ? '' : ' OVER'}`, by]),
  )
  const first = Math.min(...quiet.map(({ at }) => at))
  const lists = quiet.length === 0 ? [] : [[`${quiet.length} lists (--all names them)`, 'crl', `${when(first)} the first`, 'the server']]
  return table([['THE SERVER ITSELF', 'KIND', 'UNTIL', 'REPLACED BY'], ...shown, ...lists])
}

const calendarText = ({ spans, own }: ResponseOf<'certificate.calendar'>, all: boolean): string =>
  [
    ownText(own, all, Date.now()),
    '',
    table([
      ['ENDS (UTC)', 'CERTIFICATES', 'OF WHICH'],
      ...spans.map(({ from, until, certificates, kinds: of }) => [
        spanText(from, until),
        String(certificates),
        of.map((kind) => `${kind.certificates} ${kind.profile} by ${kind.issuer}`).join(', '),
      ]),
    ]),
    ...(spans.length === 0 ? ['no certificate ends in this time'] : []),
  ].join('\n')

export const inventoryCommands: readonly Command[] = [
  {
    name: 'ca list',
    usage:
      '[--device ID|PREFIX*] [--serial PREFIX] [--profile NAME] [--issuer CA] [--state STATE] [--batch BATCH] [--expires-before DATE] [--expires-after DATE] [--limit N] [--after CURSOR]',
    summary: 'search the certificates; in order of their ends unless a serial, device or batch is given',
    args: [0, 0],
    options: {
      device: string,
      serial: string,
      profile: string,
      issuer: string,
      state: string,
      batch: string,
      'expires-before': string,
      'expires-after': string,
      limit: string,
      after: string,
    },
    async run(call) {
      const found = await search(call, number(call, 'limit', 1, 1_000_000) ?? 100)
      call.out.result(found, () => `${listed(found.items)}${found.next === null ? '' : `\nmore: --after ${found.next}`}`)
      return exit.ok
    },
  },
  {
    name: 'ca show',
    usage: 'SERIAL|FILE',
    summary: 'what is on record of one certificate: by its serial, or the certificate itself (PEM or DER); prints it as PEM too',
    args: [1, 1],
    async run(call) {
      const [given = ''] = call.args
      const serial = given.toLowerCase().replaceAll(':', '')
      const file = /^[0-9a-f]{1,40}$/.test(serial) ? undefined : certificateIn(given)
      const { pem, ...found } = await call.client().call('certificate.show', { params: { id: file?.serial ?? serial } })
      if (file !== undefined && file.fingerprint !== found.fingerprint)
        throw new Refused('not-found', `the certificate on record as ${file.serial} is another one`)
      call.out.result({ ...found, pem }, () => {
        const times = { notBefore: when(found.notBefore), notAfter: when(found.notAfter), revokedAt: when(found.revokedAt), replacedAt: when(found.replacedAt) }
        return `${facts({ ...found, ...times })}\n${pem.trimEnd()}`
      })
      return exit.ok
    },
  },
  {
    name: 'ca calendar',
    usage: '[--by day|week|month] [--from DATE] [--until DATE] [--profile NAME] [--issuer CA] [--all]',
    summary:
      'until when the CAs, keys and lists of the server itself last, and how many certificates in force end per day, week or month; --all names every revocation list',
    args: [0, 0],
    options: { by: string, from: string, until: string, profile: string, issuer: string, all: { type: 'boolean', default: false } },
    async run(call) {
      const by = text(call, 'by') ?? 'day'
      if (by !== 'day' && by !== 'week' && by !== 'month') throw new UsageError(`--by takes day, week or month, not ${by}`)
      const query = {
        by,
        from: date(call, 'from'),
        until: date(call, 'until'),
        profile: oneOf(call, 'profile', CertificateProfile),
        issuer: issuerOf(call),
      } as const
      if (query.from !== undefined && query.until !== undefined && query.from > query.until) throw new UsageError('--until is before --from')
      const found = await call.client().call('certificate.calendar', { query })
      call.out.result(found, () => calendarText(found, call.options['all'] === true))
      return exit.ok
    },
  },
]
