import { alg } from '@fleetkey/tpm2/constants.ts'
import { parseEventLog, replay } from '@fleetkey/tpm2/event-log.ts'
import { imaLimits, parseIma } from '@fleetkey/tpm2/ima.ts'
import { replayIma } from '@fleetkey/tpm2/ima-replay.ts'
import { fail, messageOf, ok, warn, type Finding } from './finding.ts'

/** As the server takes it at most. */
const limits = { maxEvents: 10_000, maxBytes: 2 << 20 } as const
const hex = (bytes: Uint8Array | undefined): string => Buffer.from(bytes ?? []).toString('hex')
/** Firmware owns PCRs 0 to 7; what comes after them the system may extend later than any log of the firmware tells. */
const lastOfFirmware = 7

/**
 * The firmware's event log against the PCRs. `values`: SHA-256 bank as read from the TPM; `bytes`: null when there is none, or why it could not be read. Names
 * the first PCR that differs. Pure.
 */
export const eventLogFinding = (path: string, bytes: Uint8Array | null | Error, values: ReadonlyMap<number, Uint8Array>): Finding => {
  const check = 'event log'
  if (bytes instanceof Error) return warn(check, `${path}: ${bytes.message}`, "run as root, or let the agent's group read it")
  if (bytes === null)
    return warn(
      check,
      `none at ${path}`,
      'measured boot is off: enable it in the firmware (Raspberry Pi: U-Boot with CONFIG_MEASURED_BOOT, and securityfs mounted); "eventLog": null if there is none to be had',
    )
  try {
    const events = parseEventLog(bytes, limits)
    const replayed = [...replay(events)].filter(([pcr]) => pcr < 16).toSorted(([a], [b]) => a - b)
    const differing = replayed.filter(([pcr, value]) => hex(value) !== hex(values.get(pcr)))
    const [first] = differing
    const size = `${events.length} events, PCRs ${replayed.map(([pcr]) => pcr).join(', ') || 'none'}`
    if (first === undefined) return ok(check, `${size}; it leads to the values in the TPM`)
    const [pcr, value] = first
    const found = `${size}; PCR ${pcr} is the first that differs: the log leads to ${hex(value)}, the TPM has ${hex(values.get(pcr))}`
    return pcr <= lastOfFirmware
      ? fail(check, found, 'the TPM was reset or extended past the log, the log is of another boot, or it was changed: switch the board off and on')
      : warn(check, found, "the system extends this PCR after the firmware's log has ended (systemd, IMA): leave it out of the policy")
  } catch (thrown) {
    return fail(check, `${path}: ${messageOf(thrown)}`, 'the server will refuse this log: update the firmware, or "eventLog": null')
  }
}

/** PCRs that are all zero although the firmware should have measured into them. Pure. */
export const pcrFinding = (values: ReadonlyMap<number, Uint8Array>): Finding => {
  const empty = [0, 1, 2, 3, 4, 5, 6, 7].filter((pcr) => values.get(pcr)?.every((byte) => byte === 0) === true)
  if (empty.length === 0) return ok('PCRs', '0 to 7 have been measured into')
  if (empty.length < 8) return ok('PCRs', `${empty.join(', ')} of 0 to 7 are zero: nothing was measured into them`)
  return warn('PCRs', '0 to 7 are all zero: the firmware measures nothing', 'attestation then only says which TPM this is, not what runs: enable measured boot')
}

/** The kernel's list of measured files against PCR 10. `bytes`: null when there is none, or why it could not be read. Pure. */
export const imaFinding = (path: string, bytes: Uint8Array | null | Error, values: ReadonlyMap<number, Uint8Array>): Finding => {
  const check = 'IMA list'
  if (bytes instanceof Error) return warn(check, `${path}: ${bytes.message}`, "run as root, or let the agent's group read it")
  if (bytes === null)
    return ok(check, `none at ${path}: this kernel measures no files (ima_policy=tcb), which a group whose policy needs the list (ima) does not accept`)
  if (bytes.length === 0) return warn(check, `${path} is empty`, 'the kernel has not started IMA: it found the TPM too late, or not at all')
  try {
    const list = parseIma(bytes, imaLimits.offline)
    // Violations are a matter for the server's policy.
    const { length } = replayIma(list, { quoted: values.get(10) ?? new Uint8Array(32), boot: new Map([[alg.sha256, values]]), allowViolations: true })
    const broken = list.filter(({ violation }) => violation).length
    const more = broken === 0 ? '' : `, ${broken} of them violations (files that were written to while they were measured)`
    return ok(check, `${list.length} entries in ${bytes.length} bytes${more}; ${length} lead to PCR 10`)
  } catch (thrown) {
    return warn(check, messageOf(thrown), 'extended since the kernel started, a reset of the TPM, or a kernel before 5.8: the server will not accept this list')
  }
}
