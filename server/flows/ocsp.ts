import { createHash } from 'node:crypto'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate as ParsedCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { inside, readBits, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { ocspError, ocspResponse, ocspResponseData, parseOcspRequest, type CertId, type OcspStatus } from '@fleetkey/protocol/x509/ocsp.ts'
import type { Caller } from '../access/caller.ts'
import type { Certificate } from '../ca/certificate.ts'
import { KeptAnswers, life, nameOf, type OcspAnswer } from '../ca/kept-answers.ts'
import type { Context } from './context.ts'
import { claimSpki, prepareCertificates, recordIssued, type Issuer } from './issue.ts'
import { isDue } from './own-certificates.ts'
import { perform } from './perform.ts'
import { inChunks } from './rows.ts'
import { issuerOf, issuers, type AuthorityName } from './status-lists.ts'

const second = 1000
/**
 * Signatures a second, of each kind by itself: answers about certificates that exist, which are kept and made ahead, and what a stranger can ask for without end,
 * nonces and serials that nobody has. Neither takes anything from the other.
 */
const signatures = { ahead: { perSecond: 1000, burst: 2000 }, forOne: { perSecond: 200, burst: 400 } } as const
/** Answers that are made anew at a time: one batch for the KMS. */
const atOnce = 64

const system: Caller = { kind: 'system', id: 'ocsp', from: 'server' }

export interface Responder {
  /** The answer to one request, always an OCSPResponse. */
  answer(request: Uint8Array): Promise<OcspAnswer>
  /**
   * Makes anew, whether or not anybody asks, the certificates of responders that speak already, and answers that are wanted and half over. Run every minute.
   */
  renew(): Promise<void>
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

const limiter = (now: () => number, { perSecond, burst }: { readonly perSecond: number; readonly burst: number }): (() => boolean) => {
  let [tokens, since]: [number, number] = [burst, now()]
  return () => {
    const at = now()
    tokens = Math.min(burst, tokens + (Math.max(0, at - since) * perSecond) / second)
    since = at
    if (tokens < 1) return false
    tokens--
    return true
  }
}

const statusOf = ({ status, revokedAt, code }: Certificate, now: number): OcspStatus['status'] =>
  status === 'valid' ? 'good' : { revokedAt: revokedAt ?? now, code: code ?? 'unspecified' }

/** Everything of a row that an answer about it says. */
const said = ({ status, revokedAt, code }: Certificate): string => `${status} ${revokedAt ?? ''} ${code ?? ''}`

/**
 * Answers about certificates of both CAs: good, revoked with time and reason (on hold too), unknown for whatever was not issued here.
 *
 * What is asked without a nonce about a certificate that exists is answered from a store of answers that were made before (RFC 6960 §2.5, RFC 5019): the first
 * question has it made, then it is made anew every quarter of an hour for as long as somebody asks. A kept answer saves the signature and decides nothing: the row
 * is read for every request, and the answer goes out only while the row says the same. With a nonce (RFC 9654), about several certificates, or about one that was not
 * issued here, it is signed for who asks.
 */
export const ocspResponder = (ctx: Context): Responder => {
  const kept = new KeptAnswers()
  const underWay = new Map<string, Promise<OcspAnswer>>()
  const signing = new Map<AuthorityName, Signing>()
  const mayPrepare = limiter(ctx.now, signatures.ahead)
  const maySign = limiter(ctx.now, signatures.forOne)
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
    kept.clear()
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

  /** The certificate that is asked about, if this CA has issued it. */
  const rowOf = async (id: CertId, authority: AuthorityName): Promise<Certificate | undefined> => {
    if (authorityOf(id) !== authority) return undefined
    const row = await ctx.store.get('certificate', id.serial)
    return row === undefined || issuerOf(row) !== authority ? undefined : row
  }

  /** `authority`: whose responder answers. `rows`: what each certificate is; undefined where its responder knows nothing of it. */
  const make = async (
    authority: AuthorityName,
    asked: readonly { readonly id: CertId; readonly row: Certificate | undefined }[],
    nonce: Uint8Array | null,
  ): Promise<OcspAnswer> => {
    const { key, certificate } = await signer(authority)
    const from = Math.floor(ctx.now() / second) * second
    const until = Math.min(from + life, certificate.notAfter)
    const statuses = asked.map(
      ({ id, row }) => ({ id, status: row === undefined ? 'unknown' : statusOf(row, from), thisUpdate: from, nextUpdate: until }) as const,
    )
    const data = ocspResponseData({ responder: certificate.subject, producedAt: from, statuses, nonce })
    const [signature] = await ctx.kms.sign([{ key, purpose: 'ocsp-signing', data }])
    if (signature === undefined) throw new Problem('internal', 'the KMS gave no signature')
    return { bytes: ocspResponse(data, signature, certificate.der), valid: nonce === null ? { from, until } : null }
  }

  const turnOf = (id: CertId, row: Certificate): string => `${nameOf(id)} ${said(row)}`

  /** Makes one that is kept. */
  const prepare = async (authority: AuthorityName, id: CertId, row: Certificate): Promise<OcspAnswer> => {
    const turn = turnOf(id, row)
    const making = make(authority, [{ id, row }], null)
    underWay.set(turn, making)
    try {
      const answer = await making
      kept.put(id, { said: said(row), answer })
      return answer
    } finally {
      if (underWay.get(turn) === making) underWay.delete(turn)
    }
  }

  /** What is known of one certificate, kept or made to be kept; undefined for one that was not issued here: serials can be invented without end. */
  const fromStore = async (id: CertId): Promise<OcspAnswer | undefined> => {
    const authority = authorityOf(id)
    const row = authority === undefined ? undefined : await rowOf(id, authority)
    if (authority === undefined || row === undefined) return undefined
    const before = kept.get(id, ctx.now())
    if (before?.said === said(row)) return before.answer
    // Who asks while it is made waits for the same, unless the certificate has changed in between.
    const making = underWay.get(turnOf(id, row))
    if (making !== undefined) return await making
    return mayPrepare() ? await prepare(authority, id, row) : error('tryLater')
  }

  const forOne = async (ids: readonly CertId[], nonce: Uint8Array | null): Promise<OcspAnswer> => {
    if (!maySign()) return error('tryLater')
    const [first] = ids
    const authority = (first === undefined ? undefined : authorityOf(first)) ?? 'issuing'
    const asked = await Promise.all(ids.map(async (id) => ({ id, row: await rowOf(id, authority) })))
    return { ...(await make(authority, asked, nonce)), valid: null }
  }

  const error = (which: Parameters<typeof ocspError>[0]): OcspAnswer => ({ bytes: ocspError(which), valid: null })

  return {
    async answer(request) {
      try {
        const { ids, nonce } = parseOcspRequest(request)
        const [only] = ids
        const found = only !== undefined && ids.length === 1 && nonce === null ? await fromStore(only) : undefined
        return found ?? (await forOne(ids, nonce))
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
      await inChunks(kept.due(ctx.now()), atOnce, async (id) => {
        const authority = authorityOf(id)
        const row = authority === undefined ? undefined : await rowOf(id, authority)
        if (authority === undefined || row === undefined) kept.drop(id)
        else await prepare(authority, id, row)
      })
    },
  }
}
