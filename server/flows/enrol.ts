import { encode } from '@fleetkey/protocol/cbor.ts'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { ApprovalSet, BodyOf, Challenge, Hello } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { readMessage, verifyMessage, type SignedMessage } from '@fleetkey/protocol/signed.ts'
import { sha256 } from '@fleetkey/protocol/transcript.ts'
import type { Caller } from '../access/caller.ts'
import type { Claims } from '../attestation/claims.ts'
import { continuity } from '../attestation/continuity.ts'
import { methodOf, type AttestationPolicy, type EndorsementCa, type Presented } from '../attestation/methods.ts'
import { fail } from '../attestation/reasons.ts'
import { secondOf } from '../ca/certificate.ts'
import { hardwareOf, hasIdentity, isBarred, isMeasured, type AdmissibleDevice, type Device, type ManifestEntry } from '../fleet/device.ts'
import { approvalsOf, firmwareOf } from './approvals.ts'
import { withinWindow } from './claim-window.ts'
import { leavingOf, supersede } from './certificates.ts'
import { passing, type Context, type DeviceRef, type PendingChallenge } from './context.ts'
import { dropDeliveries } from './delivery.ts'
import { endorsementPolicy } from './endorsement.ts'
import { spendToken, tokenFor, verifierOf } from './enrolment-token.ts'
import { identified, keysOf, sameRecipient } from './identified.ts'
import { unwrapUnder, type Wrapped } from './kek.ts'
import { claimSpki, prepareCertificates, recordIssued } from './issue.ts'
import { hex, messageTo } from './message.ts'
import { perform, type Intent } from './perform.ts'
import { carryOut, quarantine, released } from './quarantine.ts'
import { reappraise } from './reappraise.ts'
import { keptLdevid, mayAsk, recoverOrHold, recoveryOf } from './recover.ts'
import { auditedFor } from './refusal.ts'
import { findAll } from './rows.ts'
import { selection } from './selection.ts'
import { othersFirst } from './turn.ts'
import { acceptedWith, judgeClaims, tpmRecordOf, type Judgement } from './verdict.ts'

export interface EnrolServices {
  readonly policy: AttestationPolicy
}

/** Milliseconds: an RSA EK on a real chip takes tens of seconds to derive. */
const challengeLife = 120_000
/** Waiting challenges of all peers together: a row is about 6 KB. */
const maxWaiting = 20_000
const maxMessage = 1 << 20

/** Who sent it, as far as the transport proved it. */
export const callerOf = (from: DeviceRef): Caller =>
  from.device === null ? { kind: 'unidentified', id: from.from, from: from.from } : { kind: 'device', id: from.device, from: from.from }

const secretContext = (tenant: string, id: string): Uint8Array => encode(['fleetkey/1/challenge', tenant, id])

export const wrappedChallenge: Wrapped<'challenge'> = {
  table: 'challenge',
  wrapOf: ({ secret }) => secret,
  contextOf: (tenant, { id }) => secretContext(tenant, id),
  withWrap: (row, secret) => ({ ...row, secret }),
}

/** The endorsements an operator imported, as the verifier takes them. */
const endorsementsOf = async (ctx: Context): Promise<readonly EndorsementCa[]> => await findAll(ctx.store, 'endorsement')
const attestationPolicy = async (ctx: Context, { policy }: EnrolServices): Promise<AttestationPolicy> => ({
  ...policy,
  endorsement: await endorsementPolicy(ctx),
  tlsKeys: ctx.authority.profiles['device-tls'].keys,
})

/** Whose hardware a hello shows, proven or not: on whose record it stands that it was refused. */
const claimedDevice = async (ctx: Context, hello: Hello): Promise<DeviceId | null> => {
  const hardware = methodOf(hello.presented).shown(hello)
  return hardware === null ? null : ((await ctx.store.get('manifest', hardware))?.device ?? null)
}

/** Which device this hardware is. Throws Problem('attestation-failed') for hardware that no signed manifest lists. */
const manifestEntry = async (ctx: Context, hello: Hello, { hardware }: Presented): Promise<ManifestEntry> => {
  const entry = await ctx.store.get('manifest', hardware)
  return entry ?? fail(methodOf(hello.presented).reasons.unlisted, `no manifest lists ${hardware}`)
}

