/** What the decision needs to know of a device. Times are milliseconds since 1970. */
export interface Attested {
  readonly state: 'enrolled' | 'quarantined'
  /** It has a TPM that can quote. */
  readonly quotes: boolean
  readonly resetCount: number
  readonly reportedResetCount: number
  readonly verdict: { readonly at: number }
  readonly attestOrderedAt: number | null
}

/** `withholds`: no key is released to this device before it has attested. */
export type Due =
  | { readonly due: false }
  | { readonly due: true; readonly because: 'quarantined' | 'boot' | 'stale' | 'firmware' | 'ima' | 'order' | 'ageing'; readonly withholds: boolean }

/** Asked this much before its verdict grows too old, a connected device never waits for its keys. */
const early = 0.8
/** A quarantined device may show that it is well again whenever it connects, and this often after that (milliseconds). */
const quarantinedEvery = 60_000

/** What a clock may be corrected by (milliseconds). */
const clockSlack = 60_000

/**
 * Whether a device has to attest, and whether its keys wait for that. Pure: the same device, policy, report and time give the same answer.
 * `policy.attestAge`: seconds; `outdated`: its recipient key is not under the firmware policy of now; `unmeasured`: policy wants a
 * measurement list, and its verdict rests on none; `report`: what the device says now, null when it was not
 * heard; `first`: on this connection.
 */
export const isAttestationDue = (
  device: Attested,
  policy: { readonly attestAge: number; readonly outdated?: boolean; readonly unmeasured?: boolean },
  report: { readonly resetCount: number; readonly first: boolean } | null,
  now: number,
): Due => {
  // Devices without a TPM have nothing to quote with: what they proved at enrolment is all there is.
  if (!device.quotes) return { due: false }
  const age = now - device.verdict.at
  const resetCount = report?.resetCount ?? device.reportedResetCount
  if (resetCount !== device.resetCount) return { due: true, because: 'boot', withholds: true }
  // A clock that was set back makes no verdict younger than it is.
  if (age > policy.attestAge * 1000 || age < -clockSlack) return { due: true, because: 'stale', withholds: true }
  // Nothing is wrapped any more to a key that withdrawn firmware can use.
  if (policy.outdated === true) return { due: true, because: 'firmware', withholds: true }
  // What ran since the boot may be anything.
  if (policy.unmeasured === true) return { due: true, because: 'ima', withholds: true }
  if (device.attestOrderedAt !== null) return { due: true, because: 'order', withholds: device.state === 'quarantined' }
  if (device.state === 'quarantined')
    return report?.first === true || age >= quarantinedEvery ? { due: true, because: 'quarantined', withholds: true } : { due: false }
  return age > early * policy.attestAge * 1000 ? { due: true, because: 'ageing', withholds: false } : { due: false }
}
