import { sameBytes, TpmFormatError } from './bytes.ts'
import { alg } from './constants.ts'
import { eventType, type Event } from './event-log.ts'
import { digest } from './kdf.ts'

/**
 * Which PCRs a platform's firmware ends with a separator, and which of them measure nothing afterwards. A platform profile decides: what is measured
 * after the separator into PCRs 4, 5 and 7 (boot loaders, their configuration, the authorities that vouched for them) is ordinary.
 */
export interface SeparatorProfile {
  /** One separator each, no more, no less. */
  readonly required: readonly number[]
  /** Among them: nothing may be measured after it. */
  readonly closed: readonly number[]
  /** Among them: may have more than one, for firmware that measures four zero bytes as something else. The first one still ends what `closed` closes. */
  readonly repeatable?: readonly number[]
}

const firmwarePcrs = [0, 1, 2, 3, 4, 5, 6, 7]

/** Platforms whose separators are known. `pcClient`: EFI machines (PFP §3.3.2.2); some of them measure boot variables into PCR 1 late. */
export const separatorProfiles = {
  pcClient: { required: firmwarePcrs, closed: [0, 2, 3, 6] },
  /** Boards of the simulator: bootloader and configuration before the separators, kernel, initrd and agent after them. */
  board: { required: firmwarePcrs, closed: [0, 1, 2, 3, 6, 7] },
} as const satisfies Readonly<Record<string, SeparatorProfile>>

/** What a separator measures (PFP §10.4.1): zeros or ones. 00000001 says that the firmware failed, and is none. */
const separatorValues = [new Uint8Array(4), new Uint8Array(4).fill(0xff)]

/** Event data that is what was measured: its digest in this bank is the one that was extended. Undefined otherwise: then the data is a mere remark. */
export const knownData = (event: Event, hash: number = alg.sha256): Uint8Array | undefined => {
  const own = event.digests.get(hash)
  if (own === undefined || event.type === eventType.noAction) return undefined
  return sameBytes(digest(hash, event.data), own) ? event.data : undefined
}

// A handful of banks, asked for with every log.
const knownSeparators = new Map<number, readonly Uint8Array[]>()
const separatorDigests = (hash: number): readonly Uint8Array[] => {
  const known = knownSeparators.get(hash) ?? separatorValues.map((value) => digest(hash, value))
  knownSeparators.set(hash, known)
  return known
}

const refuse = (reason: string, pcr: number): never => {
  throw new TpmFormatError(`event log: PCR ${pcr}: ${reason} separator`, `log.separator.${reason}`)
}

interface PcrRule {
  readonly pcr: number
  readonly closed: boolean
  readonly repeatable: boolean
}

/** The checks of one PCR over its measurements in order: digests decide what a separator is, whatever the event calls itself. */
const checkPcr = (rule: PcrRule, measured: readonly Event[], isSeparator: (event: Event) => boolean): void => {
  if (measured.some((event) => event.type === eventType.separator && !isSeparator(event))) refuse('value', rule.pcr)
  const first = measured.findIndex(isSeparator)
  if (first === -1) refuse('missing', rule.pcr)
  const later = measured.slice(first + 1)
  if (!rule.repeatable && later.some(isSeparator)) refuse('duplicate', rule.pcr)
  if (rule.closed && !later.every(isSeparator)) throw new TpmFormatError(`event log: PCR ${rule.pcr}: measured after its separator`, 'log.after-separator')
}

/**
 * Throws TpmFormatError unless every PCR of the profile has the separators that it says: `log.separator.missing`, `.duplicate`, `.value` (the firmware
 * reports an error, or something else calls itself a separator), `log.after-separator`. Judges the bank `hash`, which must be the quoted one.
 */
export const checkSeparators = (events: readonly Event[], profile: SeparatorProfile, hash: number = alg.sha256): void => {
  const separators = separatorDigests(hash)
  const isSeparator = ({ digests }: Event): boolean => {
    const own = digests.get(hash)
    return own !== undefined && separators.some((one) => sameBytes(one, own))
  }
  for (const pcr of profile.required) {
    const rule = { pcr, closed: profile.closed.includes(pcr), repeatable: profile.repeatable?.includes(pcr) === true }
    checkPcr(
      rule,
      events.filter((event) => event.pcr === pcr && event.type !== eventType.noAction),
      isSeparator,
    )
  }
}
