import type { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'
import type { CrlReason } from '@fleetkey/protocol/x509/reasons.ts'
import { isHeld, type Recovery } from './recovery.ts'

/** One row of a factory's batch manifest: this hardware is this device. Immutable but by a second approver. */
export interface ManifestEntry {
  /**
   * The lookup key of enrolment: hex SHA-256 of the EK's TPMT_PUBLIC; `idevid/` and hex SHA-256 of the IDevID's SPKI; `serial/` and the serial of a board that has
   * neither, which only a token lets in.
   */
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
  /** A device that never enrolled may do so until then, milliseconds since 1970; null or absent: at any time. */
  readonly claimUntil?: number | null
  /** Ordered for the batch as a whole: none of its devices is admitted, whatever its own record says yet. */
  readonly standing?: Standing
}

/** An order against many at once: suspended until it is reinstated, or revoked for good. */
export interface Standing {
  readonly state: 'suspended' | 'revoked'
  readonly at: number
  readonly by: string
  readonly reason: string
  readonly code: CrlReason
}

/** Public key (SPKI, DER) of a factory that may sign batch manifests and releases' reference values. */
export interface Station {
  readonly id: string
  readonly version: number
  readonly spki: Uint8Array
  readonly addedAt: number
  /** From then on nothing signed by it counts; the record stays, so that its key never returns under another name. */
  readonly revoked?: Omit<Standing, 'state'>
  /** Until it is reinstated nothing signed by it is imported. */
  readonly suspended?: Omit<Standing, 'state' | 'code'>
  /** Serial of its newest certificate: from the first one on, what it signs is imported only while this one is in force. */
  readonly certificate?: string
  /** How many devices it may admit under that certificate, and how many it has; absent: any number. */
  readonly quota?: { readonly devices: number; readonly admitted: number }
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

/** The proven keys of one device, which messages and wraps are made for. */
export type DeviceKeys = TpmKeys | SoftwareKeys

/** Keys in a TPM: hash of the EK it is bound to, and the TPMT_PUBLIC of the others (TPM names and points follow from them: tpm2 structures). */
export interface TpmKeys {
  readonly ekHash: string
  readonly ak: Uint8Array
  readonly srk: Uint8Array
  readonly ldevid: Uint8Array
  readonly recipient: Uint8Array
  /** DER SubjectPublicKeyInfo of the LDevID key: the hot path verifies with it. */
  readonly ldevidSpki: Uint8Array
}

/**
 * Keys outside a TPM. `hardware`: the manifest's name of the IDevID key, or of the board; the others are DER SubjectPublicKeyInfo. Without a recipient key (a device
 * that enrolled over EST) nothing can be wrapped to it.
 */
export interface SoftwareKeys {
  readonly hardware: string
  readonly recipientSpki: Uint8Array | null
  readonly ldevidSpki: Uint8Array
}

export const inTpm = (keys: DeviceKeys): keys is TpmKeys => 'ak' in keys
/** Whether keys can be wrapped to it: it has a recipient key. */
export const canReceive = (keys: DeviceKeys): boolean => inTpm(keys) || keys.recipientSpki !== null
/** What the manifest knows the hardware by that these keys are bound to. */
export const hardwareOf = (keys: DeviceKeys): string => (inTpm(keys) ? keys.ekHash : keys.hardware)

export interface RegisteredDevice extends DeviceCommon {
  readonly state: 'registered'
}

/**
 * How far the hardware's own proof goes, from low to high: a single-use token, hardware that only a test CA vouches for, a factory certificate, a TPM that its
 * maker or the signed manifest vouches for.
 */
export const assuranceLevels = ['token', 'simulated', 'idevid', 'attested'] as const
export type Assurance = (typeof assuranceLevels)[number]

/** One proven fact that a verdict rests on, such as `pcr-4` = hex SHA-256 value, `reset-count` = `7`. */
export interface ClaimRecord {
  readonly name: string
  readonly value: string
}

/** The attestation result as it is kept (RFC 9334 §8.2). `reason` is stable and private; `release`: whose reference values matched. */
export interface VerdictRecord {
  readonly verdict: 'affirming' | 'warning' | 'contraindicated'
  readonly reason: string
  readonly detail: string
  readonly release: string | null
  readonly at: number
  readonly claims: readonly ClaimRecord[]
}

/** One renewal of the TLS certificate. `request`: id of the device's message, hex; the same request has the same certificate for answer. */
export interface Renewal {
  readonly request: string
  readonly serial: string
  /** Serial of a new certificate for the same LDevID key that came with it; null: the LDevID stayed. */
  readonly ldevid: string | null
  /** Hex SHA-256 of the new key. */
  readonly spkiHash: string
  readonly issuedAt: number
}

interface WithIdentity extends DeviceCommon {
  readonly keys: DeviceKeys
  readonly enrolledAt: number
  /** Serial (hex) of the current LDevID and TLS certificates; every older TLS certificate stops once `tlsSerial` was used. */
  readonly ldevidSerial: string
  readonly tlsSerial: string
  readonly previousTlsSerial: string | null
  /** The renewal that gave `tlsSerial`, if a renewal did. Under way while `previousTlsSerial` is there, over once the new certificate was used. */
  readonly renewal?: Renewal | null
  /** How often it had to prove itself anew although it had an identity; absent: never. */
  readonly recovery?: Recovery
  /** As last proven by a quote. */
  readonly resetCount: number
  /** As last reported: when it differs from what is proven, the device has booted since and no key is released before it attests. */
  readonly reportedResetCount: number
  /** The release it ran when it was last accepted; null when policy let an unknown one pass. */
  readonly release: string | null
  /** Highest number of a release it was ever accepted with: nothing below it is accepted again. */
  readonly floor: number
  readonly assurance: Assurance
  readonly verdict: VerdictRecord
  /** An operator wants it to attest; null once it has. */
  readonly attestOrderedAt: number | null
  /** Ids of the endorsements that vouch for its hardware, nearest first. */
  readonly endorsedBy?: readonly string[]
  /** The trust bundle that it has acknowledged; absent: none, it trusts what its configuration says. */
  readonly trust?: { readonly version: number; readonly at: number }
  readonly lastSeenAt: number
  readonly agent: string
}

export interface EnrolledDevice extends WithIdentity {
  readonly state: 'enrolled'
}

/** Its firmware is not acceptable: identity and connection stay, no keys. A good quote brings it back, nothing else does. */
export interface QuarantinedDevice extends WithIdentity {
  readonly state: 'quarantined'
  readonly quarantinedAt: number
}

/** Out of service for a while: no connection, no enrolment, no keys. Its memberships stay; reinstated it is again what it was. */
export interface SuspendedDevice extends DeviceCommon {
  readonly state: 'suspended'
  readonly suspendedAt: number
  readonly suspendedBy: string
  readonly reason: string
  /** Suspended with its batch: it comes back with it. */
  readonly withBatch: boolean
  readonly before: AdmissibleDevice
}

export interface RevokedDevice extends DeviceCommon {
  readonly state: 'revoked'
  readonly revokedAt: number
  readonly revokedBy: string
  readonly reason: string
  readonly code?: CrlReason
  /** When its identity began; null when it never had one. */
  readonly enrolledAt?: number | null
  readonly keys: DeviceKeys | null
}

export type Device = RegisteredDevice | EnrolledDevice | QuarantinedDevice | SuspendedDevice | RevokedDevice

/** A device that may connect, report and give evidence. */
export type IdentifiedDevice = EnrolledDevice | QuarantinedDevice
/** A device whose TPM measures its firmware, and holds its keys to it. */
export type MeasuredDevice = IdentifiedDevice & { readonly keys: TpmKeys }
export const isMeasured = <D extends IdentifiedDevice>(device: D): device is D & { readonly keys: TpmKeys } => inTpm(device.keys)
export const hasIdentity = (device: Device | undefined): device is IdentifiedDevice => device?.state === 'enrolled' || device?.state === 'quarantined'

/** The version of the trust bundle that a device has acknowledged; 0: none, it trusts what its configuration says. */
export const acknowledgedVersion = ({ trust }: IdentifiedDevice): number => trust?.version ?? 0
/** The same as text that sorts by it; null for a device without an identity, which trusts nobody. */
export const acknowledgedOf = (device: Device): string | null => (hasIdentity(device) ? versionText(acknowledgedVersion(device)) : null)
export const versionText = (version: number): string => String(version).padStart(10, '0')

/** `held` for a device whose recovery budget is spent; null for every other. */
export const heldOf = (device: Device): string | null => (hasIdentity(device) && isHeld(device.recovery) ? 'held' : null)

/** A device that may enrol. */
export type AdmissibleDevice = RegisteredDevice | IdentifiedDevice
export const isBarred = (device: Device): device is SuspendedDevice | RevokedDevice => device.state === 'suspended' || device.state === 'revoked'

export interface Group {
  readonly id: GroupId
  readonly version: number
  readonly createdAt: number
  readonly policy: GroupPolicy
  /** Its members are the devices that this asks for (query.ts); absent: those that were added. */
  readonly query?: string
  /** How its keys reach its members; absent parts are as by default. */
  readonly delivery?: {
    readonly delivery?: 'auto' | 'unicast' | 'broadcast'
    readonly broadcastFrom?: number
    readonly generationShare?: number
    readonly generationLife?: number
  }
}

/** Of several groups the strictest wins. */
export interface GroupPolicy {
  readonly connectionProof: boolean
  readonly rotateOnLeave: boolean
  /** A device that joins reads nothing that was protected before: the keys are rotated, and it gets the new epochs only. */
  readonly rotateOnJoin: boolean
  /** Members read epochs from before they joined. */
  readonly history: boolean
  /** Accepted releases by id; `any`: every imported one of the model. */
  readonly releases: 'any' | readonly string[]
  /** Anti-rollback floor of the group, besides each device's own. */
  readonly minimumRelease: number
  /** What becomes of a device on firmware that matches no release, a withdrawn one, a debug one. */
  readonly onUnknown: 'quarantine' | 'warn'
  readonly onWithdrawn: 'quarantine' | 'warn'
  readonly onDebug: 'quarantine' | 'warn'
  /** The kernel's list of measured files (Linux IMA): not asked for; needed, whole and proven; needed, and every file on the release's list. */
  readonly ima: 'ignored' | 'required' | 'listed'
  /** What becomes of a device with a file that its release does not list, or that changed while it was measured. */
  readonly onUnlisted: 'quarantine' | 'warn'
  /** Members below this level are not entitled to the group's keys. */
  readonly assurance: Assurance
  /** Seconds that a verdict counts for; then the device attests before a key is released to it. */
  readonly attestAge: number
  /** Rotates the keys that a device could read, without it, when it is quarantined. */
  readonly rotateOnQuarantine: boolean
}

/** `id` is `<group>/<device>`. */
export interface Member {
  readonly id: string
  readonly version: number
  readonly group: GroupId
  readonly device: DeviceId
  readonly joinedAt: number
  /** Per key the lowest epoch that it may read; a key that is not here: any. */
  readonly from?: Readonly<Record<string, number>>
  /** Its place, once the group is served by broadcast. */
  readonly seat?: { readonly shard: number; readonly generation: number; readonly slot: number }
}

/** Reference values of a firmware release, signed by a station: expected PCR values by prediction. */
export interface Release {
  readonly id: string
  readonly version: number
  readonly model: string
  readonly name: string
  readonly number: number
  readonly debug: boolean
  /** PCR index → hex SHA-256 value. */
  readonly pcrs: Readonly<Record<string, string>>
  /** How many digests of files that may run under it are kept beside it; absent: its maker listed none. */
  readonly files?: number
  readonly importedAt: number
  /** The station that signed it; unknown for what was imported before this was kept. */
  readonly station?: string
  readonly withdrawn: { readonly at: number; readonly reason: string } | null
}

/** A CA that vouches for hardware. `test` marks a simulator's CA: admitted only by an audited act and shown in every report. */
export interface Endorsement {
  readonly id: string
  readonly version: number
  readonly certificate: Uint8Array
  readonly subject: string
  /** What it vouches for; EKs unless told. */
  readonly purpose?: 'idevid'
  readonly test: boolean
  /** A CA below another endorsement: it vouches only through that one. */
  readonly intermediate?: boolean
  /** Newest CRL of this CA (DER), checked against it. */
  readonly crl?: Uint8Array
  readonly importedAt: number
}
