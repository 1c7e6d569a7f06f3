import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf, Evidence } from '@fleetkey/protocol/messages.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import { matching } from '../attestation/appraise.ts'
import type { StateClaims } from '../attestation/claims.ts'
import { isAttestationDue } from '../attestation/due.ts'
import type { ImaProgress } from '../attestation/ima.ts'
import { discontinuity, reattest, renewedRecipient, type AskedList } from '../attestation/reattest.ts'
import { hasIdentity, isMeasured, type Device, type MeasuredDevice, type VerdictRecord } from '../fleet/device.ts'
import { ask } from './ask.ts'
import type { Context, DeviceRef } from './context.ts'
import { endorsementPolicy } from './endorsement.ts'
import { converge, convergeDevice } from './converge.ts'
import { dropDeliveries } from './delivery.ts'
import { appraised, duePolicy } from './measured.ts'
import { policyOf } from './membership.ts'
import { markAudited, perform } from './perform.ts'
import { carryOut, quarantine, released, type Consequence } from './quarantine.ts'
import { reappraise } from './reappraise.ts'
import { fileListOf } from './release-files.ts'
import { findAll } from './rows.ts'
import type { LiveSession, Question } from './sessions.ts'
import { hearTrust } from './trust.ts'
import { inTurn } from './turn.ts'
import { acceptedWith, judge, tpmRecordOf, withContinuity } from './verdict.ts'

/** What a TPM says shortly after a power cut, and no longer later: no keys until then, and nothing is held against the device. */
const passing: ReadonlySet<string> = new Set(['quote.clock.unsafe'])

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

const deviceCaller = (id: DeviceId, from: string): Caller => ({ kind: 'device', id, from })

/**
 * Takes a report: notes a boot, asks the device to attest when that is due, and sends what it lacks unless that waits for its evidence. The device is asked
 * before anything is sent, so that what is withheld is withheld from this report on.
 */
export const hearReport = async (ctx: Context, id: DeviceId, report: BodyOf<'report'>): Promise<void> => {
  const session = ctx.sessions.of(id)
  const first = session?.resetCount === null
  if (session !== undefined) session.resetCount ??= report.resetCount
  const device = await ctx.store.get('device', id)
  if (!hasIdentity(device)) throw new Problem('forbidden', `device ${id} is not enrolled`, { reason: 'device.not-enrolled' })
  const due = isAttestationDue(
    { ...device, quotes: isMeasured(device) },
    await duePolicy(ctx, device, await policyOf(ctx, id)),
    { resetCount: report.resetCount, first },
    ctx.now(),
  )
  await hearTrust(ctx, device, report)
  if (report.resetCount !== device.reportedResetCount) await noteBoot(ctx, id, report.resetCount)
  if (due.due && due.withholds && session !== undefined) session.withheld = report
  if (due.due) await ask(ctx, id)
  await converge(ctx, id, report)
}

/** Durable before anything else: whatever happens next, no key is released before the device has attested this boot. */
const noteBoot = async (ctx: Context, id: DeviceId, resetCount: number): Promise<void> => {
  await perform(ctx, { caller: deviceCaller(id, 'report'), action: 'device.report', subject: id, detail: `booted: resetCount ${resetCount}` }, async (tx) => {
    const row = await ctx.store.get('device', id)
    if (hasIdentity(row)) tx.update('device', { ...row, reportedResetCount: resetCount })
  })
  ctx.step('attest.boot')
}

/** Spends the challenge that the evidence answers: this connection's, once, in time. Evidence for any other one changes nothing. */
const spend = (ctx: Context, session: LiveSession | undefined, from: DeviceRef, evidence: Evidence): { asked: Question; session: LiveSession } => {
  if (session === undefined || session.from.connection !== from.connection || session.asked === null)
    throw new Problem('conflict', 'evidence that was not asked for', { reason: 'attest.challenge' })
  const { asked } = session
  const { attest } = asked
  if (!same(attest.challenge, evidence.challenge)) throw new Problem('conflict', 'evidence for another challenge', { reason: 'attest.challenge' })
  session.asked = null
  if (attest.expires < ctx.now()) throw new Problem('expired', 'the challenge expired', { reason: 'attest.expired' })
  return { asked, session }
}

