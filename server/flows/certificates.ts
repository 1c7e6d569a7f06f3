import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { CrlReason } from '@fleetkey/protocol/x509/reasons.ts'
import type { Certificate } from '../ca/certificate.ts'
import type { Context } from './context.ts'
import type { Transaction } from './perform.ts'
import { findAll } from './rows.ts'

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
export const endCertificates = async (ctx: Context, tx: Transaction, device: DeviceId, ending: Ending): Promise<readonly Certificate[]> => {
  const at = ctx.now()
  const open = (await findAll(ctx.store, 'certificate', { where: { device } })).filter((certificate) => isOpen(certificate, ending, at))
  const ended = open.map((certificate) => changed(certificate, ending, at))
  for (const certificate of ended) tx.update('certificate', certificate)
  return ended
}
