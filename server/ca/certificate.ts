import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { CrlReason } from '@fleetkey/protocol/x509/reasons.ts'

export type ProfileName =
  | 'device-identity'
  | 'device-tls'
  | 'server-tls'
  | 'server-signing'
  | 'ocsp-responder'
  | 'issuing-ca'
  | 'root-ca'
  | 'cross-ca'
  | 'station'

/** Written and durable before the signature exists: whatever was signed can be revoked. `id` is the serial, hex. */
export interface Intent {
  readonly id: string
  readonly version: number
  readonly profile: ProfileName
  readonly subject: string
  readonly spki: Uint8Array
  readonly notBefore: number
  readonly notAfter: number
  readonly state: 'open' | 'issued' | 'abandoned'
  readonly createdAt: number
}

/** What became of an intent of which no certificate is on record; null when there is one: the usual case is in no index. */
export const unissuedOf = ({ state }: Pick<Intent, 'state'>): 'open' | 'abandoned' | null => (state === 'issued' ? null : state)

/** `id` is the serial, hex. Revocation is judged on this row on every CONNECT. */
export interface Certificate {
  readonly id: string
  readonly version: number
  readonly profile: ProfileName
  readonly device: DeviceId | null
  /** Whose station it is for; absent for everything else. */
  readonly station?: string
  /** Name of the KMS key of the CA that signed it; absent in rows from before there was more than one: the first. */
  readonly issuer?: string
  readonly der: Uint8Array
  /** Hex SHA-256 of the SPKI. */
  readonly spkiHash: string
  readonly notBefore: number
  readonly notAfter: number
  /** `held`: revoked for the time being (certificateHold). */
  readonly status: 'valid' | 'held' | 'revoked'
  readonly revokedAt: number | null
  readonly reason: string | null
  /** What CRL and OCSP say of it; absent where it was revoked without one. */
  readonly code?: CrlReason
  /** When its device came to have another one in its place; absent while it counts, and in rows from before this was kept. */
  readonly replacedAt?: number
}

/** What a certificate is not valid for; null while it is: the usual case is in no index. */
export const withdrawnOf = ({ status }: Pick<Certificate, 'status'>): 'held' | 'revoked' | null => (status === 'valid' ? null : status)

/** What a certificate is to whoever looks for it, its end aside. `superseded`: valid still, and its device has another one. */
export const standings = ['valid', 'superseded', 'held', 'revoked'] as const
export type Standing = (typeof standings)[number]
export const standingOf = ({ status, replacedAt }: Pick<Certificate, 'status' | 'replacedAt'>): Standing =>
  status === 'valid' && replacedAt !== undefined ? 'superseded' : status

/** What a certificate is at `now`, in one word. What is revoked stays so when it has run out; what is on hold or superseded is then just expired. */
export const certificateStates = ['valid', 'superseded', 'suspended', 'revoked', 'expired'] as const
export type CertificateState = (typeof certificateStates)[number]
export const stateOf = (certificate: Pick<Certificate, 'status' | 'replacedAt' | 'notAfter'>, now: number): CertificateState => {
  const standing = standingOf(certificate)
  if (standing === 'revoked') return 'revoked'
  if (certificate.notAfter < now) return 'expired'
  return standing === 'held' ? 'suspended' : standing
}

/** Name of the KMS key of the CA that signed it: rows from before there was more than one do not say. */
export const issuerKeyOf = ({ issuer, profile }: Pick<Certificate, 'issuer' | 'profile'>): string =>
  issuer ?? (profile === 'root-ca' || profile === 'issuing-ca' ? 'root-ca' : 'issuing-ca')

/** Where a certificate stands in the calendar: `valid/device-tls/issuing-ca/2027-01-31T12:00:00`, its end (UTC) last. Sorts by time within the rest. */
export const calendarOf = (certificate: Pick<Certificate, 'status' | 'replacedAt' | 'issuer' | 'profile' | 'notAfter'>): string =>
  [standingOf(certificate), certificate.profile, issuerKeyOf(certificate), secondOf(certificate.notAfter)].join('/')

/** Milliseconds since 1970 as the calendar has them: `2027-01-31T12:00:00`. Certificates end with whole seconds; what lies outside of four-digit years at its edge. */
export const secondOf = (at: number): string => new Date(Math.min(Math.max(at, 0), lastSecond)).toISOString().slice(0, 19)
const lastSecond = Date.UTC(9999, 11, 31, 23, 59, 59)
