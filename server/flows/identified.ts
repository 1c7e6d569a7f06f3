import type { Hello } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Claims } from '../attestation/claims.ts'
import { hasIdentity, type Device, type DeviceKeys, type EnrolledDevice, type IdentifiedDevice, type VerdictRecord } from '../fleet/device.ts'
import type { Recovery } from '../fleet/recovery.ts'
import { recipientPoint } from '../fleet/firmware.ts'

/** Whether what is wrapped for the one opens with the other. */
export const sameRecipient = (one: DeviceKeys, other: DeviceKeys): boolean => {
  const [left, right] = [recipientPoint(one), recipientPoint(other)]
  return left === null || right === null ? left === right : Buffer.compare(left, right) === 0
}

/** The keys that an enrolment has proven, as the record keeps them. */
export const keysOf = (claims: Claims, { presented }: Hello): DeviceKeys => {
  const { hardware, ldevidSpki } = claims
  if (claims.method !== 'tpm2') return { hardware, recipientSpki: claims.recipientSpki, ldevidSpki }
  if (presented.method !== 'tpm2') throw new Problem('internal', 'claims of another method than the hello')
  const { ak, ldevid } = presented
  return { ekHash: hardware, ak, srk: claims.srkPublic, ldevid, recipient: claims.recipientPublic, ldevidSpki }
}

/** What a device is admitted with. `ldevid`, `tls`: serials (hex) of its certificates. */
export interface Admitted {
  readonly keys: DeviceKeys
  readonly agent: string
  readonly claims: Claims
  readonly verdict: VerdictRecord
  readonly ldevid: string
  readonly tls: string
  /** What this costs; that of before unless told. */
  readonly recovery?: Recovery | undefined
}

/** The record with its new keys and certificates; what is known of its firmware and state is that of before. */
export const identified = (now: number, row: Device, { keys, agent, claims, verdict, ldevid, tls, recovery }: Admitted): IdentifiedDevice => {
  const { id, version, serial, model, batch, registeredAt } = row
  const before = hasIdentity(row) ? row : undefined
  const recoveries = recovery ?? before?.recovery
  const resetCount = claims.method === 'tpm2' ? claims.resetCount : 0
  const device: EnrolledDevice = {
    id,
    version,
    serial,
    model,
    batch,
    registeredAt,
    lastRefusal: null,
    state: 'enrolled',
    keys,
    // Since then it could connect: proving itself anew continues an identity, and the trail of what it could read has no gap.
    enrolledAt: before?.enrolledAt ?? now,
    ldevidSerial: ldevid,
    tlsSerial: tls,
    // Older TLS certificates stop when the new one is first used (flows/connect.ts), so that lost answers strand nobody, however many: what was issued and never
    // used the device may never have had. What it was issued while quarantined it may have lost with its memory: the one before that is kept.
    previousTlsSerial: before?.previousTlsSerial ?? before?.tlsSerial ?? null,
    renewal: null,
    ...(recoveries === undefined ? {} : { recovery: recoveries }),
    resetCount,
    reportedResetCount: resetCount,
    release: before?.release ?? null,
    floor: before?.floor ?? 0,
    assurance: claims.assurance,
    endorsedBy: claims.endorsedBy,
    verdict,
    attestOrderedAt: null,
    ...(before?.trust === undefined ? {} : { trust: before.trust }),
    lastSeenAt: now,
    agent,
  }
  return before?.state === 'quarantined' ? { ...device, state: 'quarantined', quarantinedAt: before.quarantinedAt } : device
}
