import { createPublicKey, verify, type KeyObject } from 'node:crypto'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { fromPem } from '@fleetkey/protocol/x509/pem.ts'
import { importSpki } from '@fleetkey/protocol/x509/public-key.ts'
import { reasonIn, type RevocationReason } from '@fleetkey/protocol/x509/reasons.ts'
import type { Caller } from '../access/caller.ts'
import type { Batch, Station } from '../fleet/device.ts'
import type { Context } from './context.ts'
import { callerName, perform } from './perform.ts'
import { findAll } from './rows.ts'

const namePattern = /^[a-z0-9][a-z0-9-]{0,63}$/

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
    if (!namePattern.test(input.id)) throw new Problem('malformed', `station name ${JSON.stringify(input.id.slice(0, 100))}`)
    const spki = parsePublicKey(input.publicKey)
    if ((await ctx.store.get('station', input.id)) !== undefined) throw new Problem('conflict', `station ${input.id} exists`)
    const twin = (await findAll(ctx.store, 'station')).find((known) => known.revoked !== undefined && Buffer.compare(known.spki, spki) === 0)
    if (twin !== undefined) throw new Problem('forbidden', `this is the key of station ${twin.id}, which is revoked`, { reason: 'station.revoked' })
    tx.insert('station', { id: input.id, spki, addedAt: ctx.now() })
  })
  ctx.step('station.add')
}

/** From now on nothing signed by this station is imported. What was imported stays. */
export const removeStation = async (ctx: Context, caller: Caller, id: string): Promise<void> => {
  await perform(ctx, { caller, action: 'station.remove', subject: id }, async (tx) => {
    const station = await ctx.store.get('station', id)
    if (station === undefined) throw new Problem('not-found', `no station ${id}`)
    if (station.revoked !== undefined) throw new Problem('conflict', `station ${id} is revoked: its record keeps its key out`)
    tx.remove('station', station)
  })
  ctx.step('station.remove')
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
 * Revokes a station for good: nothing it signed is imported from now on, and its key is not admitted again under another name. What it signed before stays as
 * it is and is named, for somebody to decide about: `orderBatch`, `withdrawRelease`. Repeated it changes nothing.
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
  const already = await perform(ctx, { caller, action: 'station.revoke', subject: id, detail: reason }, async (tx) => {
    const station = await ctx.store.get('station', id)
    if (station === undefined) throw new Problem('not-found', `no station ${id}`)
    if (station.revoked === undefined) tx.update('station', { ...station, revoked: { at: ctx.now(), by: callerName(caller), reason, code } })
    tx.note(station.revoked === undefined ? `${code}; it signed ${signed.batches.length} batches, ${signed.releases.length} releases` : 'revoked before')
    return station.revoked !== undefined
  })
  // A crash here: it is revoked; nothing else follows from it by itself.
  ctx.step('station.revoke')
  return { already, ...signed }
}

/** Imports nothing more that a station signed until it is reinstated; what it signed before stays as it is and is named. Repeated it changes nothing. */
export const suspendStation = async (ctx: Context, caller: Caller, id: string, why: string): Promise<SignedByStation & { readonly already: boolean }> => {
  const reason = why.slice(0, 200)
  const signed = await signedBy(ctx, id)
  const already = await perform(ctx, { caller, action: 'station.suspend', subject: id, detail: reason }, async (tx) => {
    const station = await needStation(ctx, id)
    if (station.suspended === undefined) tx.update('station', { ...station, suspended: { at: ctx.now(), by: callerName(caller), reason } })
    else tx.note('suspended before')
    return station.suspended !== undefined
  })
  // A crash here: it is suspended; nothing else follows from it by itself.
  ctx.step('station.suspend')
  return { already, ...signed }
}

/** Ends that. Throws Problem('conflict') for a station that is revoked. */
export const reinstateStation = async (ctx: Context, caller: Caller, id: string): Promise<{ readonly already: boolean }> => {
  const already = await perform(ctx, { caller, action: 'station.reinstate', subject: id }, async (tx) => {
    const { suspended, ...station } = await needStation(ctx, id)
    if (suspended !== undefined) tx.update('station', station)
    return suspended === undefined
  })
  ctx.step('station.reinstate')
  return { already }
}

/** One that can still be suspended or reinstated. */
const needStation = async (ctx: Context, id: string): Promise<Station> => {
  const station = await ctx.store.get('station', id)
  if (station === undefined) throw new Problem('not-found', `no station ${id}`)
  if (station.revoked !== undefined) throw new Problem('conflict', `station ${id} is revoked: that is for good`)
  return station
}

/** A detached signature over exactly these bytes (ECDSA P-256, SHA-256, DER) by a station that is registered. Throws Problem('forbidden'). */
export const stationSigned = async (ctx: Context, signed: Signed): Promise<Station> => {
  const station = await ctx.store.get('station', signed.station)
  if (station === undefined) throw new Problem('forbidden', `no station ${signed.station.slice(0, 100)}`, { reason: 'station.unknown' })
  if (station.revoked !== undefined)
    throw new Problem('forbidden', `station ${station.id} is revoked: ${station.revoked.reason}`, { reason: 'station.revoked' })
  if (station.suspended !== undefined)
    throw new Problem('forbidden', `station ${station.id} is suspended: ${station.suspended.reason}`, { reason: 'station.suspended' })
  const key = createPublicKey({ key: Buffer.from(station.spki), format: 'der', type: 'spki' })
  if (signed.signature.length > 80 || !verify('sha256', signed.content, key, signed.signature))
    throw new Problem('forbidden', `not signed by station ${station.id}`, { reason: 'station.signature' })
  return station
}

/** What a factory hands over: the exact bytes, its detached signature, the name it signs under. */
export interface Signed {
  readonly content: Uint8Array
  readonly signature: Uint8Array
  readonly station: string
}
