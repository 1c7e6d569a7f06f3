import { DeviceId, EnrolmentId } from '@fleetkey/protocol/ids.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { verifySignature } from '@fleetkey/protocol/signed.ts'
import { groupTopic } from '@fleetkey/protocol/topics.ts'
import { connectProof } from '@fleetkey/protocol/transcript.ts'
import type { Caller } from '../access/caller.ts'
import { issuerKeyOf, type Certificate } from '../ca/certificate.ts'
import { hasIdentity, type IdentifiedDevice } from '../fleet/device.ts'
import { recovered } from '../fleet/recovery.ts'
import { certificateShown, leavingOf, supersede } from './certificates.ts'
import type { Context, SessionCertificate } from './context.ts'
import { policyOf } from './membership.ts'
import { perform, refuse, type Intent } from './perform.ts'
import { refuseKnown } from './refusal.ts'
import { findAll } from './rows.ts'
import { caMustCount, mustBeInForce } from './trust.ts'

/** What a peer said in CONNECT, and what TLS proved about it. `certificate`: DER, the peer has proven its key; null without one. */
export interface Connect {
  readonly clientId: string
  readonly username: string | undefined
  readonly password: Uint8Array | undefined
  readonly certificate: Uint8Array | null
  /** 32 bytes of the TLS exporter. */
  readonly exporter: Uint8Array
  readonly from: string
}

/** Who a connection is, and by which certificate: it lasts no longer than that. */
export interface Admitted {
  /** Group topics that it may hear beside its own. */
  readonly topics?: readonly string[]
  readonly device: DeviceId | null
  readonly certificate: SessionCertificate | null
}

const signature = (password: Uint8Array): Uint8Array => {
  const text = new TextDecoder('latin1').decode(password)
  if (!/^[A-Za-z0-9_-]{86}$/.test(text)) throw new Problem('unauthenticated', 'the password is no connection proof', { reason: 'connect.proof-form' })
  return new Uint8Array(Buffer.from(text, 'base64url'))
}

/** Certificate, device and proof of a client that claims to be a device. Judged on every CONNECT, on our own rows, never by TLS alone. */
const proven = async (
  ctx: Context,
  connect: Connect,
  known: { device: DeviceId | null },
): Promise<{ readonly device: IdentifiedDevice; readonly certificate: Certificate }> => {
  const claimed = DeviceId.safeParse(connect.clientId)
  if (!claimed.success) throw new Problem('malformed', `client id ${JSON.stringify(connect.clientId.slice(0, 64))}`, { reason: 'connect.client-id' })
  if (connect.username !== undefined && connect.username !== claimed.data)
    throw new Problem('unauthenticated', 'the user name is not the client id', { reason: 'connect.username' })
  if (connect.certificate === null) throw new Problem('unauthenticated', `no certificate for ${claimed.data}`, { reason: 'connect.no-certificate' })
  const certificate = await certificateShown(ctx, connect.certificate)
  if (certificate === undefined || certificate.profile !== 'device-tls' || certificate.device === null)
    throw new Problem('unauthenticated', 'a certificate that was not issued here for a device', { reason: 'certificate.unknown' })
  // From here on the peer is that device, by its TLS key: what it is refused for goes on its record.
  known.device = certificate.device
  if (certificate.device !== claimed.data)
    throw new Problem('forbidden', `the certificate of ${certificate.device} for ${claimed.data}`, { reason: 'connect.other-device' })
  mustBeInForce(ctx, certificate)
  const device = await ctx.store.get('device', claimed.data)
  if (!hasIdentity(device)) throw new Problem('forbidden', `device ${claimed.data} is ${device?.state ?? 'unknown'}`, { reason: 'device.not-enrolled' })
  const batch = await ctx.store.get('batch', device.batch)
  if (batch?.standing !== undefined) throw new Problem('forbidden', `batch ${batch.id} is ${batch.standing.state}`, { reason: `batch.${batch.standing.state}` })
  if (certificate.id !== device.tlsSerial && certificate.id !== device.previousTlsSerial)
    throw new Problem('forbidden', `certificate ${certificate.id} was replaced`, { reason: 'certificate.replaced' })
  const ldevid = await ctx.store.get('certificate', device.ldevidSerial)
  if (ldevid !== undefined) caMustCount(ctx, ldevid)
  const { connectionProof } = await policyOf(ctx, device.id)
  if (connect.password === undefined && connectionProof) throw new Problem('unauthenticated', 'no connection proof', { reason: 'connect.no-proof' })
  if (connect.password !== undefined) {
    const proof = connectProof(ctx.tenant, device.id, connect.certificate, connect.exporter)
    if (!verifySignature(device.keys.ldevidSpki, proof, signature(connect.password)))
      throw new Problem('unauthenticated', 'the connection proof does not verify', { reason: 'connect.proof' })
  }
  // A quarantined device may hold its newest certificate in memory only, since its keys do not open under such firmware: the one on its disk stays good.
  const isNew = device.previousTlsSerial !== null && device.state === 'enrolled'
  if (certificate.id === device.tlsSerial && (isNew || (device.recovery?.attempts ?? 0) > 0)) await retirePrevious(ctx, device.id, connect)
  return { device, certificate }
}

