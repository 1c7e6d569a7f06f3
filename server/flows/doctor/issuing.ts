import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { findAll } from '../rows.ts'
import { issuers, type AuthorityName } from '../status-lists.ts'
import { date, day, failure, minute, ok, same, unless, warning, type Around, type Check } from './check.ts'

/** How many open intents are read. */
const most = 1000

type List = NonNullable<ReturnType<Around['lists']>>[number]
const isDelta = ({ name }: List): boolean => name.endsWith('-delta.crl')

export const issuingChecks: readonly Check[] = [
  {
    name: 'issuances',
    remedy: 'something was to be signed and never was: the log says why the KMS or the store failed; a restart marks them abandoned',
    async examine(ctx) {
      const open = await ctx.store.find('intent', { where: { unissued: 'open' }, limit: most })
      const old = open.filter(({ createdAt }) => createdAt + 10 * minute < ctx.now())
      return old.length === 0
        ? ok(`${open.length} under way`)
        : warning(
            `${old.length} were begun more than 10 minutes ago: ${old
              .slice(0, 5)
              .map(({ id }) => id)
              .join(', ')}`,
          )
    },
  },
  {
    name: 'revocation lists',
    remedy: 'the log says why no list is made (KMS, store); without --http-port nobody is served the lists that certificates name',
    examine(ctx, { lists, statusUrl }) {
      const all = lists()
      if (all === null) return statusUrl === null ? ok('not offered') : failure(`certificates name ${statusUrl}, and nobody serves it: --http-port is missing`)
      if (all.length === 0) return warning('none is made yet')
      const now = ctx.now()
      const stale = all.filter(({ nextUpdate }) => nextUpdate <= now)
      // They are made anew when a fourteenth of their time is over.
      const late = all.filter(({ thisUpdate, nextUpdate }) => nextUpdate - now < (nextUpdate - thisUpdate) / 4)
      if (stale.length > 0)
        return failure(
          stale
            .slice(0, 5)
            .map(({ name, nextUpdate }) => `${name} ended on ${date(nextUpdate)}`)
            .join('; '),
        )
      return unless(
        late.map(({ name, nextUpdate }) => `${name} ends on ${date(nextUpdate)}`),
        `${all.length}, the oldest of ${date(Math.min(...all.map(({ thisUpdate }) => thisUpdate)))}`,
        warning,
      )
    },
  },
  {
    name: 'delta lists',
    remedy: 'restart the server: it makes every list anew; the log says why one is missing',
    examine(_ctx, { lists }) {
      const all = lists()
      if (all === null || all.length === 0) return ok('not offered')
      const deltas = new Set(all.filter(isDelta).map(({ name }) => name))
      const without = all.filter((list) => !isDelta(list) && !deltas.has(list.name.replace(/\.crl$/, '-delta.crl')))
      return unless(
        without.map(({ name }) => `${name} has no delta`),
        `${deltas.size}`,
      )
    },
  },
  {
    name: 'OCSP responders',
    remedy: 'a responder makes itself a new certificate every minute when it is time: the log says why it cannot',
    async examine(ctx) {
      const settings = await findAll(ctx.store, 'setting', { prefix: 'ca/ocsp/' })
      const alive = issuers(ctx)
      const wrong: string[] = []
      let count = 0
      for (const { id, value } of settings) {
        const authority = id.slice('ca/ocsp/'.length) as AuthorityName
        const issuer = alive.get(authority)
        if (issuer === undefined) continue
        count++
        const certificate = parseCertificate(value)
        const ca = ctx.authority.certificates.get(`${authority}.cer`)
        if (certificate.notAfter <= ctx.now()) wrong.push(`that of ${authority} ended on ${date(certificate.notAfter)}`)
        if (ca === undefined || !certificate.native.verify(parseCertificate(ca).native.publicKey)) wrong.push(`that of ${authority} is not signed by it`)
        if (!same((await ctx.kms.describe(`ocsp-${authority}`))?.spki, certificate.spki))
          wrong.push(`the key of ocsp-${authority} is not that of its certificate`)
      }
      return unless(wrong, count === 0 ? 'nobody has asked yet' : `${count}`)
    },
  },
  {
    name: 'TLS certificate',
    remedy: 'start the server with --name for every name that devices and operators use; it makes itself a new certificate',
    examine(ctx, { tls, names }) {
      const { names: own, notAfter } = tls()
      const missing = names.filter((name) => !own.includes(name))
      if (notAfter <= ctx.now()) return failure(`ended on ${date(notAfter)}`)
      if (missing.length > 0) return failure(`does not name ${missing.join(', ')}`)
      return notAfter - ctx.now() < 3 * day ? warning(`ends on ${date(notAfter)}`) : ok(`${own.join(', ')} until ${date(notAfter)}`)
    },
  },
  {
    name: 'EST listener',
    remedy: 'restart the server; the log says why it stopped listening',
    examine(_ctx, { est }) {
      const state = est()
      return state === null ? ok('not offered') : state.listening ? ok('listens') : failure('does not listen')
    },
  },
]
