import { z } from 'zod'
import type { Certificate } from './certificate.ts'

const day = 86_400_000

/** Milliseconds that a certificate which another one has replaced stays on record after its end; null: for good. */
export type Retention = number | null

/**
 * What has run out opens nothing: it is on record for those who look back. The least is as long as a revocation list may be relied on (flows/status-lists.ts), so
 * that whatever others hold of a certificate, a hold that was taken back say, is over before its row is.
 */
export const leastRetention = 7 * day
export const defaultRetention = 30 * day

/** What a configuration may say about it. */
export const RetentionSettings = z.strictObject({
  superseded: z
    .string()
    .regex(/^(?:[1-9]\d{0,4}d|forever)$/, 'neither a number of days such as 30d nor forever')
    .transform((text): Retention => (text === 'forever' ? null : Number(text.slice(0, -1)) * day))
    .refine((time) => time === null || time >= leastRetention, `less than ${leastRetention / day}d`)
    .optional(),
})
export type RetentionSettings = z.infer<typeof RetentionSettings>

/**
 * Whether a certificate that has run out is needed no more. Only TLS certificates of devices that have another one: they are many, and nothing refers to them.
 * Kept are identities, whatever was ever revoked or is on hold (its key is refused for good), and what was in force when its CA was revoked, from `caRevokedAt` on:
 * the blast radius of that CA counts its device.
 */
export const isDispensable = (
  certificate: Pick<Certificate, 'profile' | 'status' | 'replacedAt' | 'notAfter'>,
  of: { readonly retention: number; readonly now: number; readonly caRevokedAt: number | undefined },
): boolean => {
  const { profile, status, replacedAt, notAfter } = certificate
  if (profile !== 'device-tls' || status !== 'valid' || replacedAt === undefined) return false
  if (of.caRevokedAt !== undefined && notAfter > of.caRevokedAt) return false
  return notAfter + of.retention < of.now
}