/** The binding of device and hardware is immutable; a board without hardware key is, from its enrolment on, its LDevID key. */
const checkBinding = (device: Device, hello: Hello, of: Pick<Presented, 'hardware' | 'ldevidSpki'>): void => {
  if (!hasIdentity(device)) return
  const bound = hardwareOf(device.keys)
  if (bound !== of.hardware) fail(methodOf(hello.presented).reasons.otherHardware, `device ${device.id} is bound to ${bound}`)
  if (hello.presented.method === 'token' && Buffer.compare(device.keys.ldevidSpki, of.ldevidSpki) !== 0)
    fail('token.identity-exists', `device ${device.id} has an identity with another LDevID key`)
}

/** The device of a manifest entry, if this hardware may be it. */
const admissible = async (ctx: Context, from: DeviceRef, hello: Hello, presented: Presented, entry: ManifestEntry): Promise<AdmissibleDevice> => {
  if (entry.serial !== hello.serial) fail('manifest.serial-mismatch', `${presented.hardware} belongs to serial ${entry.serial}, claimed was ${hello.serial}`)
  if (from.device !== null && from.device !== entry.device)
    throw new Problem('forbidden', `the connection of ${from.device} presented the hardware of ${entry.device}`, { reason: 'enrol.other-device' })
  const device = await ctx.store.get('device', entry.device)
  if (device === undefined) throw new Problem('internal', `manifest entry ${entry.id} without device ${entry.device}`)
  if (isBarred(device)) throw new Problem('forbidden', `device ${device.id} is ${device.state}`, { reason: `device.${device.state}` })
  checkBinding(device, hello, presented)
  await withinWindow(ctx, device)
  return device
}

/**
 * First round trip. Checks what can be checked (signature by the presented LDevID key, keys, certificates, manifest, device, token) before it makes the
 * challenge. The signed challenge, whose row is durable by then.
 */
export const startEnrolment = async (ctx: Context, services: EnrolServices, from: DeviceRef, message: SignedMessage): Promise<Uint8Array> => {
  const hello = bodyOf(message, 'hello')
  const caller = callerOf(from)
  const known: { device: DeviceId | null } = { device: null }
  const intent: Intent = { caller, action: 'enrol.hello', subject: from.client }
  return await auditedFor(ctx, intent, known, async () => {
    if (from.exporter === null) throw new Problem('unsupported', 'enrolment needs a TLS connection that ends in this server', { reason: 'enrol.no-exporter' })
    known.device = await claimedDevice(ctx, hello)
    const method = methodOf(hello.presented)
    const presented = method.present(hello, await endorsementsOf(ctx), await attestationPolicy(ctx, services), ctx.now())
    verifyMessage(message, presented.ldevidSpki)
    const entry = await manifestEntry(ctx, hello, presented)
    known.device = entry.device
    const device = await admissible(ctx, from, hello, presented, entry)
    await keptLdevid(ctx, device, hello, presented.ldevidSpki)
    mayAsk(ctx, device)
    await tokenFor(ctx, hello, device)
    const id = ctx.random(16)
    const firmware = (await firmwareOf(ctx, entry.model)).policy
    let shared: Secret | undefined
    const share = (): Secret => (shared = new Secret(ctx.random(32)))
    const expires = ctx.now() + challengeLife
    const body: Challenge = {
      type: 'challenge',
      challenge: id,
      hello: sha256(message.bytes),
      random: ctx.random(32),
      demanded: method.demand(hello, { share, selection, firmware, random: ctx.random }),
      expires,
    }
    const challenge = await messageTo(ctx, ctx.authority.roles.challenge, from.client, body)
    const secret = shared === undefined ? null : await keep(ctx, shared, hex(id))
    const detail = `purpose ${hello.purpose}, method ${hello.presented.method}, hardware ${presented.hardware}`
    await perform(ctx, { ...intent, subject: entry.device, detail }, async (tx) => {
      if ((await ctx.store.count('challenge')) >= maxWaiting)
        throw new Problem('rate-limited', 'too many enrolments are waiting', { reason: 'challenge.too-many', retryAfterSeconds: 5 })
      // One waiting challenge per connection: a second hello replaces the first.
      for (const older of await ctx.store.find('challenge', { where: { client: from.client }, limit: 16 })) tx.remove('challenge', older)
      tx.insert('challenge', {
        id: hex(id),
        client: from.client,
        purpose: hello.purpose,
        hello: message.bytes,
        challenge,
        secret,
        expires,
        spentAt: null,
      })
    })
    // A crash here: the device never saw the challenge; it says hello again, the sweep removes the row.
    ctx.step('enrol.challenged')
    return challenge
  })
}