/** Where it may hear what many are sent, beside its own topic. */
const topicsOf = async (ctx: Context, device: IdentifiedDevice): Promise<readonly string[]> =>
  device.state === 'quarantined'
    ? []
    : (await findAll(ctx.store, 'member', { where: { device: device.id } })).flatMap(({ group, seat }) =>
        seat === undefined ? [] : [groupTopic(group, seat.shard)],
      )

/** The new TLS certificate is in use: the one before it stops now, and what it was issued for is over. */
const retirePrevious = async (ctx: Context, id: DeviceId, connect: Connect): Promise<void> => {
  await perform(
    ctx,
    { caller: { kind: 'device', id, from: connect.from }, action: 'device.connect', subject: id, detail: 'new TLS certificate in use' },
    async (tx) => {
      const device = await ctx.store.get('device', id)
      if (!hasIdentity(device)) return
      const previousTlsSerial = device.state === 'enrolled' ? null : device.previousTlsSerial
      const next = { ...device, previousTlsSerial, ...(device.recovery === undefined ? {} : { recovery: recovered(device.recovery) }) }
      await supersede(ctx, tx, leavingOf(device, next))
      tx.update('device', next)
    },
  )
  // A crash here: both certificates were valid until now, only the new one is from now on.
  ctx.step('connect.certificate')
}

/**
 * Decides on one CONNECT: which device this connection is, `null` for a peer that wants to enrol. The refusal carries the public code; the reason is audited
 * (bounded for strangers, on the device's record for a peer whose certificate is ours).
 */
export const admitConnection = async (ctx: Context, connect: Connect): Promise<Admitted | { readonly refused: string }> => {
  const caller: Caller = { kind: 'unidentified', id: connect.from, from: connect.from }
  const intent: Intent = { caller, action: 'device.connect', subject: connect.clientId.slice(0, 64) }
  const known: { device: DeviceId | null } = { device: null }
  try {
    if (EnrolmentId.safeParse(connect.clientId).success) {
      if (connect.username !== undefined || connect.password !== undefined)
        throw new Problem('unauthenticated', 'credentials without an identity', { reason: 'connect.credentials' })
      return { device: null, certificate: null }
    }
    const { device, certificate } = await proven(ctx, connect, known)
    return { device: device.id, certificate: { issuer: issuerKeyOf(certificate), notAfter: certificate.notAfter }, topics: await topicsOf(ctx, device) }
  } catch (thrown) {
    const problem = toProblem(thrown)
    if (problem.code === 'internal') ctx.log(`connect of ${connect.clientId.slice(0, 64)}: ${problem.message.slice(0, 1000)}`)
    if (known.device === null) await refuse(ctx, intent, problem)
    else await refuseKnown(ctx, known.device, intent, problem).catch(() => ctx.refusals.count(intent, problem, ctx.now()))
    return { refused: problem.code }
  }
}
