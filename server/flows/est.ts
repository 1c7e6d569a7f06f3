import { isDeepStrictEqual } from 'node:util'
import { parseToken, type EnrolmentToken as Token } from '@fleetkey/protocol/enrolment-token.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { tokenVerifier } from '@fleetkey/protocol/transcript.ts'
import { nameOf, parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { nameAttributes } from '@fleetkey/protocol/x509/name.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { readStructure } from '@fleetkey/protocol/x509/request/structure.ts'
import { altNameTexts, generalNames } from '@fleetkey/protocol/x509/request/wishes.ts'
import type { Caller } from '../access/caller.ts'
import type { Claims } from '../attestation/claims.ts'
import { presentedIdevid } from '../attestation/idevid.ts'
import { claimsByIdevid, claimsByToken } from '../attestation/over-tls.ts'
import { fail } from '../attestation/reasons.ts'
import { refuseEst } from '../ca/est-reasons.ts'
import { backdate, requestPolicyOf } from '../ca/profiles.ts'
import { subjectOf } from '../ca/subject.ts'
import { canReceive, hardwareOf, hasIdentity, type Device, type EnrolledDevice, type ManifestEntry, type RegisteredDevice } from '../fleet/device.ts'
import { recovered } from '../fleet/recovery.ts'
import { withinWindow } from './claim-window.ts'
import { certificateShown, leavingOf, supersede } from './certificates.ts'
import type { Context } from './context.ts'
import { endorsementPolicy } from './endorsement.ts'
import { checkReturn, spendToken, usableToken, verifierOf } from './enrolment-token.ts'
import { identified } from './identified.ts'
import { claimSpki, prepareCertificates, recordIssued, type Issued } from './issue.ts'
import { hex, sha256hex } from './message.ts'
import { perform, type Intent, type Transaction } from './perform.ts'
import { reappraise } from './reappraise.ts'
import { recoverOrHold, recoveryOf } from './recover.ts'
import { auditedFor } from './refusal.ts'
import { findAll, findOne } from './rows.ts'
import { mustBeInForce } from './trust.ts'
import { inTurn } from './turn.ts'
import { acceptedWith, judgeClaims } from './verdict.ts'

/** One enrolment request as HTTP brought it, and what TLS proved about its sender. */
export interface EstRequest {
  /** Certification request, DER. */
  readonly csr: Uint8Array
  /** Certificates of the peer (DER), its own first; TLS has proven that one's key. Empty without. */
  readonly chain: readonly Uint8Array[]
  /** User and password of HTTP Basic; null without. */
  readonly basic: { readonly user: string; readonly password: string } | null
  /** Address prefix. */
  readonly from: string
}

/** A device that EST may give a certificate to: it has none yet, or has it from EST. */
type Enrollable = RegisteredDevice | EnrolledDevice

const agent = 'EST'
const hour = 3_600_000
/** Certificates of one device within an hour: answers get lost, more points to a fault. */
const perHour = 10

/** Barred, quarantined and agent-run devices get nothing here, whatever they bring. */
const enrollable = async (ctx: Context, id: DeviceId): Promise<Enrollable> => {
  const device = await ctx.store.get('device', id)
  if (device === undefined) throw new Problem('internal', 'a manifest entry without its device')
  if (device.state === 'quarantined') return refuseEst('est.quarantined', `device ${device.id} is quarantined`)
  if (device.state !== 'registered' && device.state !== 'enrolled')
    throw new Problem('forbidden', `device ${device.id} is ${device.state}`, { reason: `device.${device.state}` })
  if (device.state === 'enrolled' && canReceive(device.keys)) return refuseEst('est.agent-device', `device ${device.id} has an agent`)
  const standing = (await ctx.store.get('batch', device.batch))?.standing
  if (standing !== undefined) throw new Problem('forbidden', `batch ${device.batch} is ${standing.state}`, { reason: `batch.${standing.state}` })
  return device
}

/**
 * The key of a request, which its own signature proves; what it asks for besides is compared and never taken. It may ask for what the profile gives, and, when it
 * renews, for what the certificate in hand has (RFC 7030 §4.2.2 wants the names of that one): a configuration that has changed meanwhile strands nobody.
 */
const requested = (ctx: Context, csr: Uint8Array, of: { readonly device: Device; readonly renewed: Certificate | null }): Uint8Array => {
  const { device, renewed } = of
  const profile = ctx.authority.profiles['device-tls']
  const { subject: _, ...given } = requestPolicyOf(profile, { tenant: ctx.tenant, subject: device.id })
  const { spki } = judgeRequest(csr, {
    // Messages are ES256 and this key is the device's identity: it is P-256, whatever else the profile admits.
    keys: ['p256'],
    usages: [...given.usages, ...(renewed?.keyUsage ?? [])],
    purposes: [...given.purposes, ...(renewed?.extKeyUsage ?? [])],
    names: [...given.names, ...altNameTexts(renewed?.altNames ?? [])],
  })
  const structure = readStructure(csr)
  const subject = nameAttributes(structure.subject)
  const [one] = subject
  const bare = renewed === null && (subject.length === 0 || (subject.length === 1 && one?.type === oids.commonName && one.value === device.serial))
  const owns = [nameOf(device.id), subjectOf(profile.attributes, device.id)].map(nameAttributes)
  const isOwn = (renewed === null ? owns : [...owns.slice(1), nameAttributes(renewed.subject)]).some((own) => isDeepStrictEqual(own, subject))
  if (!bare && !isOwn) refuseEst('est.subject', `subject ${JSON.stringify(subject.map(({ value }) => value).join('/')).slice(0, 200)}`)
  const [asked, kept] = [structure.extensions, renewed?.extensions].map((extensions) => extensions?.get(oids.subjectAltName)?.value)
  const isKept = asked === undefined || (kept !== undefined && Buffer.compare(asked, kept) === 0)
  if (!isKept && !altNameTexts(generalNames(asked)).every((name) => given.names.includes(name))) refuseEst('est.alt-names')
  return spki
}

const issueFor = async (ctx: Context, intent: Intent, device: DeviceId, spki: Uint8Array): Promise<Issued> => {
  const [issued] = await prepareCertificates(ctx, ctx.authority, intent, [{ profile: 'device-tls', device, subject: device, spki }])
  if (issued === undefined) throw new Problem('internal', 'one certificate was ordered')
  return issued
}

const record = async (ctx: Context, tx: Transaction, issued: Issued, leaving: Set<string>): Promise<void> => {
  await claimSpki(ctx, tx, issued, leaving)
  recordIssued(tx, issued)
  await supersede(ctx, tx, leaving)
  tx.note(`TLS ${issued.intent.id}`)
}

const entryNamed = async (ctx: Context, user: string): Promise<ManifestEntry | undefined> => {
  const id = DeviceId.safeParse(user)
  const byId = id.success ? await findOne(ctx.store, 'manifest', { device: id.data }) : undefined
  return byId ?? (await findOne(ctx.store, 'manifest', { serial: user }))
}

const tokenIn = (password: string): Token => {
  try {
    return parseToken(password)
  } catch (error) {
    if (error instanceof Problem) return refuseEst('est.authorization')
    throw error
  }
}

/** Whose token this is. Unknown user, unknown token and wrong secret are told apart by nobody outside. */
const tokenHolder = async (ctx: Context, basic: NonNullable<EstRequest['basic']>): Promise<{ entry: ManifestEntry; id: Uint8Array }> => {
  const token = tokenIn(basic.password)
  const shown = new Secret(tokenVerifier(token.secret))
  token.secret.destroy()
  try {
    const [row, entry] = await Promise.all([ctx.store.get('enrolmentToken', hex(token.id)), entryNamed(ctx, basic.user)])
    if (row === undefined) return refuseEst('est.token', `no token ${hex(token.id)}`)
    const verifier = await verifierOf(ctx, row)
    const isIt = verifier.equals(shown)
    verifier.destroy()
    if (!isIt) return refuseEst('est.token', `another secret for token ${row.id}`)
    return entry === undefined ? refuseEst('est.token', `no device ${JSON.stringify(basic.user.slice(0, 64))}`) : { entry, id: token.id }
  } finally {
    shown.destroy()
  }
}

/** Who was let in, for which key; `spend` makes that cost what it costs, before anything is issued. */
interface Admission {
  readonly device: Enrollable
  readonly claims: Claims
  readonly spend: () => Promise<void>
}

const byToken = async (ctx: Context, intent: Intent, request: EstRequest, known: { device: DeviceId | null }): Promise<Admission> => {
  const { entry, id } = await tokenHolder(ctx, request.basic ?? refuseEst('est.no-credentials'))
  known.device = entry.device
  if (!entry.id.startsWith('serial/')) fail('manifest.no-token-row', `device ${entry.device} has a hardware key in the manifest`)
  const device = await enrollable(ctx, entry.device)
  await withinWindow(ctx, device)
  const spki = requested(ctx, request.csr, { device, renewed: null })
  if (hasIdentity(device)) {
    if (Buffer.compare(device.keys.ldevidSpki, spki) !== 0) fail('token.identity-exists', `device ${device.id} has an identity with another key`)
    await checkReturn(ctx, device)
  }
  const presented = { token: id, ldevid: spki }
  await usableToken(ctx, presented, device)
  return {
    device,
    claims: claimsByToken({ serial: device.serial, spki, token: hex(id) }),
    spend: async () => await spendToken(ctx, { ...intent, subject: device.id }, presented, device),
  }
}

const byIdevid = async (ctx: Context, request: EstRequest, known: { device: DeviceId | null }): Promise<Admission> => {
  const [endorsements, denied] = await Promise.all([findAll(ctx.store, 'endorsement'), endorsementPolicy(ctx)])
  const found = presentedIdevid(request.chain, endorsements, denied, ctx.now())
  const { hardware } = found.presented
  const entry = (await ctx.store.get('manifest', hardware)) ?? fail('manifest.unknown-idevid', `no manifest lists ${hardware}`)
  known.device = entry.device
  const device = await enrollable(ctx, entry.device)
  await withinWindow(ctx, device)
  if (hasIdentity(device) && hardwareOf(device.keys) !== hardware) fail('identity.other-idevid', `device ${device.id} is bound to other hardware`)
  const spki = requested(ctx, request.csr, { device, renewed: null })
  return { device, claims: claimsByIdevid(found, spki), spend: async () => undefined }
}

/**
 * simpleenroll (RFC 7030 §4.2.1): by a single-use token, or by the factory certificate of the TLS handshake. Commit by commit as every enrolment: spend the token;
 * intent; certificate and device. The certificate, DER. One key is the device's identity and its TLS key, it has no recipient key: no managed keys.
 */
export const estEnrol = async (ctx: Context, request: EstRequest): Promise<Uint8Array> => {
  const caller: Caller = { kind: 'unidentified', id: request.from, from: request.from }
  const intent: Intent = { caller, action: 'est.enrol', subject: request.basic?.user.slice(0, 64) ?? request.from }
  const known: { device: DeviceId | null } = { device: null }
  return await auditedFor(ctx, intent, known, async () => {
    if (request.basic !== null && request.chain.length > 0) refuseEst('est.two-credentials')
    if (request.basic === null && request.chain.length === 0) refuseEst('est.no-credentials')
    const { device, claims, spend } = request.basic === null ? await byIdevid(ctx, request, known) : await byToken(ctx, intent, request, known)
    const judgement = await judgeClaims(ctx, device, claims)
    const { verdict, reason, detail } = judgement.verdict
    if (verdict === 'contraindicated') throw new Problem('attestation-failed', detail, { reason })
    // Judged again in the commit; here so that a key that can have no certificate costs no token.
    const owner = await findOne(ctx.store, 'certificate', { spkiHash: sha256hex(claims.ldevidSpki) })
    if (owner !== undefined && owner.device !== device.id)
      throw new Problem('forbidden', `the key of ${String(owner.device)} presented by ${device.id}`, { reason: 'key.reused' })
    // Whoever has an identity and enrols again recovers it: on the budget that returns are on.
    await recoverOrHold(ctx, caller, device)
    await spend()
    const named = { ...intent, subject: device.id }
    const issued = await issueFor(ctx, named, device.id, claims.ldevidSpki)
    await perform(ctx, { ...named, detail: `${verdict} ${reason}, assurance ${claims.assurance}, hardware ${claims.hardware}` }, async (tx) => {
      const row = await enrollable(ctx, device.id)
      if (hasIdentity(row) && hardwareOf(row.keys) !== claims.hardware) fail('identity.other-idevid', `device ${row.id} is bound to other hardware`)
      const keys = { hardware: claims.hardware, recipientSpki: null, ldevidSpki: claims.ldevidSpki }
      const serials = { ldevid: issued.intent.id, tls: issued.intent.id }
      const next = identified(ctx.now(), row, { keys, agent, claims, verdict: judgement.verdict, ...serials, recovery: recoveryOf(ctx, row) })
      await record(ctx, tx, issued, leavingOf(row, next))
      tx.update('device', { ...next, ...acceptedWith(next.floor, judgement) })
    })
    // A crash here: the device is enrolled and does not know it; it asks again, with the same key where a token let it in.
    ctx.step('est.issued')
    // Signing took its time: what is acceptable may have changed since the verdict.
    await reappraise(ctx, { devices: [device.id] }, 'acceptance changed during its enrolment')
    return issued.der
  })
}

/** The certificate that is to be renewed, and its device: ours, good today, the newest one or the one before that. */
const renewing = async (ctx: Context, own: Uint8Array, known: { device: DeviceId | null }): Promise<{ device: EnrolledDevice; serial: string }> => {
  const row = await certificateShown(ctx, own)
  if (row === undefined || row.profile !== 'device-tls' || row.device === null)
    throw new Problem('unauthenticated', 'a certificate that was not issued here for a device', { reason: 'certificate.unknown' })
  known.device = row.device
  mustBeInForce(ctx, row)
  const device = await enrollable(ctx, row.device)
  if (device.state !== 'enrolled') throw new Problem('forbidden', `device ${device.id} is ${device.state}`, { reason: 'device.not-enrolled' })
  if (row.id !== device.tlsSerial && row.id !== device.previousTlsSerial)
    throw new Problem('forbidden', `certificate ${row.id} was replaced`, { reason: 'certificate.replaced' })
  return { device, serial: row.id }
}

/**
 * simplereenroll (RFC 7030 §4.2.2): by the certificate that is to be renewed, for the same names; the key may be a new one. The certificate that asked stays good
 * until the new one has been used, so a lost answer strands nobody. The certificate, DER.
 */
export const estReenrol = async (ctx: Context, request: EstRequest): Promise<Uint8Array> => {
  const known: { device: DeviceId | null } = { device: null }
  const stranger: Caller = { kind: 'unidentified', id: request.from, from: request.from }
  return await auditedFor(ctx, { caller: stranger, action: 'est.reenrol', subject: request.from }, known, async () => {
    if (request.basic !== null) refuseEst('est.two-credentials')
    const own = request.chain[0] ?? refuseEst('est.no-certificate')
    const { device } = await renewing(ctx, own, known)
    return await inTurn(ctx.store, `est/${device.id}`, async () => await reenrolled(ctx, { request, own, known, device }))
  })
}

const reenrolled = async (
  ctx: Context,
  of: { readonly request: EstRequest; readonly own: Uint8Array; readonly known: { device: DeviceId | null }; readonly device: EnrolledDevice },
): Promise<Uint8Array> => {
  const { request, own, known, device } = of
  const spki = requested(ctx, request.csr, { device, renewed: parseCertificate(own) })
  await withinRate(ctx, device.id)
  const intent: Intent = { caller: { kind: 'device', id: device.id, from: request.from }, action: 'est.reenrol', subject: device.id }
  const issued = await issueFor(ctx, intent, device.id, spki)
  await perform(ctx, intent, async (tx) => {
    const { device: row, serial } = await renewing(ctx, own, known)
    const id = issued.intent.id
    const keys = { hardware: hardwareOf(row.keys), recipientSpki: null, ldevidSpki: spki }
    // The newest certificate is in use: what it was issued for is over.
    const recovery = serial === row.tlsSerial && row.recovery !== undefined ? { recovery: recovered(row.recovery) } : {}
    const next = { ...row, keys, ...recovery, ldevidSerial: id, tlsSerial: id, previousTlsSerial: serial, lastSeenAt: ctx.now() }
    await record(ctx, tx, issued, leavingOf(row, next))
    tx.update('device', next)
    tx.note(`by ${serial}`)
  })
  // A crash here: the device does not know its new certificate; the one it has stays good, and asks again.
  ctx.step('est.renewed')
  return issued.der
}

/** What a device costs: each renewal is a signature, a row for good, and an entry of the log. Throws Problem('rate-limited'). */
const withinRate = async (ctx: Context, device: DeviceId): Promise<void> => {
  const since = ctx.now() - hour
  const issued = (await findAll(ctx.store, 'certificate', { where: { device } })).map(({ notBefore }) => notBefore + backdate).filter((at) => at > since)
  if (issued.length < perHour) return
  refuseEst('est.rate', `${issued.length} certificates of ${device} within an hour`, Math.ceil((Math.min(...issued) - since) / 1000))
}
