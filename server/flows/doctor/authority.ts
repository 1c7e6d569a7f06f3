import { X509Certificate } from 'node:crypto'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { isCanonicalP256 } from '@fleetkey/protocol/x509/public-key.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import { checkProfiles } from '../../ca/check-profiles.ts'
import { activeOf, isOver, isRootNeeded } from '../../ca/rollover.ts'
import { caCertificates, issuingKey, rootKey } from '../authority.ts'
import type { Context } from '../context.ts'
import { keksOf } from '../kek.ts'
import { date, day, failure, minute, ok, same, unless, warning, type Check } from './check.ts'

interface Ca {
  /** Name of its key. */
  readonly key: string
  readonly certificate: Certificate
  readonly root: number
}

/** Issuing CAs that count or are to follow, and roots that are needed, each with its certificate. */
const cas = async (ctx: Context): Promise<{ readonly issuing: readonly Ca[]; readonly roots: readonly Ca[] }> => {
  const { rollover } = ctx.authority
  const alive = rollover.generations.filter((one) => !isOver(one) && one.state !== 'preparing')
  const found = await Promise.all(alive.map(async (one) => ({ ...one, ...(await caCertificates(ctx, one)) })))
  const roots = found[0]?.roots ?? new Map<number, Certificate>()
  return {
    issuing: found.map(({ number, root, issuing }) => ({ key: issuingKey(number), certificate: issuing, root })),
    roots: [...roots]
      .filter(([number]) => isRootNeeded(rollover, number))
      .map(([number, certificate]) => ({ key: rootKey(number), certificate, root: number })),
  }
}

const allCas = async (ctx: Context): Promise<readonly Ca[]> => {
  const { issuing, roots } = await cas(ctx)
  return [...roots, ...issuing]
}

/** Keys besides those of the CAs that the server cannot do without, with their public halves where certificates name them. */
const otherKeys = (ctx: Context): readonly { readonly key: string; readonly spki: Uint8Array | null }[] => [
  ...Object.entries(ctx.authority.roles).map(([role, { certificate }]) => ({ key: `${role}-signing`, spki: parseCertificate(certificate).spki })),
  // What a former KEK has wrapped may still have to be opened.
  ...ctx.authority.keks.map((key) => ({ key, spki: null })),
]

