import { createPublicKey, verify, type KeyObject } from 'node:crypto'
import { isName } from '@fleetkey/protocol/ids.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { fromPem } from '@fleetkey/protocol/x509/pem.ts'
import { importSpki } from '@fleetkey/protocol/x509/public-key.ts'
import { reasonIn, type RevocationReason } from '@fleetkey/protocol/x509/reasons.ts'
import { refuseRequest } from '@fleetkey/protocol/x509/request/reasons.ts'
import type { Caller } from '../access/caller.ts'
import type { Batch, Station } from '../fleet/device.ts'
import { endStationCertificates } from './certificates.ts'
import type { Context } from './context.ts'
import { sha256hex } from './message.ts'
import { callerName, perform, type Transaction } from './perform.ts'
import { findAll, findOne } from './rows.ts'
import { mustBeInForce } from './trust.ts'

const p256 = (key: KeyObject): boolean => key.asymmetricKeyType === 'ec' && key.asymmetricKeyDetails?.namedCurve === 'prime256v1'

/** A public key as PEM or base64 DER (SubjectPublicKeyInfo, RFC 5280 §4.1.2.7), at most 2,000 characters. Throws Problem('malformed') unless it is P-256. */
export const parsePublicKey = (text: string): Uint8Array => {
  if (text.length > 2000) throw new Problem('malformed', 'public key of more than 2,000 characters')
  const [der = new Uint8Array(0)] = text.includes('-----BEGIN PUBLIC KEY-----') ? fromPem('PUBLIC KEY', text) : [Buffer.from(text, 'base64')]
  const key = importSpki(der)
  if (!p256(key)) throw new Problem('malformed', 'not a P-256 key', { reason: 'key.curve' })
  return new Uint8Array(key.export({ format: 'der', type: 'spki' }))
}

/** Admits the key of a factory station: what it signs (batch manifests, reference values) counts from now on. `publicKey`: PEM or base64 DER. */
export const addStation = async (ctx: Context, caller: Caller, input: { readonly id: string; readonly publicKey: string }): Promise<void> => {
  await perform(ctx, { caller, action: 'station.add', subject: input.id }, async (tx) => {
    if (!isName(input.id)) throw new Problem('malformed', `station name ${JSON.stringify(input.id.slice(0, 100))}`)
    const spki = parsePublicKey(input.publicKey)
    if ((await ctx.store.get('station', input.id)) !== undefined) throw new Problem('conflict', `station ${input.id} exists`)
    const twin = (await findAll(ctx.store, 'station')).find((known) => known.revoked !== undefined && Buffer.compare(known.spki, spki) === 0)
    if (twin !== undefined) throw new Problem('forbidden', `this is the key of station ${twin.id}, which is revoked`, { reason: 'station.revoked' })
    const certified = await findOne(ctx.store, 'certificate', { spkiHash: sha256hex(spki) })
    if (certified !== undefined && certified.station !== input.id)
      refuseRequest('key.reused', `the key of ${certified.profile} ${certified.id} presented by station ${input.id}`)
    tx.insert('station', { id: input.id, spki, addedAt: ctx.now() })
  })
  ctx.step('station.add')
}

/** From now on nothing signed by this station is imported, and its certificates are revoked. What was imported stays. */
export const removeStation = async (ctx: Context, caller: Caller, id: string): Promise<void> => {
  const certificates = await perform(ctx, { caller, action: 'station.remove', subject: id }, async (tx) => {
    const station = await ctx.store.get('station', id)
    if (station === undefined) throw new Problem('not-found', `no station ${id}`)
    if (station.revoked !== undefined) throw new Problem('conflict', `station ${id} is revoked: its record keeps its key out`)
    tx.remove('station', station)
    return await endStationCertificates(ctx, tx, station, { to: 'revoked', why: 'station removed', code: 'cessationOfOperation' })
  })
  // A crash here, and after the next orders: durable; the lists are made from the rows at the next start.
  ctx.step('station.remove')
  ctx.certificatesChanged(certificates)
}

/** What a station has signed: batches, and releases by id. */
export interface SignedByStation {
  readonly batches: readonly Batch[]
  readonly releases: readonly string[]
}

/** Everything that was imported under a station's signature. */
export const signedBy = async (ctx: Context, id: string): Promise<SignedByStation> => {
  const [station, batches, releases] = await Promise.all([ctx.store.get('station', id), findAll(ctx.store, 'batch'), findAll(ctx.store, 'release')])
  if (station === undefined) throw new Problem('not-found', `no station ${id}`)
  return {
    batches: batches.filter((batch) => batch.station === id),
    releases: releases.filter((release) => release.station === id).map((release) => release.id),
  }
}

/**
 * Revokes a station for good, and its certificates: nothing it signed is imported from now on, and its key is not admitted again under another name. What it signed
 * before stays as it is and is named, for somebody to decide about: `orderBatch`, `withdrawRelease`. Repeated it changes nothing.
 */
export const revokeStation = async (
  ctx: Context,
  caller: Caller,
  id: string,
  why: string,
  code: RevocationReason = reasonIn(why),
): Promise<SignedByStation & { readonly already: boolean }> => {
  const reason = why.slice(0, 200)
  const signed = await signedBy(ctx, id)
  const certificates = await perform(ctx, { caller, action: 'station.revoke', subject: id, detail: reason }, async (tx) => {
    const station = await ctx.store.get('station', id)
    if (station === undefined) throw new Problem('not-found', `no station ${id}`)
    if (station.revoked !== undefined) {
      tx.note('revoked before')
      return undefined
    }
    tx.update('station', { ...station, revoked: { at: ctx.now(), by: callerName(caller), reason, code } })
    const ended = await endStationCertificates(ctx, tx, station, { to: 'revoked', why: 'station revoked', code })
    tx.note(`${code}; ${ended.length} certificates; it signed ${signed.batches.length} batches, ${signed.releases.length} releases`)
    return ended
  })
  // A crash here: it is revoked; the lists are made from the rows at the next start.
  ctx.step('station.revoke')
  ctx.certificatesChanged(certificates ?? [])
  return { already: certificates === undefined, ...signed }
}