/** What a challenge shares with the right device, for the database: it decrypts nothing alone. */
const keep = async (ctx: Context, secret: Secret, id: string): Promise<Uint8Array> => {
  const [wrapped] = await ctx.kms.wrap([{ key: ctx.authority.kek, plaintext: secret, context: secretContext(ctx.tenant, id) }])
  secret.destroy()
  if (wrapped === undefined) throw new Problem('internal', 'the KMS wrapped nothing')
  return wrapped
}

const kept = async (ctx: Context, { id, secret: wrapped }: PendingChallenge): Promise<Secret | null> => {
  if (wrapped === null) return null
  return await unwrapUnder(ctx, ctx.authority.keks, { wrapped, context: secretContext(ctx.tenant, id) })
}

/**
 * Second round trip, commit by commit: spend the challenge; spend the token, where one lets the device in; intent rows; certificates, device and the recorded answer. The signed identity.
 * A repeated answer (same request id) gets the same identity.
 */
export const finishEnrolment = async (ctx: Context, services: EnrolServices, from: DeviceRef, message: SignedMessage): Promise<Uint8Array> => {
  const answer = bodyOf(message, 'answer')
  const caller = callerOf(from)
  const id = hex(answer.challenge)
  const known: { device: DeviceId | null } = { device: null }
  return await auditedFor(ctx, { caller, action: 'enrol.answer', subject: from.client }, known, async () => {
    const repeated = await ctx.store.get('request', requestId(from, message))
    if (repeated !== undefined) return repeated.answer
    if (from.exporter === null) throw new Problem('unsupported', 'enrolment needs a TLS connection that ends in this server', { reason: 'enrol.no-exporter' })
    const pending = await spend(ctx, caller, from, id, message)
    const helloMessage = readMessage(pending.hello, { max: maxMessage })
    const hello = bodyOf(helloMessage, 'hello')
    const challenge = bodyOf(readMessage(pending.challenge, { max: maxMessage }), 'challenge')
    const [endorsements, policy] = await Promise.all([endorsementsOf(ctx), attestationPolicy(ctx, services)])
    const method = methodOf(hello.presented)
    const presented = method.present(hello, endorsements, policy, ctx.now())
    const entry = await manifestEntry(ctx, hello, presented)
    known.device = entry.device
    const device = await admissible(ctx, from, hello, presented, entry)
    const token = await tokenFor(ctx, hello, device)
    const secret = token === null ? await kept(ctx, pending) : await verifierOf(ctx, token)
    const claims = method.verify(
      { hello, helloBytes: pending.hello, challenge, challengeBytes: pending.challenge, answer },
      { tenant: ctx.tenant, exporter: from.exporter, secret, policy },
      endorsements,
      ctx.now(),
    )
    secret?.destroy()
    const approvals = await approvalsFor(ctx, device.model, challenge)
    const verdict = await judged(ctx, device, hello, claims)
    await recoverOrHold(ctx, caller, device)
    if (token !== null && hello.presented.method === 'token')
      await spendToken(ctx, { caller, action: 'enrol.answer', subject: device.id }, hello.presented, device)
    return await admit(ctx, services, { caller, from, message, device, hello, claims, verdict, approvals, pending })
  })
}

const bodyOf = <T extends 'hello' | 'answer' | 'challenge'>(message: SignedMessage, type: T): BodyOf<T> => {
  const { body } = message.envelope
  if (body.type !== type) throw new Problem('malformed', `${body.type} where ${type} was expected`)
  return body as BodyOf<T>
}

/** A repetition is one of the same connection: a recorded answer that comes over another one is for a challenge that was spent. */
const requestId = (from: DeviceRef, message: SignedMessage): string =>
  `${from.client}/${hex(sha256(from.exporter ?? new Uint8Array()).subarray(0, 16))}/${hex(message.envelope.id)}`

/** Spends the challenge in a commit of its own, whatever follows: an attempt costs it. Only its own client, in time, once. */
const spend = async (ctx: Context, caller: Caller, from: DeviceRef, id: string, message: SignedMessage): Promise<PendingChallenge> => {
  const pending = await ctx.store.get('challenge', id)
  if (pending === undefined) throw new Problem('not-found', `no challenge ${id}`, { reason: 'challenge.unknown' })
  if (pending.client !== from.client) throw new Problem('forbidden', `challenge ${id} was made for ${pending.client}`, { reason: 'challenge.client' })
  // Before spending: nobody but the holder of the presented LDevID key may use up the challenge.
  const hello = bodyOf(readMessage(pending.hello, { max: maxMessage }), 'hello')
  verifyMessage(message, methodOf(hello.presented).ldevidSpki(hello))
  await perform(ctx, { caller, action: 'enrol.answer', subject: from.client, detail: `challenge ${id} spent` }, async (tx) => {
    const row = await ctx.store.get('challenge', id)
    if (row === undefined) throw new Problem('not-found', `no challenge ${id}`, { reason: 'challenge.unknown' })
    if (row.spentAt !== null) throw new Problem('conflict', `challenge ${id} was spent`, { reason: 'challenge.spent' })
    if (row.expires <= ctx.now()) throw new Problem('expired', `challenge ${id} expired`, { reason: 'challenge.expired' })
    tx.update('challenge', { ...row, spentAt: ctx.now() })
  })
  // A crash here: the challenge is gone, the device says hello again.
  ctx.step('enrol.spent')
  return pending
}

