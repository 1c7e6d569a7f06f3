import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import type { StateContent, Tpm2Content } from './claims.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import { firmwareText, namesFirmware } from './firmware.ts'
import { fail } from './reasons.ts'

/** What a device's record says of its TPM since it was accepted last. */
export interface TpmRecord {
  /** TPMT_PUBLIC: another one means that the owner hierarchy was cleared. */
  readonly srk: Uint8Array
  readonly resetCount: number
  /** Null for firmware that was not recognised. */
  readonly release: string | null
  /** What the quote of that resetCount said besides; null for a record that does not know it. */
  readonly quoted: Pick<StateContent, 'restartCount' | 'clock' | 'clockSafe' | 'firmwareVersion'> | null
}

/** What was accepted last of a TPM's clock. `quoted`: null when the record does not know it. */
export interface LastClock {
  readonly resetCount: number
  readonly quoted: Pick<StateContent, 'clock' | 'clockSafe'> | null
}

/** TPMs save their clock at most every 2^22 ms, 70 minutes (Part 1 §36.3.2): by so much it may fall when power was cut. */
export const clockGrace = 2n ** 22n
/** Milliseconds: evidence of the same boot may be judged in another order than it was made. */
const inFlight = 120_000n

/**
 * Whether it is explained that a TPM calls its clock unsafe (power was cut without TPM2_Shutdown; it says so until the clock has passed what was saved last):
 * it was reset since it was last accepted, and its clock has fallen by no more than the grace; or it is the boot that was accepted so, and its clock went on.
 * Without a record nothing explains it.
 */
export const isClockExplained = (before: LastClock | null, now: { readonly resetCount: number; readonly clock: bigint }): boolean => {
  if (before === null) return false
  const { resetCount, quoted } = before
  if (now.resetCount > resetCount) return quoted === null || now.clock + clockGrace >= quoted.clock
  return now.resetCount === resetCount && quoted !== null && !quoted.clockSafe && now.clock + inFlight >= quoted.clock
}

/** Whether the operator recorded that TPM firmware goes from the one version to the other. */
export const isRecordedUpdate = (before: bigint, now: bigint, updates: EndorsementPolicy['updates']): boolean =>
  updates.some(({ from, to }) => namesFirmware(from, before) && namesFirmware(to, now))

type Now = Pick<Tpm2Content, 'srkPublic' | 'resetCount' | 'restartCount' | 'clock' | 'clockSafe' | 'firmwareVersion'> & { readonly release: string | null }

/**
 * Continuity of a TPM with its record (null: never accepted before). Counters never fall while the SRK is the same (TPM2_Clear resets them, and makes another
 * SRK); another release needs a reboot; the TPM's firmware changes only by a recorded update; a clock that may have gone back is accepted only when a reboot
 * explains it and it fell by no more than the grace. What was found, for the audit entry.
 */
export const continuity = (record: TpmRecord | null, now: Now, policy: Pick<EndorsementPolicy, 'updates'>): string => {
  if (record === null) return now.clockSafe ? 'first attestation' : fail('quote.clock.unsafe', 'the clock is not safe, and no record explains it')
  const before = record.quoted?.firmwareVersion
  if (before !== undefined && before !== now.firmwareVersion && !isRecordedUpdate(before, now.firmwareVersion, policy.updates))
    fail('tpm.firmware.changed', `TPM firmware ${firmwareText(before)} became ${firmwareText(now.firmwareVersion)}`)
  if (!sameBytes(record.srk, now.srkPublic)) {
    if (!now.clockSafe) fail('quote.clock.unsafe', 'the clock is not safe after TPM2_Clear')
    return `new SRK: the TPM was cleared (resetCount ${record.resetCount} to ${now.resetCount})`
  }
  checkCounters(record, now)
  return 'same SRK'
}

const checkCounters = ({ resetCount, release, quoted }: TpmRecord, now: Now): void => {
  if (now.resetCount < resetCount) fail('tpm.reset-count.lower', `resetCount ${now.resetCount} below ${resetCount}`)
  const sameBoot = now.resetCount === resetCount
  if (sameBoot && release !== null && now.release !== null && now.release !== release)
    fail('tpm.reset-count.unchanged', `${now.release} after ${release} with resetCount ${resetCount}`)
  if (!now.clockSafe && !isClockExplained({ resetCount, quoted }, now)) fail('quote.clock.unsafe', 'no reboot explains the clock')
  if (quoted === null) return
  if (sameBoot && now.restartCount < quoted.restartCount) fail('tpm.restart-count.lower', `restartCount ${now.restartCount} below ${quoted.restartCount}`)
  if (now.clock + (sameBoot ? inFlight : clockGrace) < quoted.clock) fail('tpm.clock.back', `clock ${now.clock} ms after ${quoted.clock} ms`)
}
