import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { verifySignature, type SignedMessage } from '@fleetkey/protocol/signed.ts'
import { tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { requestPolicyOf } from '../ca/profiles.ts'
import { hasIdentity, type IdentifiedDevice } from '../fleet/device.ts'
import { leavingOf, supersede } from './certificates.ts'
import type { Context, DeviceRef } from './context.ts'
import { callerOf, identityMessage } from './enrol.ts'
import { claimSpki, prepareCertificates, recordIssued, type Order } from './issue.ts'
import { hex, sha256hex } from './message.ts'
import { perform, type Intent } from './perform.ts'
import { ldevidOf } from './recover.ts'
import { findOne } from './rows.ts'
import { inTurn } from './turn.ts'

/** Milliseconds for which a renewal that was not used keeps others out: a device that lost its new key waits no longer. */
const operationLife = 15 * 60_000

const needDevice = async (ctx: Context, id: DeviceId): Promise<IdentifiedDevice> => {
  const device = await ctx.store.get('device', id)
  if (!hasIdentity(device)) throw new Problem('forbidden', `device ${id} is not enrolled`, { reason: 'device.not-enrolled' })
  return device
}

/** The renewal whose certificate is the newest and was not used yet. */
const underWay = ({ renewal, tlsSerial, previousTlsSerial }: IdentifiedDevice) =>
  renewal?.serial === tlsSerial && previousTlsSerial !== null ? renewal : undefined

/**
 * A new TLS certificate for a new software TLS key of an enrolled, connected device. The caller has verified the message with the record's
 * LDevID key and its session nonce; here the key's own signature (CSR) and its binding by the LDevID key are checked.
 *
 * One renewal at a time: the same request (its message id and key) has the same certificate for answer, however often and over whatever connection it comes;
 * another one while a renewal is under way is refused with `conflict` until the new certificate was used, or 15 minutes. The certificate in use stays valid
 * until a newer one was used (flows/connect.ts), whatever is issued meanwhile. Throws Problem: `conflict` without a pause when the request itself is spent
 * (its key has a certificate, a newer renewal took its place): the next one needs a new key; `expired` when the LDevID is over: the device has to enrol.
 * The signed `identity`, with an LDevID certificate where that was renewed too.
 */
export const renew = async (ctx: Context, from: DeviceRef, message: SignedMessage): Promise<Uint8Array> => {
  const { body } = message.envelope
  const { device: id } = from
  if (body.type !== 'renew' || id === null) throw new Problem('malformed', 'not a renewal')
  const intent: Intent = { caller: callerOf(from), action: 'device.renew', subject: id }
  const request = hex(message.envelope.id)
  return await inTurn(ctx.store, `renew/${id}`, async () => {
    const device = await needDevice(ctx, id)
    const profile = ctx.authority.profiles['device-tls']
    const { spki } = judgeRequest(body.csr, requestPolicyOf(profile, { tenant: ctx.tenant, subject: id }))
    if (!verifySignature(device.keys.ldevidSpki, tlsBinding(ctx.tenant, body.session, spki), body.binding))
      throw new Problem('unauthenticated', 'the LDevID key did not bind this TLS key', { reason: 'csr.tls.binding' })
    const spkiHash = sha256hex(spki)
    const repeated = await answerAgain(ctx, from, device, { request, spkiHash })
    if (repeated !== undefined) return repeated
    const kept = await ldevidOf(ctx, device)
    await mayBegin(ctx, device, spkiHash)
    // A new certificate for the same LDevID key, where the one before comes from a CA that devices are renewed away from.
    const orders: readonly Order[] = [
      { profile: 'device-tls', device: id, subject: id, spki, ...(kept === null ? {} : { until: kept.notAfter }) },
      ...(kept === null ? [{ profile: 'device-identity', device: id, subject: id, spki: device.keys.ldevidSpki } as const] : []),
    ]
    const [tls, ldevid = null] = await prepareCertificates(ctx, ctx.authority, intent, orders)
    if (tls === undefined) throw new Problem('internal', 'one certificate was ordered')
    await perform(ctx, intent, async (tx) => {
      const row = await needDevice(ctx, id)
      // Another replica may have answered meanwhile: the device asks again and hears the same.
      if (row.renewal?.request === request) throw new Problem('unavailable', `request ${request} is being answered`, { retryAfterSeconds: 1 })
      await mayBegin(ctx, row, spkiHash)
      const next: IdentifiedDevice = {
        ...row,
        tlsSerial: tls.intent.id,
        // What was issued and never used is nothing that the device could connect with: the certificate in use is the one before it.
        previousTlsSerial: row.previousTlsSerial ?? row.tlsSerial,
        ldevidSerial: ldevid?.intent.id ?? row.ldevidSerial,
        renewal: { request, serial: tls.intent.id, ldevid: ldevid?.intent.id ?? null, spkiHash, issuedAt: ctx.now() },
      }
      const leaving = leavingOf(row, next)
      for (const one of ldevid === null ? [tls] : [tls, ldevid]) {
        await claimSpki(ctx, tx, one, leaving)
        recordIssued(tx, one)
      }
      await supersede(ctx, tx, leaving)
      tx.update('device', next)
      tx.note(`TLS ${tls.intent.id}`)
    })
    // A crash here: the device asks again with the same id, or connects again, and gets the same certificate.
    ctx.step('renew.issued')
    return await identityMessage(ctx, from, message.envelope.id, { device: id, ldevid: ldevid?.der ?? null, tls: tls.der, approvals: null })
  })
}

/** The answer to a request that was carried out before. Throws Problem('conflict') when it is another request under the same id, or its certificate is over. */
const answerAgain = async (
  ctx: Context,
  from: DeviceRef,
  device: IdentifiedDevice,
  { request, spkiHash }: { readonly request: string; readonly spkiHash: string },
): Promise<Uint8Array | undefined> => {
  const { renewal } = device
  if (renewal?.request !== request) return undefined
  if (renewal.spkiHash !== spkiHash) throw new Problem('conflict', `request ${request} came with another key before`, { reason: 'renewal.other-key' })
  const certificate = renewal.serial === device.tlsSerial ? await ctx.store.get('certificate', renewal.serial) : undefined
  if (certificate === undefined || certificate.status !== 'valid' || certificate.notAfter <= ctx.now())
    throw new Problem('conflict', `the certificate of request ${request} is over`, { reason: 'renewal.over' })
  const ldevid = renewal.ldevid === null ? undefined : await ctx.store.get('certificate', renewal.ldevid)
  return await identityMessage(ctx, from, Buffer.from(request, 'hex'), {
    device: device.id,
    ldevid: ldevid?.der ?? null,
    tls: certificate.der,
    approvals: null,
  })
}

/** A new renewal needs a new key, and that none is under way. */
const mayBegin = async (ctx: Context, device: IdentifiedDevice, spkiHash: string): Promise<void> => {
  const known = await findOne(ctx.store, 'certificate', { spkiHash })
  if (known !== undefined) throw new Problem('conflict', `the key of certificate ${known.id} is to be certified again`, { reason: 'renewal.key-used' })
  const active = underWay(device)
  const left = active === undefined ? 0 : active.issuedAt + operationLife - ctx.now()
  // A clock that was set back must not keep a device out for longer than the operation itself.
  if (active !== undefined && left > 0 && left <= operationLife)
    throw new Problem('conflict', `renewal ${active.request} of ${device.id} is under way`, {
      reason: 'renewal.under-way',
      retryAfterSeconds: Math.ceil(left / 1000),
    })
}

/** A device that connects while its renewal is under way gets the answer once more: it may have been lost with the connection that it was sent over. */
export const renewalAgain = async (ctx: Context, from: DeviceRef, device: IdentifiedDevice): Promise<Uint8Array | undefined> => {
  const active = device.state === 'enrolled' ? underWay(device) : undefined
  if (active === undefined) return undefined
  return await answerAgain(ctx, from, device, active).catch((thrown: unknown) => {
    // Over before it was ever used: the device asks for another one.
    if (thrown instanceof Problem && thrown.code === 'conflict') return undefined
    throw thrown
  })
}
