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

/** `id` is the serial, hex. Revocation is judged on this row on every CONNECT. */
export interface Certificate {
  readonly id: string
  readonly version: number
  readonly profile: ProfileName
  readonly device: DeviceId | null
  /** Name of the KMS key of the CA that signed it; absent in rows from before there was more than one: the first. */
  readonly issuer?: string
  readonly der: Uint8Array
  /** Hex SHA-256 of the DER, and of the SPKI. */
  readonly fingerprint: string
  readonly spkiHash: string
  readonly notBefore: number
  readonly notAfter: number
  /** `held`: revoked for the time being (certificateHold). */
  readonly status: 'valid' | 'held' | 'revoked'
  readonly revokedAt: number | null
  readonly reason: string | null
  /** What CRL and OCSP say of it; absent where it was revoked without one. */
  readonly code?: CrlReason
}
