import { Problem } from '@fleetkey/protocol/problem.ts'
import { verifySignature, type SignedMessage } from '@fleetkey/protocol/signed.ts'
import { tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { requestPolicyOf } from '../ca/profiles.ts'
import { hasIdentity, type IdentifiedDevice } from '../fleet/device.ts'
import type { Context, DeviceRef } from './context.ts'
import { callerOf, identityMessage } from './enrol.ts'
import { claimSpki, prepareCertificates, recordIssued, type Order } from './issue.ts'
import { hex } from './message.ts'
import { perform, type Intent } from './perform.ts'
import { issuerKeyOf } from './trust.ts'

/**
 * A new TLS certificate for a new software TLS key of an enrolled, connected device. The caller has verified the message with the record's
 * LDevID key and its session nonce; here the key's own signature (CSR) and its binding by the LDevID key are checked.
 * Idempotent per request id. The signed `identity` without an LDevID certificate.
 */
export const renew = async (ctx: Context, from: DeviceRef, message: SignedMessage): Promise<Uint8Array> => {
  const { body } = message.envelope
  const { device: id } = from
  if (body.type !== 'renew' || id === null) throw new Problem('malformed', 'not a renewal')
  const intent: Intent = { caller: callerOf(from), action: 'device.renew', subject: id }
  const request = `${id}/${hex(message.envelope.id)}`
  const repeated = await ctx.store.get('request', request)
  if (repeated !== undefined) return repeated.answer
  const device = await ctx.store.get('device', id)
  if (!hasIdentity(device)) throw new Problem('forbidden', `device ${id} is not enrolled`, { reason: 'device.not-enrolled' })
  const profile = ctx.authority.profiles['device-tls']
  const { spki } = judgeRequest(body.csr, requestPolicyOf(profile, { tenant: ctx.tenant, subject: id }))
  if (!verifySignature(device.keys.ldevidSpki, tlsBinding(ctx.tenant, body.session, spki), body.binding))
    throw new Problem('unauthenticated', 'the LDevID key did not bind this TLS key', { reason: 'csr.tls.binding' })
  const orders = [{ profile: 'device-tls', device: id, subject: id, spki } as const, ...(await nextLdevid(ctx, device))]
  const [tls, ldevid = null] = await prepareCertificates(ctx, ctx.authority, intent, orders)
  if (tls === undefined) throw new Problem('internal', 'one certificate was ordered')
  const identity = await identityMessage(ctx, from, message, { device: id, ldevid, tls, approvals: null })
  await perform(ctx, intent, async (tx) => {
    const row = await ctx.store.get('device', id)
    if (!hasIdentity(row)) throw new Problem('forbidden', `device ${id} is not enrolled`, { reason: 'device.not-enrolled' })
    for (const one of ldevid === null ? [tls] : [tls, ldevid]) {
      await claimSpki(ctx, tx, one)
      recordIssued(tx, one)
    }
    tx.update('device', { ...row, tlsSerial: tls.intent.id, previousTlsSerial: row.tlsSerial, ldevidSerial: ldevid?.intent.id ?? row.ldevidSerial })
    tx.insert('request', { id: request, answer: identity, createdAt: ctx.now() })
    tx.note(`TLS ${tls.intent.id}`)
  })
  // A crash here: the device asks again with the same id and gets the same certificate.
  ctx.step('renew.issued')
  return identity
}

/** A new certificate for the same LDevID key, where the one before comes from a CA that devices are renewed away from. */
const nextLdevid = async (ctx: Context, { id, ldevidSerial, keys }: IdentifiedDevice): Promise<readonly Order[]> => {
  const certificate = await ctx.store.get('certificate', ldevidSerial)
  if (certificate === undefined) return []
  const issuer = issuerKeyOf(certificate)
  const isLeft = ctx.authority.tainted.has(issuer) || ctx.authority.retired.has(issuer)
  return isLeft ? [{ profile: 'device-identity', device: id, subject: id, spki: keys.ldevidSpki }] : []
}