export const authorityChecks: readonly Check[] = [
  {
    name: 'KMS answers',
    remedy: 'the log says why the process with the keys is away; fleetkey seal status says whether it is sealed',
    async examine(ctx) {
      // A real answer: keys that are only listed may be nowhere.
      const [plaintext, context] = [new Secret(new Uint8Array(16)), new TextEncoder().encode('fleetkey/1/doctor')]
      const [wrapped] = await ctx.kms.wrap([{ key: ctx.authority.kek, plaintext, context }])
      const [opened] = wrapped === undefined ? [] : await ctx.kms.unwrap([{ key: ctx.authority.kek, wrapped, context }])
      const keys = await ctx.kms.list()
      return opened?.equals(plaintext) === true ? ok(`${keys.length} keys; what the KEK wraps it opens`) : failure('the KEK does not open what it has wrapped')
    },
  },
  {
    name: 'CA keys',
    remedy:
      'restore the folder of keys (or the token) that belongs to this store; without the key of the CA nothing can be issued or revoked: ca prepare, ca distribute, ca activate make the next one',
    async examine(ctx) {
      const all = await allCas(ctx)
      const there = await Promise.all(all.map(async ({ key }) => (await ctx.kms.describe(key)) !== undefined))
      return unless(
        all.filter((_, at) => there[at] !== true).map(({ key }) => `${key} is not in the KMS`),
        all.map(({ key }) => key).join(', '),
      )
    },
  },
  {
    name: 'CA keys match',
    remedy: 'the keys are of another server than the store: put back those that belong together',
    async examine(ctx) {
      const all = await allCas(ctx)
      const keys = await Promise.all(all.map(async ({ key }) => await ctx.kms.describe(key)))
      const wrong = all.filter(({ certificate }, at) => keys[at] !== undefined && !same(keys[at].spki, certificate.spki))
      return unless(
        wrong.map(({ key }) => `${key} is another key than that of its certificate`),
        'each CA certificate is for the key in the KMS',
      )
    },
  },
  {
    name: 'message keys and KEK',
    remedy:
      'restore the folder of keys (or the token) that belongs to this store: without them no device believes this server, and no stored key can be opened',
    async examine(ctx) {
      const all = otherKeys(ctx)
      const wrong: string[] = []
      for (const { key, spki } of all) {
        const known = await ctx.kms.describe(key)
        if (known === undefined) wrong.push(`${key} is not in the KMS`)
        else if (spki !== null && !same(known.spki, spki)) wrong.push(`${key} is another key than that of its certificate`)
      }
      return unless(wrong, all.map(({ key }) => key).join(', '))
    },
  },
  {
    name: 'former KEK',
    remedy:
      'fleetkey kms retire-kek destroys it: until then it opens copies of the database from before it was replaced. What did not come to its end goes on when the server starts again',
    async examine(ctx) {
      const { current, next, former, ending, since = 0, wrappedAt = null } = await keksOf(ctx)
      const now = ctx.now()
      const open =
        next !== null
          ? `${next} is being made`
          : ending.length > 0
            ? `${ending.join(', ')} is being destroyed`
            : former.length > 0 && wrappedAt === null
              ? `what ${former.join(', ')} has wrapped is being wrapped by ${current}`
              : undefined
      if (open !== undefined) return since + 15 * minute < now ? failure(`${open} since ${date(since)}`) : ok(open)
      if (former.length === 0 || wrappedAt === null) return ok(`${current} is the only one`)
      const found = `${former.join(', ')} is not needed since ${date(wrappedAt)} and not retired`
      return wrappedAt + 7 * day < now ? warning(found) : ok(found)
    },
  },
  {
    name: 'CA chain',
    remedy: 'certificates of the CA in the store do not belong together: restore the store from a backup',
    async examine(ctx) {
      const { issuing, roots } = await cas(ctx)
      const wrong = issuing.flatMap(({ key, certificate, root }) => {
        const own = roots.filter((one) => one.root === root).map((one) => one.certificate)
        const result = validateChain({ leaf: certificate, intermediates: [], roots: own, at: ctx.now(), leafMayBeCa: true })
        return result.ok ? [] : [`${key} does not lead to its root: ${result.why}`]
      })
      return unless(wrong, `${issuing.length} issuing, each under its root`)
    },
  },
  {
    name: 'CA end',
    remedy: 'fleetkey ca prepare (with --root for a root), then distribute and activate: begin while the fleet has time to hear of it',
    async examine(ctx) {
      const first = (await allCas(ctx)).reduce((least, one) => (one.certificate.notAfter < least.certificate.notAfter ? one : least))
      const left = first.certificate.notAfter - ctx.now()
      const found = `${first.key} until ${date(first.certificate.notAfter)}`
      return left < 30 * day ? failure(found) : left < 180 * day ? warning(found) : ok(found)
    },
  },
  {
    name: 'CA outlives what it signs',
    remedy: 'identities end with the CA, before their time: roll over to the next CA (fleetkey ca prepare)',
    examine(ctx) {
      const { notAfter } = parseCertificate(ctx.authority.issuing)
      const { life } = ctx.authority.profiles['device-identity']
      const found = `until ${date(notAfter)}; an identity issued today lives until ${date(ctx.now() + life)}`
      return notAfter < ctx.now() + life ? warning(found) : ok(found)
    },
  },
  {
    name: 'CA certificates on record',
    remedy: 'the record of a CA that is in use says otherwise: roll over to the next CA, and find out who changed the store (fleetkey audit verify)',
    async examine(ctx) {
      const wrong: string[] = []
      const all = await allCas(ctx)
      for (const { key, certificate } of all) {
        const row = await ctx.store.get('certificate', certificate.serial)
        if (row === undefined) wrong.push(`${key}: no record of ${certificate.serial}`)
        else if (!same(row.der, certificate.der)) wrong.push(`${key}: another certificate has serial ${certificate.serial}`)
        else if (row.status !== 'valid') wrong.push(`${key} is in use and ${row.status}`)
      }
      return unless(wrong, `${all.length} in force`)
    },
  },
  {
    name: 'records of certificates',
    remedy: 'records were changed by something else than this server: restore the store, and fleetkey audit verify',
    async examine(ctx) {
      // The ones that end next: a sample, by the index.
      const sample = await ctx.store.scan('certificate', 'calendar', { from: 'valid/', to: 'valid/~', limit: 200 })
      const wrong: string[] = []
      for (const { id } of sample) {
        const row = await ctx.store.get('certificate', id)
        const read = row === undefined ? undefined : parseCertificate(row.der)
        if (row === undefined || read === undefined || read.serial !== id || read.notAfter !== row.notAfter)
          wrong.push(`${id} is the record of ${read?.serial ?? 'nothing'}`)
      }
      return unless(wrong, `${sample.length} looked at, each says what its certificate says`)
    },
  },
  {
    name: 'algorithms',
    remedy: 'endorsement list shows it: replace the CA of that maker by one with SHA-256 and RSA of 2048 bits or ECDSA, then endorsement remove',
    async examine(ctx) {
      const own = (await allCas(ctx)).flatMap(({ key, certificate }) =>
        certificate.signatureAlgorithm === oids.ecdsaSha256 && isCanonicalP256(certificate.spki) ? [] : [`${key} is not ECDSA P-256 with SHA-256`],
      )
      const foreign = (await ctx.store.find('endorsement', { limit: 1000 })).flatMap(({ subject, certificate }) =>
        weaknessOf(certificate).map((why) => `${subject}: ${why}`),
      )
      return own.length > 0 ? failure(own.join('; ')) : unless(foreign, 'no weak algorithm', warning)
    },
  },
  {
    name: 'certificate profiles',
    remedy: 'the configuration breaks a rule of certificates (docs/pki.md): correct --config and restart',
    examine(ctx) {
      checkProfiles(ctx.authority.profiles, ctx.now())
      return ok('each breaks no rule of the lint')
    },
  },
  {
    name: 'active CA',
    remedy: 'start the server anew: it finishes what was begun',
    examine(ctx) {
      const { number } = activeOf(ctx.authority.rollover)
      return ctx.authority.key === issuingKey(number)
        ? ok(`generation ${number} signs`)
        : failure(`${ctx.authority.key} signs, and generation ${number} is active`)
    },
  },
]

const weaknessOf = (der: Uint8Array): readonly string[] => {
  const { publicKey, signatureAlgorithm } = new X509Certificate(der)
  const { modulusLength } = publicKey.asymmetricKeyDetails ?? {}
  return [
    ...(modulusLength !== undefined && modulusLength < 2048 ? [`RSA of ${modulusLength} bits`] : []),
    ...(/sha1|md5|md2/i.test(signatureAlgorithm ?? '') ? [`signed with ${signatureAlgorithm}`] : []),
  ]
}
