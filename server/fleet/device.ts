import type { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'

/** One row of a factory's batch manifest: this hardware (EK) is this device. Immutable but by a second approver. */
export interface ManifestEntry {
  /** Hex SHA-256 of the EK's TPMT_PUBLIC: the lookup key of enrolment. */
  readonly id: string
  readonly version: number
  readonly device: DeviceId
  readonly serial: string
  readonly model: string
  readonly batch: string
  readonly importedAt: number
}

export interface Batch {
  readonly id: string
  readonly version: number
  readonly station: string
  readonly rows: number
  readonly manifestHash: string
  readonly importedAt: number
  readonly importedBy: string
}

/** Public key (SPKI, DER) of a factory that may sign batch manifests and releases' reference values. */
export interface Station {
  readonly id: string
  readonly version: number
  readonly spki: Uint8Array
  readonly addedAt: number
}

interface DeviceCommon {
  readonly id: DeviceId
  readonly version: number
  readonly serial: string
  readonly model: string
  readonly batch: string
  readonly registeredAt: number
  /** The last private reason why this device was refused, for `device show`. */
  readonly lastRefusal: { readonly at: number; readonly code: string; readonly reason: string } | null
}

/**
 * The proven keys of one device: hash of the EK it is bound to, and the TPMT_PUBLIC of AK, SRK, LDevID and recipient key
 * (TPM names and points follow from them: tpm2 structures), which messages and wraps are made for.
 */
export interface DeviceKeys {
  readonly ekHash: string
  readonly ak: Uint8Array
  readonly srk: Uint8Array
  readonly ldevid: Uint8Array
  readonly recipient: Uint8Array
  /** DER SubjectPublicKeyInfo of the LDevID key: the hot path verifies with it. */
  readonly ldevidSpki: Uint8Array
}

export interface RegisteredDevice extends DeviceCommon {
  readonly state: 'registered'
}

export interface EnrolledDevice extends DeviceCommon {
  readonly state: 'enrolled'
  readonly keys: DeviceKeys
  readonly enrolledAt: number
  /** Serial (hex) of the current LDevID and TLS certificates; every older TLS certificate stops once `tlsSerial` was used. */
  readonly ldevidSerial: string
  readonly tlsSerial: string
  readonly previousTlsSerial: string | null
  readonly resetCount: number
  readonly release: string
  readonly assurance: 'simulated' | 'attested'
  readonly lastSeenAt: number
  /** Highest report sequence seen in `lastSession`; a replayed report is refused. */
  readonly agent: string
}

export interface RevokedDevice extends DeviceCommon {
  readonly state: 'revoked'
  readonly revokedAt: number
  readonly revokedBy: string
  readonly reason: string
  readonly keys: DeviceKeys | null
}

export type Device = RegisteredDevice | EnrolledDevice | RevokedDevice

export interface Group {
  readonly id: GroupId
  readonly version: number
  readonly createdAt: number
  readonly policy: GroupPolicy
}

/** Of several groups the strictest wins. */
export interface GroupPolicy {
  readonly connectionProof: boolean
  readonly rotateOnLeave: boolean
}

/** `id` is `<group>/<device>`. */
export interface Member {
  readonly id: string
  readonly version: number
  readonly group: GroupId
  readonly device: DeviceId
  readonly joinedAt: number
}

/** Reference values of a firmware release, signed by a station: expected PCR values by prediction. */
export interface Release {
  readonly id: string
  readonly version: number
  readonly model: string
  readonly name: string
  readonly number: number
  /** PCR index → hex SHA-256 value. */
  readonly pcrs: Readonly<Record<string, string>>
  readonly importedAt: number
}

/** A CA that vouches for EKs. `test` marks a simulator's CA: admitted only by an audited act and shown in every report. */
export interface Endorsement {
  readonly id: string
  readonly version: number
  readonly certificate: Uint8Array
  readonly subject: string
  readonly test: boolean
  readonly importedAt: number
}
