import { createHash } from 'node:crypto'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate as ParsedCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { inside, readBits, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { ocspError, ocspResponse, ocspResponseData, parseOcspRequest, type CertId, type OcspStatus } from '@fleetkey/protocol/x509/ocsp.ts'
import type { Caller } from '../access/caller.ts'
import type { Certificate } from '../ca/certificate.ts'
import type { Context } from './context.ts'
import { claimSpki, prepareCertificates, recordIssued, type Issuer } from './issue.ts'
import { isDue } from './own-certificates.ts'
import { perform } from './perform.ts'
import { issuerOf, issuers, type AuthorityName } from './status-lists.ts'

const second = 1000
const minute = 60_000
/** How long an answer may be relied on, and how long one is handed out that was made before. */
const validity = 10 * minute
const kept = 5 * minute
/** Answers that wait to be asked for again. */
const maxKept = 50_000
/** Signatures a second for strangers: whoever asks with ever new nonces gets no more of this machine. */
const signatures = { perSecond: 200, burst: 400 } as const

const system: Caller = { kind: 'system', id: 'ocsp', from: 'server' }

export interface OcspAnswer {
  readonly bytes: Uint8Array
  /** Until when a cache may hand it out; null: to nobody else. */
  readonly until: number | null
}

export interface Responder {
  /** The answer to one request, always an OCSPResponse. */
  answer(request: Uint8Array): Promise<OcspAnswer>
  /** Makes the certificates of responders that speak already, and whose time is up, anew: whether or not anybody asks. */
  renew(): Promise<void>
  /** Forgets what it has said of these. */
  changed(certificates: readonly Certificate[]): void
}

interface Signing {
  readonly key: string
  readonly certificate: ParsedCertificate
}

const settingOf = (authority: AuthorityName): string => `ca/ocsp/${authority}`
const keyOf = (authority: AuthorityName): string => `ocsp-${authority}`

/**
 * The delegated responder of a CA (RFC 6960 §4.2.2.2): its key lives in the KMS, its certificate is issued by the very CA it speaks for, has OCSPSigning and
 * nothing else, and lives for 30 days; a new one, for the same key, in time.
 */
const responderOf = async (ctx: Context, authority: AuthorityName): Promise<Signing> => {
  const key = keyOf(authority)
  const issuer = issuers(ctx).get(authority)
  if (issuer === undefined) throw new Problem('unsupported', `${authority} answers no more`)
  const setting = await ctx.store.get('setting', settingOf(authority))
  const known = setting === undefined ? undefined : parseCertificate(setting.value)
  if (known !== undefined && !isDue(known, issuer, ctx.now())) return { key, certificate: known }
  const { spki } = await ctx.kms.create(key, 'ocsp-signing')
  if (spki === null) throw new Problem('internal', `KMS key ${key} has no public key`)
  const order = { profile: 'ocsp-responder', subject: `Fleetkey OCSP (${authority}) of ${ctx.tenant}`, spki, device: null } as const
  const intent = { caller: system, action: 'ocsp.responder', subject: authority } as const
  const [issued] = await prepareCertificates(ctx, issuer, intent, [order])
  if (issued === undefined) throw new Problem('internal', 'one certificate was ordered')
  await perform(ctx, { ...intent, detail: issued.intent.id }, async (tx) => {
    await claimSpki(ctx, tx, issued, new Set(known === undefined ? [] : [known.serial]))
    recordIssued(tx, issued)
    const now = await ctx.store.get('setting', settingOf(authority))
    if (now === undefined) tx.insert('setting', { id: settingOf(authority), value: issued.der })
    else tx.update('setting', { ...now, value: issued.der })
  })
  // A crash here: the next start uses it.
  ctx.step('ocsp.responder')
  return { key, certificate: parseCertificate(issued.der) }
}

/** Hashes by which a request names an issuer: of its name, and of the bits of its key (RFC 6960 §4.1.1). */
const namesOf = (issuer: Issuer, hash: CertId['hash']): { readonly name: Buffer; readonly key: Buffer } => {
  const fields = inside(whole(issuer.spki, tags.sequence))
  fields.next(tags.sequence)
  const bits = readBits(fields.next(tags.bitString))
  const digest = (bytes: Uint8Array): Buffer => createHash(hash).update(bytes).digest()
  return { name: digest(issuer.subject), key: digest(bits) }
}

const limiter = (now: () => number): (() => boolean) => {
  let [tokens, since]: [number, number] = [signatures.burst, now()]
  return () => {
    const at = now()
    tokens = Math.min(signatures.burst, tokens + (Math.max(0, at - since) * signatures.perSecond) / second)
    since = at
    if (tokens < 1) return false
    tokens--
    return true
  }
}

/**
 * Answers about certificates of both CAs, from their rows: good, revoked with time and reason (on hold too), unknown for whatever was not issued here. What was
 * said about one certificate without a nonce is said again for five minutes, unless its status changes; a nonce is signed anew (RFC 9654).
 */
export const ocspResponder = (ctx: Context): Responder => {
  const said = new Map<string, { readonly answer: OcspAnswer; readonly until: number }>()
  const signing = new Map<AuthorityName, Signing>()
  const bySerial = new Map<string, Set<string>>()
  const maySign = limiter(ctx.now)
  const namesNow = (): ReadonlyMap<string, AuthorityName> =>
    new Map(
      [...issuers(ctx)].flatMap(([authority, issuer]) =>
        (['sha1', 'sha256'] as const).map((hash) => {
          const { name, key } = namesOf(issuer, hash)
          return [`${hash}/${name.toString('hex')}/${key.toString('hex')}`, authority] as const
        }),
      ),
    )
  let names = namesNow()
  ctx.authority.onChange(async () => {
    names = namesNow()
    said.clear()
  })
  const authorityOf = (id: CertId): AuthorityName | undefined =>
    names.get(`${id.hash}/${Buffer.from(id.issuerNameHash).toString('hex')}/${Buffer.from(id.issuerKeyHash).toString('hex')}`)

  const signer = async (authority: AuthorityName): Promise<Signing> => {
    const [known, issuer] = [signing.get(authority), issuers(ctx).get(authority)]
    if (known !== undefined && issuer !== undefined && !isDue(known.certificate, issuer, ctx.now())) return known
    const made = await responderOf(ctx, authority)
    signing.set(authority, made)
    return made
  }

  /** `authority`: whose responder answers; about certificates of another CA it knows nothing. */
  const statusOf = async (id: CertId, authority: AuthorityName): Promise<OcspStatus['status']> => {
    if (authorityOf(id) !== authority) return 'unknown'
    const row = await ctx.store.get('certificate', id.serial)
    if (row === undefined || issuerOf(row) !== authority) return 'unknown'
    return row.status === 'valid' ? 'good' : { revokedAt: row.revokedAt ?? ctx.now(), code: row.code ?? 'unspecified' }
  }

  const forget = (serial: string): void => {
    for (const key of bySerial.get(serial) ?? []) said.delete(key)
    bySerial.delete(serial)
  }

  const remember = (serial: string, key: string, answer: OcspAnswer): void => {
    // Dropped meanwhile: what the answer says may be outdated.
    if (bySerial.get(serial)?.has(key) === true) said.set(key, { answer, until: ctx.now() + kept })
  }

  /** Before the row is read: a change from then on drops the note. */
  const note = (serial: string, key: string): void => {
    if (bySerial.size >= maxKept) {
      said.clear()
      bySerial.clear()
    }
    bySerial.set(serial, (bySerial.get(serial) ?? new Set()).add(key))
  }

  const make = async (ids: readonly CertId[], nonce: Uint8Array | null): Promise<OcspAnswer> => {
    const [first] = ids
    const authority = (first === undefined ? undefined : authorityOf(first)) ?? 'issuing'
    const { key, certificate } = await signer(authority)
    const at = Math.floor(ctx.now() / second) * second
    const statuses: OcspStatus[] = []
    for (const id of ids) statuses.push({ id, status: await statusOf(id, authority), thisUpdate: at, nextUpdate: at + validity })
    const data = ocspResponseData({ responder: certificate.subject, producedAt: at, statuses, nonce })
    const [signature] = await ctx.kms.sign([{ key, purpose: 'ocsp-signing', data }])
    if (signature === undefined) throw new Problem('internal', 'the KMS gave no signature')
    return { bytes: ocspResponse(data, signature, certificate.der), until: nonce === null ? at + kept : null }
  }

  const error = (which: Parameters<typeof ocspError>[0]): OcspAnswer => ({ bytes: ocspError(which), until: null })

  return {
    async answer(request) {
      try {
        const { ids, nonce } = parseOcspRequest(request)
        const [only] = ids
        const isPlain = ids.length === 1 && nonce === null && only !== undefined && authorityOf(only) !== undefined
        const key = isPlain ? Buffer.from(only.der).toString('base64') : ''
        const before = isPlain ? said.get(key) : undefined
        if (before !== undefined && before.until > ctx.now()) return before.answer
        if (!maySign()) return error('tryLater')
        if (isPlain) note(only.serial, key)
        const answer = await make(ids, nonce)
        if (isPlain) remember(only.serial, key, answer)
        return answer
      } catch (thrown) {
        const problem = toProblem(thrown)
        if (problem.code === 'malformed') return error('malformedRequest')
        if (problem.code === 'unsupported') return error('unauthorized')
        if (problem.code === 'unavailable') return error('tryLater')
        ctx.log(`OCSP: ${problem.message.slice(0, 500)}`)
        return error('internalError')
      }
    },
    async renew() {
      for (const authority of issuers(ctx).keys()) if ((await ctx.store.get('setting', settingOf(authority))) !== undefined) await signer(authority)
    },
    changed(certificates) {
      for (const { id } of certificates) forget(id)
    },
  }
}
