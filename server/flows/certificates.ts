import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { claimedSerial } from '@fleetkey/protocol/x509/certificate.ts'
import type { CrlReason } from '@fleetkey/protocol/x509/reasons.ts'
import type { Certificate } from '../ca/certificate.ts'
import { hasIdentity, type Device, type IdentifiedDevice, type Station } from '../fleet/device.ts'
import type { Base, Context, IndexEntry } from './context.ts'
import { sha256hex } from './message.ts'
import type { Transaction } from './perform.ts'
import { findAll } from './rows.ts'

/** The row of a certificate that somebody shows; undefined for one that was not issued here: only the very bytes that were count. */
export const certificateShown = async (ctx: Base, der: Uint8Array): Promise<Certificate | undefined> => {
  const serial = claimedSerial(der)
  const row = serial === undefined ? undefined : await ctx.store.get('certificate', serial)
  return row !== undefined && Buffer.compare(row.der, der) === 0 ? row : undefined
}

/** What an order makes of certificates. */
export type Ending = { readonly to: 'held' | 'revoked'; readonly why: string; readonly code: CrlReason } | { readonly to: 'valid' }

const changed = (certificate: Certificate, ending: Ending, at: number): Certificate => {
  const { code: _, ...rest } = certificate
  if (ending.to === 'valid') return { ...rest, status: 'valid', revokedAt: null, reason: null }
  return { ...rest, status: ending.to, revokedAt: at, reason: ending.why, code: ending.code }
}

/** What is revoked stays so, for the reason and from the time that were given first. */
const isOpen = ({ status, notAfter }: Certificate, ending: Ending, at: number): boolean =>
  notAfter >= at && (ending.to === 'valid' ? status === 'held' : ending.to === 'held' ? status === 'valid' : status !== 'revoked')

/**
 * Adds to a commit what becomes of a device's certificates, those that have run out aside: they are refused for that. The rows as they will be; give them to
 * `ctx.certificatesChanged` once that is durable.
 */
export const endCertificates = async (ctx: Context, tx: Transaction, device: DeviceId, ending: Ending): Promise<readonly Certificate[]> =>
  end(tx, await findAll(ctx.store, 'certificate', { where: { device } }), ending, ctx.now())

/** The same of a station's certificates. */
export const endStationCertificates = async (ctx: Context, tx: Transaction, station: Station, ending: Ending): Promise<readonly Certificate[]> =>
  end(tx, await stationCertificates(ctx, station), ending, ctx.now())

const end = (tx: Transaction, certificates: readonly Certificate[], ending: Ending, at: number): readonly Certificate[] => {
  const ended = certificates.filter((certificate) => isOpen(certificate, ending, at)).map((certificate) => changed(certificate, ending, at))
  for (const certificate of ended) tx.update('certificate', certificate)
  return ended
}

const pageSize = 1000

/** Every certificate that a station has had for its key, the newest first: that one has the hash of the key, older ones have it with their serial behind. */
export const stationCertificates = async (ctx: Base, { id, spki, certificate }: Station): Promise<readonly Certificate[]> => {
  if (certificate === undefined) return []
  const hash = sha256hex(spki)
  const found: Certificate[] = []
  for (let after: IndexEntry | undefined; ;) {
    const page = await ctx.store.scan('certificate', 'spkiHash', { from: hash, to: `${hash}/~`, limit: pageSize, ...(after === undefined ? {} : { after }) })
    const rows = await Promise.all(page.map(async (entry) => await ctx.store.get('certificate', entry.id)))
    found.push(...rows.filter((row) => row?.station === id).filter((row) => row !== undefined))
    after = page.at(-1)
    if (page.length < pageSize) return found
  }
}

/** Serials of the certificates that a device has no more once its record is `next`. */
export const leavingOf = (before: Device, next: IdentifiedDevice): Set<string> => {
  const inUse = ({ ldevidSerial, tlsSerial, previousTlsSerial }: IdentifiedDevice): readonly string[] =>
    [ldevidSerial, tlsSerial, previousTlsSerial].filter((serial) => serial !== null)
  const kept = inUse(next)
  return new Set(hasIdentity(before) ? inUse(before).filter((serial) => !kept.includes(serial)) : [])
}

/** Adds to a commit that others have taken the place of these certificates. For those who look for them: what is accepted follows from the device's record. */
export const supersede = async (ctx: Base, tx: Transaction, leaving: ReadonlySet<string>): Promise<void> => {
  for (const serial of leaving) {
    const certificate = await ctx.store.get('certificate', serial)
    if (certificate !== undefined) tx.update('certificate', { ...certificate, replacedAt: ctx.now() })
  }
}
