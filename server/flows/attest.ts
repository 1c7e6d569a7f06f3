import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Attest, BodyOf, Evidence } from '@fleetkey/protocol/messages.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import type { Caller } from '../access/caller.ts'
import type { StateClaims } from '../attestation/claims.ts'
import { isAttestationDue } from '../attestation/due.ts'
import { discontinuity, reattest, renewedRecipient } from '../attestation/reattest.ts'
import { hasIdentity, type IdentifiedDevice, type VerdictRecord } from '../fleet/device.ts'
import { isOutdated } from '../fleet/firmware.ts'
import { firmwareOf } from './approvals.ts'
import { ask } from './ask.ts'
import type { Context, DeviceRef } from './context.ts'
import { endorsementPolicy } from './endorsement.ts'
import { converge, convergeDevice } from './converge.ts'
import { policyOf } from './membership.ts'
import { markAudited, perform, type Transaction } from './perform.ts'
import { carryOut, quarantine, released, type Consequence } from './quarantine.ts'
import { reappraise } from './reappraise.ts'
import { findAll } from './rows.ts'
import type { LiveSession } from './sessions.ts'
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
    device,
    { ...(await policyOf(ctx, id)), outdated: isOutdated(device, (await firmwareOf(ctx, device.model)).authPolicy) },
    { resetCount: report.resetCount, first },
    ctx.now(),
  )
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
const spend = (ctx: Context, session: LiveSession | undefined, from: DeviceRef, evidence: Evidence): { attest: Attest; session: LiveSession } => {
  if (session === undefined || session.from.connection !== from.connection || session.asked === null)
    throw new Problem('conflict', 'evidence that was not asked for', { reason: 'attest.challenge' })
  const { attest } = session.asked
  if (!same(attest.challenge, evidence.challenge)) throw new Problem('conflict', 'evidence for another challenge', { reason: 'attest.challenge' })
  session.asked = null
  if (attest.expires < ctx.now()) throw new Problem('expired', 'the challenge expired', { reason: 'attest.expired' })
  return { attest, session }
}

/**
 * Takes the evidence that `ask` asked for (the caller has verified whose message it is). Good evidence brings a quarantined device back and lets withheld keys
 * go on; evidence that does not verify or shows unacceptable firmware quarantines the device in the commit that records the verdict. Throws Problem:
 * `conflict` with reason `attest.challenge` and `expired` change nothing, `attestation-failed` after the quarantine is durable.
 */
export const takeEvidence = async (ctx: Context, from: DeviceRef, id: DeviceId, evidence: Evidence): Promise<void> => {
  const { attest, session } = spend(ctx, ctx.sessions.of(id), from, evidence)
  const { verdict, consequence } = await inTurn(ctx.store, `device/${id}`, async () => await decide(ctx, session, id, attest, evidence))
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
}

interface Decided {
  readonly verdict: VerdictRecord
  readonly consequence: Consequence
}

const decide = async (ctx: Context, session: LiveSession, id: DeviceId, attest: Attest, evidence: Evidence): Promise<Decided> => {
  const device = await ctx.store.get('device', id)
  if (!hasIdentity(device)) throw new Problem('forbidden', `device ${id} is not enrolled`, { reason: 'device.not-enrolled' })
  const found = proven(ctx, session, device, attest, evidence)
  return await perform(ctx, { caller: deviceCaller(id, session.from.from), action: 'device.evidence', subject: id }, async (tx): Promise<Decided> => {
    const row = await ctx.store.get('device', id)
    if (!hasIdentity(row)) throw new Problem('forbidden', `device ${id} is not enrolled`, { reason: 'device.not-enrolled' })
    if ('verdict' in found) return { verdict: found, consequence: await quarantine(ctx, tx, row, found) }
    const { state, recipient } = found
    const judged = await judge(ctx, row, state)
    const now = { ...state, release: judged.verdict.release }
    const judgement = withContinuity(judged, discontinuity({ record: tpmRecordOf(row), session: session.resetCount }, now, await endorsementPolicy(ctx)))
    const { verdict } = judgement
    const known = { ...row, resetCount: Math.max(row.resetCount, state.resetCount), reportedResetCount: state.resetCount }
    if (verdict.verdict === 'contraindicated') return { verdict, consequence: await quarantine(ctx, tx, known, verdict) }
    const keys = recipient === null ? row.keys : { ...row.keys, recipient }
    tx.update('device', { ...released(known), ...acceptedWith(row.floor, judgement), keys })
    if (recipient !== null) await dropWrapped(ctx, tx, id)
    tx.note(`${verdict.verdict} ${verdict.reason} ${verdict.release ?? 'unknown firmware'}, resetCount ${state.resetCount}`)
    if (row.state === 'quarantined') tx.note('no longer quarantined')
    return { verdict, consequence: { campaigns: [], owed: null } }
  })
}

/** What waits for the device is wrapped to the recipient key it had: it is wrapped anew. */
const dropWrapped = async (ctx: Context, tx: Transaction, device: DeviceId): Promise<void> => {
  for (const message of await findAll(ctx.store, 'outbox', { where: { device } })) if (message.subject.startsWith('delivery/')) tx.remove('outbox', message)
  tx.note('new recipient key')
}

/** What a device has proven: its state, and a new recipient key when one was asked for. */
interface Proven {
  readonly state: StateClaims
  readonly recipient: Uint8Array | null
}

/** The proven state, or the verdict on evidence that proves nothing. */
const proven = (ctx: Context, session: LiveSession, device: IdentifiedDevice, attest: Attest, evidence: Evidence): Proven | VerdictRecord => {
  const { exporter } = session.from
  if (exporter === null) throw new Problem('unsupported', 'attestation needs a TLS connection that ends in this server', { reason: 'attest.no-exporter' })
  try {
    const { ak, srk } = device.keys
    const last = tpmRecordOf(device)
    const asked = { tenant: ctx.tenant, device: device.id, exporter, session: session.nonce, attest, ak, srk, last }
    const state = reattest(evidence, asked)
    return { state, recipient: renewedRecipient(evidence, asked, state) }
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
    if (device.assurance === 'token' || device.assurance === 'idevid')
      throw new Problem('unsupported', `device ${id} has no TPM: its ${device.assurance} is all it can prove`, { reason: 'attest.no-tpm' })
    tx.update('device', { ...device, attestOrderedAt: ctx.now() })
  })
  // A crash here: the order stands on the record, the next report finds it.
  ctx.step('attest.ordered')
  return await ask(ctx, id)
}