/**
 * Appraisal under the device's policy, and continuity with what its record says of its TPM. Firmware that is not acceptable keeps a newcomer out; a device that
 * has an identity keeps it and is quarantined.
 */
const judged = async (ctx: Context, device: Device, hello: Hello, claims: Claims): Promise<{ judgement: Judgement; note: string }> => {
  const judgement = await judgeClaims(ctx, device, claims)
  const { verdict, reason, detail, release } = judgement.verdict
  if (verdict === 'contraindicated' && !hasIdentity(device)) throw new Problem('attestation-failed', detail, { reason })
  const notes = [`${verdict} ${reason} ${release ?? 'unknown firmware'}`, `assurance ${claims.assurance}`]
  if (claims.method !== 'tpm2') return { judgement, note: notes.join(', ') }
  notes.push(`resetCount ${claims.resetCount}`)
  const record = hasIdentity(device) && isMeasured(device) ? tpmRecordOf(device) : null
  if (record !== null && hello.purpose === 'return' && Buffer.compare(record.srk, claims.srkPublic) !== 0)
    fail('return.other-srk', `device ${device.id} returned with another SRK: it must enrol`)
  notes.push(continuity(record, { ...claims, release }, await endorsementPolicy(ctx)))
  return { judgement, note: notes.join(', ') }
}

/** What firmware the keys work under that were made for this challenge; null for keys in software. */
const approvalsFor = async (ctx: Context, model: string, { demanded }: Challenge): Promise<ApprovalSet | null> => {
  if (demanded.method !== 'tpm2') return null
  const approvals = await approvalsOf(ctx, model)
  if (Buffer.compare(demanded.firmware.ref, approvals.ref) !== 0)
    throw new Problem('conflict', `a release of ${model} was withdrawn during the enrolment`, { reason: 'firmware.generation', retryAfterSeconds: 1 })
  return approvals
}

interface Admission {
  readonly caller: Caller
  readonly from: DeviceRef
  readonly message: SignedMessage
  readonly device: AdmissibleDevice
  readonly hello: Hello
  readonly claims: Claims
  readonly verdict: { readonly judgement: Judgement; readonly note: string }
  readonly approvals: ApprovalSet | null
  readonly pending: PendingChallenge
}

