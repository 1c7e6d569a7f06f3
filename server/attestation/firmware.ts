import type { EndorsementPolicy } from './endorsement-policy.ts'
import { fail } from './reasons.ts'

/** Parts of a TPM firmware version as operators write it: `7.85` or `7.85.4555.0`, sixteen bits each. Undefined for another form. */
const partsOf = (text: string): readonly number[] | undefined => {
  if (!/^\d{1,5}\.\d{1,5}(\.\d{1,5}\.\d{1,5})?$/.test(text)) return undefined
  const parts = text.split('.').map(Number)
  return parts.every((part) => part <= 0xffff) ? parts : undefined
}

export const isFirmwareVersion = (text: string): boolean => partsOf(text) !== undefined

/** `firmwareVersion` of an attestation (TPM_PT_FIRMWARE_VERSION_1 ‖ _2) as `7.85.4555.0`. */
export const firmwareText = (version: bigint): string => [48n, 32n, 16n, 0n].map((shift) => String((version >> shift) & 0xffffn)).join('.')

/** The number of a written version; a missing lower half counts as zero. */
export const firmwareNumber = (text: string): bigint => {
  const [a = 0, b = 0, c = 0, d = 0] = partsOf(text) ?? []
  return (BigInt(a) << 48n) | (BigInt(b) << 32n) | (BigInt(c) << 16n) | BigInt(d)
}

/** Whether a written version names this one; two parts name every version that starts with them. */
export const namesFirmware = (text: string, version: bigint): boolean =>
  partsOf(text)?.length === 2 ? firmwareNumber(text) >> 32n === version >> 32n : firmwareNumber(text) === version

/** A manufacturer, or `*` for every one, null included. */
export const isFor = (manufacturer: string, of: string | null): boolean => manufacturer === '*' || manufacturer === of

/** The TPM firmware that the AK attests: at least the floor of its maker, and on no deny list. */
export const checkFirmware = (version: bigint, manufacturer: string | null, policy: EndorsementPolicy): void => {
  for (const floor of policy.floors)
    if (isFor(floor.manufacturer, manufacturer) && version < firmwareNumber(floor.minimum))
      fail('tpm.firmware.below-floor', `TPM firmware ${firmwareText(version)} is below ${floor.minimum}`)
  for (const denied of policy.deny)
    if ('firmware' in denied && isFor(denied.manufacturer, manufacturer) && namesFirmware(denied.firmware, version))
      fail('tpm.firmware.denied', `TPM firmware ${firmwareText(version)} is denied`)
}
