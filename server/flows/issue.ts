import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { refuseRequest } from '@fleetkey/protocol/x509/request/reasons.ts'
import type { Intent as CertificateIntent } from '../ca/certificate.ts'
import { validityOf, type Profiles } from '../ca/profiles.ts'
import { writeClean } from '../ca/template.ts'
import { certificateOf, serialOf, type CertificateOrder, type IssuerName } from '../ca/tbs.ts'
import type { Base, KmsKeyPurpose } from './context.ts'
import { sha256hex } from './message.ts'
import { perform, refuse, type Intent, type Transaction } from './perform.ts'
import { findAll, findOne } from './rows.ts'

/** Whose key signs certificates, and under which name. */
export interface Issuer extends IssuerName {
  readonly key: string
  readonly purpose: KmsKeyPurpose
  readonly profiles: Profiles
  /** The same for good, of a standing that may change meanwhile: what is begun with one CA is signed by it. */
  readonly fixed?: Issuer
}

export interface Order extends CertificateOrder {
  readonly device: DeviceId | null
  /** Whose station it is for; `device` is null then. */
  readonly station?: string
  /** No later end than this, milliseconds since 1970. */
  readonly until?: number
}

/** A signed certificate that is not recorded yet. */
export interface Issued {
  readonly intent: CertificateIntent
  readonly device: DeviceId | null
  readonly station?: string | undefined
  readonly der: Uint8Array
  /** Hex SHA-256 of the SPKI. */
  readonly spkiHash: string
  /** Name of the KMS key of the CA. */
  readonly issuer: string
}

/**
 * The first commit of issuing, and the signatures: the intent rows become durable, each certificate is linted, then all are signed (one KMS batch). Record them
 * with `recordIssued` in the commit of whatever they were ordered for. None lasts longer than the CA that signs it. Throws Problem('internal', reason `lint.RULE`)
 * when one breaks a rule: then none is signed; 'unavailable' (reason `issuer.over`) when that CA itself has run out.
 */
export const prepareCertificates = async (ctx: Base, by: Issuer, intent: Intent, orders: readonly Order[]): Promise<readonly Issued[]> => {
  const issuer = by.fixed ?? by
  const now = ctx.now()
  if (issuer.until <= now) {
    const problem = new Problem('unavailable', `the certificate of ${issuer.key} has run out: it is past time for the next CA`, { reason: 'issuer.over' })
    await refuse(ctx, intent, problem)
    throw problem
  }
  const intents = orders.map(({ profile, subject, spki, until = Infinity }): CertificateIntent => {
    const { notBefore, notAfter } = validityOf(issuer.profiles[profile], now)
    return {
      id: serialOf(ctx.random(12), now),
      version: 1,
      profile,
      subject,
      spki,
      notBefore,
      notAfter: Math.min(notAfter, until, issuer.until),
      state: 'open',
      createdAt: now,
    }
  })
  await perform(ctx, { ...intent, detail: `to be signed: ${intents.map(({ profile, id }) => `${profile} ${id}`).join(', ')}` }, (tx) => {
    for (const row of intents) tx.insert('intent', row)
  })
  // A crash here: the start-up sweep marks the intents abandoned; nothing was signed.
  ctx.step('issue.intended')
  const tbs = await linted(ctx, issuer, intent, { orders, intents })
  const signatures = await ctx.kms.sign(tbs.map((data) => ({ key: issuer.key, purpose: issuer.purpose, data })))
  // A crash here: certificates exist that nobody has seen; their intents stay and are marked abandoned.
  ctx.step('issue.signed')
  return intents.map((row, at) => {
    const [data, signature] = [tbs[at], signatures[at]]
    if (data === undefined || signature === undefined) throw new Problem('internal', 'the KMS gave fewer signatures than asked')
    const { device = null, station } = orders[at] ?? {}
    return { intent: row, device, station, der: certificateOf(data, signature), spkiHash: sha256hex(row.spki), issuer: issuer.key }
  })
}

