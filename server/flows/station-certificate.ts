import { Problem } from '@fleetkey/protocol/problem.ts'
import { refuseRequest } from '@fleetkey/protocol/x509/request/reasons.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { requestOfFile } from '@fleetkey/protocol/x509/request/structure.ts'
import { authorise } from '../access/authorise.ts'
import type { Caller } from '../access/caller.ts'
import { standingOf, type Certificate } from '../ca/certificate.ts'
import { requestPolicyOf } from '../ca/profiles.ts'
import type { Station } from '../fleet/device.ts'
import { stationCertificates, supersede } from './certificates.ts'
import type { Context } from './context.ts'
import { claimSpki, prepareCertificates, recordIssued } from './issue.ts'
import { perform, type Intent } from './perform.ts'
import { auditedFor } from './refusal.ts'
import { mustCount } from './station.ts'

export interface StationRequest {
  readonly id: string
  /** A certification request, DER or PEM, by the key under which the station is known. */
  readonly csr: Uint8Array
  /** How many devices it may admit under this certificate; undefined: any number. */
  readonly devices?: number | undefined
}

const known = async (ctx: Context, id: string): Promise<Station> => {
  const station = await ctx.store.get('station', id)
  if (station === undefined) throw new Problem('not-found', `no station ${id}`)
  mustCount(station)
  return station
}

const same = (one: Uint8Array, other: Uint8Array): boolean => Buffer.compare(one, other) === 0

/**
 * Certifies the key of a station, or certifies it again: what the station signs counts from now on while this certificate is in force. Nothing is taken from the
 * request, which proves possession; its key has to be the one that was handed over when the station was added. Those before it are superseded: still good by
 * themselves, and what revokes the station revokes them too. Throws Problem: a reason of `requestReasons`; `forbidden` for a station that is suspended or revoked.
 * The certificate and its row.
 */
export const certifyStation = async (
  ctx: Context,
  caller: Caller,
  { id, csr, devices }: StationRequest,
): Promise<Pick<Certificate, 'id' | 'der' | 'notBefore' | 'notAfter'>> => {
  const intent: Intent = { caller, action: 'station.certify', subject: id }
  return await auditedFor(ctx, intent, { device: null }, async () => {
    authorise(caller, intent.action)
    const { spki } = await known(ctx, id)
    const judged = judgeRequest(requestOfFile(csr), requestPolicyOf(ctx.authority.profiles.station, { tenant: ctx.tenant, subject: id }))
    if (!same(judged.spki, spki)) refuseRequest('csr.station.other-key')
    const [issued] = await prepareCertificates(ctx, ctx.authority, intent, [{ profile: 'station', device: null, station: id, subject: id, spki }])
    if (issued === undefined) throw new Problem('internal', 'one certificate was ordered')
    await perform(ctx, intent, async (tx) => {
      const station = await known(ctx, id)
      // Removed, and added anew with another key meanwhile.
      if (!same(station.spki, spki)) throw new Problem('conflict', `station ${id} has another key now`)
      const leaving = new Set((await stationCertificates(ctx, station)).filter((row) => standingOf(row) === 'valid').map((row) => row.id))
      const renewed = leaving.size > 0
      await claimSpki(ctx, tx, issued, leaving)
      recordIssued(tx, issued)
      await supersede(ctx, tx, leaving)
      const { quota: _, ...rest } = station
      tx.update('station', { ...rest, certificate: issued.intent.id, ...(devices === undefined ? {} : { quota: { devices, admitted: 0 } }) })
      tx.note(`${renewed ? 'again: ' : ''}${issued.intent.id}, ${devices === undefined ? 'any number of devices' : `${devices} devices`}`)
    })
    // A crash here: it is certified and its operator does not know it; asked again, it has another certificate in the place of this one.
    ctx.step('station.certified')
    const { id: serial, notBefore, notAfter } = issued.intent
    return { id: serial, der: issued.der, notBefore, notAfter }
  })
}