/**
 * Takes the evidence that `ask` asked for (the caller has verified whose message it is). Good evidence brings a quarantined device back and lets withheld keys
 * go on; evidence that does not verify or shows unacceptable firmware quarantines the device in the commit that records the verdict; a measurement list that goes
 * on is asked for from where it ended, and nothing is decided before its end. Throws Problem:
 * `conflict` with reason `attest.challenge` and `expired` change nothing, `attestation-failed` after the quarantine is durable.
 */
export const takeEvidence = async (ctx: Context, from: DeviceRef, id: DeviceId, evidence: Evidence): Promise<void> => {
  const { asked, session } = spend(ctx, ctx.sessions.of(id), from, evidence)
  const decided = await inTurn(ctx.store, `device/${id}`, async () => await decide(ctx, session, id, asked, evidence))
  session.ima = 'more' in decided ? decided.more : null
  if (asked.attest.firmware !== null && session.recipient === 'wanted') session.recipient = 'given'
  // A crash here: how far the list has come is gone with the connection; the device reports again and is asked for it from what is on record.
  if ('more' in decided) return void (await ask(ctx, id, asked.rest))
  const { verdict, consequence, pending } = decided
  ctx.step(verdict.verdict === 'contraindicated' ? 'attest.quarantined' : 'attest.accepted')
  await carryOut(ctx, consequence)
  if (verdict.verdict === 'contraindicated') {
    const problem = new Problem('attestation-failed', verdict.detail, { reason: verdict.reason })
    // The commit of the quarantine is its entry.
    markAudited(problem)
    throw problem
  }
  // A release withdrawn, or a policy changed, between judging and committing: whoever changed it saw the device's verdict of before.
  await reappraise(ctx, { devices: [id] }, 'acceptance changed during its attestation')
  const { withheld } = session
  session.withheld = null
  await (withheld === null ? convergeDevice(ctx, id) : converge(ctx, id, withheld))
  // Once: what is behind the quoted PCR 10 then waits for the next attestation, or a device could keep the server asking.
  if (pending > 0 && !asked.rest) await ask(ctx, id, true)
}

/** `pending`: entries of its measurement list that its quote does not cover. */
interface Decided {
  readonly verdict: VerdictRecord
  readonly consequence: Consequence
  readonly pending: number
}

/** Nothing is decided yet. */
interface Unfinished {
  readonly more: ImaProgress
}

/** The device as one that can give evidence. */
const quoting = (device: Device | undefined, id: DeviceId): MeasuredDevice => {
  if (!hasIdentity(device)) throw new Problem('forbidden', `device ${id} is not enrolled`, { reason: 'device.not-enrolled' })
  if (!isMeasured(device)) throw new Problem('unsupported', `device ${id} has no TPM`, { reason: 'attest.no-tpm' })
  return device
}