/** Imports nothing more that a station signed until it is reinstated, its certificates are on hold; what it signed before stays as it is and is named. Repeated it changes nothing. */
export const suspendStation = async (ctx: Context, caller: Caller, id: string, why: string): Promise<SignedByStation & { readonly already: boolean }> => {
  const reason = why.slice(0, 200)
  const signed = await signedBy(ctx, id)
  const certificates = await perform(ctx, { caller, action: 'station.suspend', subject: id, detail: reason }, async (tx) => {
    const station = await needStation(ctx, id)
    if (station.suspended !== undefined) {
      tx.note('suspended before')
      return undefined
    }
    tx.update('station', { ...station, suspended: { at: ctx.now(), by: callerName(caller), reason } })
    return await endStationCertificates(ctx, tx, station, { to: 'held', why: 'station suspended', code: 'certificateHold' })
  })
  // A crash here: it is suspended; the lists are made from the rows at the next start.
  ctx.step('station.suspend')
  ctx.certificatesChanged(certificates ?? [])
  return { already: certificates === undefined, ...signed }
}

/** Ends that. Throws Problem('conflict') for a station that is revoked. */
export const reinstateStation = async (ctx: Context, caller: Caller, id: string): Promise<{ readonly already: boolean }> => {
  const certificates = await perform(ctx, { caller, action: 'station.reinstate', subject: id }, async (tx) => {
    const { suspended, ...station } = await needStation(ctx, id)
    if (suspended === undefined) return undefined
    tx.update('station', station)
    return await endStationCertificates(ctx, tx, station, { to: 'valid' })
  })
  ctx.step('station.reinstate')
  ctx.certificatesChanged(certificates ?? [])
  return { already: certificates === undefined }
}

/** One that can still be suspended or reinstated. */
const needStation = async (ctx: Context, id: string): Promise<Station> => {
  const station = await ctx.store.get('station', id)
  if (station === undefined) throw new Problem('not-found', `no station ${id}`)
  if (station.revoked !== undefined) throw new Problem('conflict', `station ${id} is revoked: that is for good`)
  return station
}

/** Refuses a station that is revoked or suspended: nothing of it counts. */
export const mustCount = (station: Station): void => {
  if (station.revoked !== undefined)
    throw new Problem('forbidden', `station ${station.id} is revoked: ${station.revoked.reason}`, { reason: 'station.revoked' })
  if (station.suspended !== undefined)
    throw new Problem('forbidden', `station ${station.id} is suspended: ${station.suspended.reason}`, { reason: 'station.suspended' })
}

/**
 * Once a station has had a certificate its signature counts while the newest one does, by the row that this server has of it: neither revoked nor on hold, of a CA
 * that counts, and not over. A signature has no time of its own: what was signed before is imported while it lasts, and again once the key has a new one.
 */
export const certificateMustCount = async (ctx: Context, { id, certificate }: Station): Promise<void> => {
  if (certificate === undefined) return
  const row = await ctx.store.get('certificate', certificate)
  if (row === undefined) throw new Problem('internal', `no record of certificate ${certificate} of station ${id}`)
  try {
    mustBeInForce(ctx, row)
  } catch (thrown) {
    const { code, message, reason = code } = toProblem(thrown)
    const remedy = `let its key be certified again (fleetkey station certify ${id} --csr FILE)`
    throw new Problem(code === 'expired' ? code : 'forbidden', `station ${id}: ${message}: ${remedy}`, {
      reason: `station.${reason.replace('.', '-')}`,
      cause: thrown,
    })
  }
}

/**
 * A detached signature over exactly these bytes (ECDSA P-256, SHA-256, DER) by a station that is registered and, where it has a certificate, certified. Throws
 * Problem('forbidden'), or 'expired' for a certificate that is over.
 */
export const stationSigned = async (ctx: Context, signed: Signed): Promise<Station> => {
  const station = await ctx.store.get('station', signed.station)
  if (station === undefined) throw new Problem('forbidden', `no station ${signed.station.slice(0, 100)}`, { reason: 'station.unknown' })
  mustCount(station)
  const key = createPublicKey({ key: Buffer.from(station.spki), format: 'der', type: 'spki' })
  if (signed.signature.length > 80 || !verify('sha256', signed.content, key, signed.signature))
    throw new Problem('forbidden', `not signed by station ${station.id}`, { reason: 'station.signature' })
  await certificateMustCount(ctx, station)
  return station
}

/** Adds to a commit that a station admits so many devices more. Throws Problem('forbidden') when its certificate lets it admit fewer. */
export const admitDevices = (tx: Transaction, station: Station, count: number): void => {
  const { id, quota } = station
  if (quota === undefined) return
  const left = quota.devices - quota.admitted
  if (count > left)
    throw new Problem(
      'forbidden',
      `station ${id} may admit ${quota.devices} devices under its certificate: ${left} are left, not ${count} (fleetkey station certify ${id} --csr FILE --devices N)`,
      {
        reason: 'station.quota',
      },
    )
  // Of two batches at the same time each sees what the other has left.
  tx.update('station', { ...station, quota: { ...quota, admitted: quota.admitted + count } })
}

/** What a factory hands over: the exact bytes, its detached signature, the name it signs under. */
export interface Signed {
  readonly content: Uint8Array
  readonly signature: Uint8Array
  readonly station: string
}