const admit = async (ctx: Context, services: EnrolServices, of: Admission): Promise<Uint8Array> => {
  const { device, claims } = of
  const intent: Intent = { caller: of.caller, action: 'enrol.issue', subject: device.id }
  // A return keeps its LDevID: only an enrolment gives a new one.
  const kept = await keptLdevid(ctx, device, of.hello, claims.ldevidSpki)
  const ordered = { device: device.id, subject: device.id }
  const issued = await prepareCertificates(ctx, ctx.authority, intent, [
    { ...ordered, profile: 'device-tls', spki: claims.tlsSpki, ...(kept === null ? {} : { until: kept.notAfter }) },
    ...(kept === null ? [{ ...ordered, profile: 'device-identity' as const, spki: claims.ldevidSpki }] : []),
  ])
  const [tls, fresh] = issued
  const ldevid = kept ?? (fresh === undefined ? undefined : { id: fresh.intent.id, der: fresh.der })
  if (ldevid === undefined || tls === undefined) throw new Problem('internal', 'certificates were ordered')
  const identity = await identityMessage(ctx, of.from, of.message.envelope.id, { device: device.id, ldevid: ldevid.der, tls: tls.der, approvals: of.approvals })
  const consequence = await perform(ctx, { ...intent, detail: of.verdict.note }, async (tx) => {
    const row = await ctx.store.get('device', device.id)
    if (row === undefined) throw new Problem('not-found', `no device ${device.id}`)
    if (isBarred(row)) throw new Problem('forbidden', `device ${device.id} is ${row.state}`, { reason: `device.${row.state}` })
    checkBinding(row, of.hello, claims)
    const { judgement } = of.verdict
    // Once more, on what the record says now.
    const recovery = recoveryOf(ctx, row)
    const next = identified(ctx.now(), row, {
      keys: keysOf(claims, of.hello),
      agent: of.hello.agent,
      claims,
      verdict: judgement.verdict,
      ldevid: ldevid.id,
      tls: tls.intent.id,
      recovery,
    })
    const leaving = leavingOf(row, next)
    for (const one of issued) {
      await claimSpki(ctx, tx, one, leaving)
      recordIssued(tx, one)
    }
    await supersede(ctx, tx, leaving)
    const accepted = judgement.verdict.verdict !== 'contraindicated'
    if (accepted) tx.update('device', { ...released(next), ...acceptedWith(next.floor, judgement) })
    // A quarantine takes everything that waits for the device away by itself.
    if (accepted && hasIdentity(row) && !sameRecipient(row.keys, next.keys)) await dropDeliveries(ctx, tx, device.id)
    tx.insert('request', { id: requestId(of.from, of.message), answer: identity, createdAt: ctx.now() })
    const waiting = await ctx.store.get('challenge', of.pending.id)
    if (waiting !== undefined) tx.remove('challenge', waiting)
    tx.note(`hardware ${claims.hardware}, ${kept === null ? 'LDevID' : 'kept LDevID'} ${ldevid.id}, TLS ${tls.intent.id}`)
    return accepted ? undefined : await quarantine(ctx, tx, next, judgement.verdict)
  })
  // A crash here: the device is enrolled and does not know it; it says hello again and gets certificates for the same identity.
  ctx.step('enrol.issued')
  if (consequence !== undefined) await carryOut(ctx, consequence)
  // Signing took its time: what is acceptable may have changed since the verdict.
  else await reappraise(ctx, { devices: [device.id] }, 'acceptance changed during its enrolment')
  return identity
}

/** What leads from these certificates to a root: an LDevID that is kept may come from an older CA than the new TLS certificate. */
const chainFor = ({ authority }: Context, { ldevid, tls }: { readonly ldevid: Uint8Array | null; readonly tls: Uint8Array }): Uint8Array[] => {
  const chain = [...authority.chainOf(tls), ...(ldevid === null ? [] : authority.chainOf(ldevid))]
  return [...new Map(chain.map((der) => [hex(der), der])).values()]
}

/** The signed answer to the request `re`, an enrolment or a renewal: certificates (DER), trust, the certificates of the server's message keys, signed time. */
export const identityMessage = async (
  ctx: Context,
  to: DeviceRef,
  re: Uint8Array,
  of: { readonly device: DeviceId; readonly ldevid: Uint8Array | null; readonly tls: Uint8Array; readonly approvals: ApprovalSet | null },
): Promise<Uint8Array> =>
  await messageTo(ctx, ctx.authority.roles.challenge, to.client, {
    type: 'identity',
    re,
    device: of.device,
    ldevid: of.ldevid,
    tls: of.tls,
    chain: chainFor(ctx, of),
    trust: [ctx.authority.root],
    keys: Object.values(ctx.authority.roles).map(({ certificate }) => certificate),
    approvals: of.approvals,
    time: ctx.now(),
  })

/** Challenges, and answers, that one commit of the sweep removes at most. */
const sweepSize = 100

/**
 * Removes challenges that nobody can answer any more, and recorded answers older than `keep` milliseconds, to the second, the oldest first. Run at start and every
 * minute; it reads what it removes and nothing else. A crash between two commits: the next run goes on.
 */
export const sweepEnrolments = async (ctx: Context, keep = 3_600_000): Promise<void> => {
  const caller: Caller = { kind: 'system', id: 'sweep', from: 'server' }
  const overdue = async (table: 'challenge' | 'request', life: number): Promise<readonly string[]> =>
    (await ctx.store.scan(table, 'since', { from: '', to: secondOf(ctx.now() - life - 1000), limit: sweepSize })).map(({ id }) => id)
  for (;;) {
    const [challenges, requests] = await Promise.all([overdue('challenge', challengeLife), overdue('request', keep)])
    if (challenges.length + requests.length === 0) return
    const detail = `${challenges.length} challenges, ${requests.length} answers`
    await perform(ctx, { caller, action: 'enrol.sweep', subject: 'challenges', detail }, async (tx) => {
      for (const [table, ids] of [
        ['challenge', challenges],
        ['request', requests],
      ] as const)
        for (const id of ids) {
          const row = await ctx.store.get(table, id, passing)
          if (row !== undefined) tx.remove(table, row)
        }
    })
    await othersFirst()
  }
}
