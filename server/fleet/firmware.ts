import { maxApprovals } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { firmwareDigest, signerPublic } from '@fleetkey/tpm2/firmware.ts'
import { parsePublic, pointOf } from '@fleetkey/tpm2/structures.ts'
import { inTpm, isMeasured, type DeviceKeys, type IdentifiedDevice, type Release, type TpmKeys } from './device.ts'

/** A release that keys under firmware may work with, and PolicyPCR of it over the PCRs that quotes cover. */
export interface Approvable {
  readonly release: string
  readonly number: number
  readonly policy: Uint8Array
}

/**
 * Which of a model's releases are approved, newest first, at most as many as one message holds. A release without a reference value for one of the PCRs can be
 * neither appraised nor approved; withdrawn and debug firmware never is, whatever a group's policy does about devices that run it. Pure.
 */
export const approvable = (releases: readonly Release[], pcrs: readonly number[]): readonly Approvable[] =>
  releases
    .filter(({ debug, withdrawn }) => !debug && withdrawn === null)
    .toSorted((one, other) => other.number - one.number || (one.id < other.id ? -1 : 1))
    .flatMap(({ id, number, pcrs: values }) => {
      const known = new Map(pcrs.flatMap((pcr) => (values[pcr] === undefined ? [] : [[pcr, new Uint8Array(Buffer.from(values[pcr], 'hex'))] as const])))
      return known.size === new Set(pcrs).size ? [{ release: id, number, policy: firmwareDigest(pcrs, known) }] : []
    })
    .slice(0, maxApprovals)

/** The point (65 bytes, uncompressed) that keys are wrapped to for this device; null: it has no recipient key. */
export const recipientPoint = (keys: DeviceKeys): Uint8Array | null => (inTpm(keys) ? pointOf(keys.recipient) : (keys.recipientSpki?.subarray(-65) ?? null))

/** DER SubjectPublicKeyInfo of a P-256 key with an uncompressed point: what stands before the point. */
const spkiPrefix = Buffer.from('3059301306072a8648ce3d020106082a8648ce3d03010703420004', 'hex')

/** TPMT_PUBLIC of a P-256 key as TPMs take it to verify approvals. `spki`: DER SubjectPublicKeyInfo. Throws Problem('unsupported'). */
export const approver = (spki: Uint8Array): Uint8Array => {
  if (spki.length !== spkiPrefix.length + 64 || !sameBytes(spki.subarray(0, spkiPrefix.length), spkiPrefix))
    throw new Problem('unsupported', 'approvals are signed by P-256 keys', { reason: 'firmware.signer' })
  return signerPublic(spki.subarray(spkiPrefix.length, spkiPrefix.length + 32), spki.subarray(spkiPrefix.length + 32))
}

/** The policy that a device's recipient key is under, and what is delivered to it with it. */
export const recipientPolicy = (keys: TpmKeys): Uint8Array => parsePublic(keys.recipient).authPolicy

/** Whether a device with a TPM has a recipient key that is not under the policy of now: after a withdrawal nothing more is wrapped to it. */
export const isOutdated = (device: IdentifiedDevice, authPolicy: Uint8Array): boolean =>
  isMeasured(device) && !sameBytes(recipientPolicy(device.keys), authPolicy)