const decide = async (ctx: Context, session: LiveSession, id: DeviceId, asked: Question, evidence: Evidence): Promise<Decided | Unfinished> => {
  const device = quoting(await ctx.store.get('device', id), id)
  const found = await proven(ctx, session, device, asked, evidence)
  if ('more' in found) return found
  return await perform(ctx, { caller: deviceCaller(id, session.from.from), action: 'device.evidence', subject: id }, async (tx): Promise<Decided> => {
    const row = quoting(await ctx.store.get('device', id), id)
    if ('verdict' in found) return { verdict: found, consequence: await quarantine(ctx, tx, row, found), pending: 0 }
    const { state, recipient } = found
    const judged = await judge(ctx, row, state)
    const now = { ...state, release: judged.verdict.release }
    const judgement = withContinuity(judged, discontinuity({ record: tpmRecordOf(row), session: session.resetCount }, now, await endorsementPolicy(ctx)))
    const { verdict } = judgement
    const known = { ...row, resetCount: Math.max(row.resetCount, state.resetCount), reportedResetCount: state.resetCount }
    if (verdict.verdict === 'contraindicated') return { verdict, consequence: await quarantine(ctx, tx, known, verdict), pending: 0 }
    const keys = recipient === null ? row.keys : { ...row.keys, recipient }
    tx.update('device', { ...released(known), ...acceptedWith(row.floor, judgement), keys })
    if (recipient !== null) await dropDeliveries(ctx, tx, id)
    tx.note(`${verdict.verdict} ${verdict.reason} ${verdict.release ?? 'unknown firmware'}, resetCount ${state.resetCount}`)
    if (state.ima !== null) tx.note(`${state.ima.entries} measured files${state.ima.pending > 0 ? `, ${state.ima.pending} more not proven yet` : ''}`)
    if (row.state === 'quarantined') tx.note('no longer quarantined')
    return { verdict, consequence: { campaigns: [], owed: null }, pending: state.ima?.pending ?? 0 }
  })
}

/** What a device has proven: its state, and a new recipient key when one was asked for. */
interface Proven {
  readonly state: StateClaims
  readonly recipient: Uint8Array | null
}

/** The measurement list that was asked for is compared, as it is read, with the files that may run under the releases that the state may be one of. */
const askedList = async (ctx: Context, { model }: MeasuredDevice, { attest, ima }: Question): Promise<AskedList | null> => {
  if (attest.ima === null) return null
  const releases = await findAll(ctx.store, 'release', { where: { model } })
  const lists = new Map(await Promise.all(releases.map(async (release) => [release.id, await fileListOf(ctx, release)] as const)))
  return { progress: ima, appraised, releaseOf: (pcrs) => lists.get(matching(pcrs, releases)?.id ?? '') ?? null }
}

/** The proven state, what is missing of it, or the verdict on evidence that proves nothing. */
const proven = async (
  ctx: Context,
  session: LiveSession,
  device: MeasuredDevice,
  question: Question,
  evidence: Evidence,
): Promise<Proven | Unfinished | VerdictRecord> => {
  const { exporter } = session.from
  if (exporter === null) throw new Problem('unsupported', 'attestation needs a TLS connection that ends in this server', { reason: 'attest.no-exporter' })
  const { attest } = question
  const list = await askedList(ctx, device, question)
  try {
    const { ak, srk } = device.keys
    const last = tpmRecordOf(device)
    const asked = { tenant: ctx.tenant, device: device.id, exporter, session: session.nonce, attest, ak, srk, last, list }
    const found = reattest(evidence, asked)
    return 'more' in found ? found : { state: found.state, recipient: renewedRecipient(evidence, asked, found.state) }
  } catch (thrown) {
    const problem = toProblem(thrown)
    if (problem.code !== 'attestation-failed' || passing.has(problem.reason ?? '')) throw problem
    const reason = problem.reason ?? problem.code
    return { verdict: 'contraindicated', reason, detail: problem.message.slice(0, 500), release: null, at: ctx.now(), claims: [] }
  }
}

/** An operator wants a device to attest: now when it is connected, else when it next is. */
export const orderAttestation = async (ctx: Context, caller: Caller, id: DeviceId): Promise<'asked' | 'offline'> => {
  await perform(ctx, { caller, action: 'device.attest', subject: id }, async (tx) => {
    const device = await ctx.store.get('device', id)
    if (device === undefined) throw new Problem('not-found', `no device ${id}`)
    if (!hasIdentity(device)) throw new Problem('conflict', `device ${id} is ${device.state}: only a device with an identity can attest`)
    if (!isMeasured(device))
      throw new Problem('unsupported', `device ${id} has no TPM: what it proved when it enrolled is all it can prove`, { reason: 'attest.no-tpm' })
    tx.update('device', { ...device, attestOrderedAt: ctx.now() })
  })
  // A crash here: the order stands on the record, the next report finds it.
  ctx.step('attest.ordered')
  return await ask(ctx, id)
}