/** What is to be signed, each found without fault; otherwise the intents end here, audited with the rule that was broken. */
const linted = async (
  ctx: Base,
  issuer: Issuer,
  intent: Intent,
  { orders, intents }: { readonly orders: readonly Order[]; readonly intents: readonly CertificateIntent[] },
): Promise<readonly Uint8Array[]> => {
  try {
    return intents.map((row, at) => {
      const order = orders[at]
      if (order === undefined) throw new Problem('internal', 'an intent without order')
      const profile = issuer.profiles[row.profile]
      const of = { tenant: ctx.tenant, serial: row.id, notBefore: row.notBefore, notAfter: row.notAfter }
      return writeClean({ profile, order, issuer, of, now: row.createdAt })
    })
  } catch (thrown) {
    const problem = toProblem(thrown)
    await perform(ctx, { ...intent, detail: `not signed: ${problem.reason ?? problem.code}` }, async (tx) => {
      for (const { id } of intents) {
        const row = await ctx.store.get('intent', id)
        if (row?.state === 'open') tx.update('intent', { ...row, state: 'abandoned' })
      }
    })
    // A crash before that commit: the start-up sweep marks them abandoned.
    await refuse(ctx, intent, problem)
    throw problem
  }
}

/** Adds the certificate, and the end of its intent, to a commit. */
export const recordIssued = (tx: Transaction, { intent, device, station, der, spkiHash, issuer }: Issued): void => {
  tx.update('intent', { ...intent, state: 'issued' })
  tx.insert('certificate', {
    id: intent.id,
    profile: intent.profile,
    device,
    ...(station === undefined ? {} : { station }),
    issuer,
    der,
    spkiHash,
    notBefore: intent.notBefore,
    notAfter: intent.notAfter,
    status: 'valid',
    revokedAt: null,
    reason: null,
  })
}

const server = 'this server'
/** Whose key it is. Ids and names hold no space. */
const ownerOf = ({ device, station }: Pick<Issued, 'device' | 'station'>): string => (station === undefined ? (device ?? server) : `station ${station}`)

/**
 * One key, one device or station, one purpose: refuses a public key that another one, this server or another profile has ever had a certificate for, and the key
 * of a revoked certificate. The newest certificate of a key holds its hash (a unique index, so that two devices cannot win at the same time); older ones of the same
 * device keep it with their serial appended. One of `leaving` (flows/certificates.ts) is superseded by the same write and taken from the set. Throws Problem with a
 * reason of `requestReasons`.
 */
export const claimSpki = async (ctx: Base, tx: Transaction, issued: Issued, leaving = new Set<string>()): Promise<void> => {
  const { intent, spkiHash } = issued
  const older = await findOne(ctx.store, 'certificate', { spkiHash })
  if (older === undefined) return
  const [owner, asks] = [ownerOf(older), ownerOf(issued)]
  if (owner === server && asks !== server) refuseRequest('key.authority', `the key of ${older.profile} ${older.id} presented by ${asks}`)
  if (owner !== asks) refuseRequest('key.reused', `the key of ${owner} presented by ${asks}`)
  if (older.status === 'revoked') refuseRequest('key.revoked', `the key of revoked certificate ${older.id} presented by ${asks}`)
  if (older.profile !== intent.profile) refuseRequest('key.other-purpose', `the key of ${older.profile} ${older.id} presented for ${intent.profile}`)
  const ended = leaving.delete(older.id) ? { replacedAt: ctx.now() } : {}
  tx.update('certificate', { ...older, ...ended, spkiHash: `${spkiHash}/${older.id}` })
}

/** A key of the server's own that another certificate is for already: the newest one holds its hash. `leaving` as above. */
export const certifyAgain = async (ctx: Base, tx: Transaction, { spkiHash }: Issued, leaving = new Set<string>()): Promise<void> => {
  const older = await findOne(ctx.store, 'certificate', { spkiHash })
  if (older === undefined) return
  const ended = leaving.delete(older.id) ? { replacedAt: ctx.now() } : {}
  tx.update('certificate', { ...older, ...ended, spkiHash: `${spkiHash}/${older.id}` })
}

/** Start-up sweep: intents that a crash left open will not be issued any more. */
export const sweepIntents = async (ctx: Base): Promise<void> => {
  const open = await findAll(ctx.store, 'intent', { where: { unissued: 'open' } })
  if (open.length === 0) return
  const subject = `${open.length} intents`
  await perform(ctx, { caller: { kind: 'system', id: 'sweep', from: 'server' }, action: 'enrol.sweep', subject, detail: 'abandoned' }, (tx) => {
    for (const row of open) tx.update('intent', { ...row, state: 'abandoned' })
  })
}
