import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { checkSeparators, separatorProfiles } from '@fleetkey/tpm2/event-log-rules.ts'
import { eventType, parseEventLog, replay, resetValue, type Event } from '@fleetkey/tpm2/event-log.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import type { PcrBank } from '@fleetkey/tpm2/structures.ts'
import type { Quote } from './quote.ts'
import { fail, parsed } from './reasons.ts'

export const logLimits = { maxEvents: 4096, maxBytes: 1 << 20 } as const

/** PCR index → hex value, proven by a quote; `events` of the log that leads there. */
export interface Measured {
  readonly pcrs: Readonly<Record<string, string>>
  readonly events: number
}

/** Types whose digest is that of their data (PC Client PFP §10.4.1): EV_SEPARATOR, EV_S_CRTM_VERSION, EV_EFI_ACTION, EV_EFI_VARIABLE_DRIVER_CONFIG. */
const selfDescribing: ReadonlySet<number> = new Set([eventType.separator, 0x8, 0x8000_0007, 0x8000_0001])

/**
 * Neither type nor data of an event is authenticated. Where the type says that the data is what was measured, an edit shows; everywhere else nothing may
 * rest on the data, and nothing here does.
 */
export const checkData = (events: readonly Event[], hash: number): void => {
  for (const { pcr, type, digests, data } of events) {
    const own = digests.get(hash)
    if (selfDescribing.has(type) && own !== undefined && !sameBytes(digest(hash, data), own)) fail('log.data.mismatch', `an event of PCR ${pcr}`)
  }
}

/** Firmware ends its part of each PCR 0 to 7 with one separator; only PCRs that were quoted are judged, the others could be anything. */
const checkFirmwarePart = (events: readonly Event[], bank: PcrBank): void => {
  const quoted = (pcrs: readonly number[]): readonly number[] => pcrs.filter((pcr) => bank.pcrs.includes(pcr))
  const { required, closed } = separatorProfiles.pcClient
  parsed('log.malformed', () => checkSeparators(events, { required: quoted(required), closed: quoted(closed) }, bank.hash))
}

/** Digest over PCR values in ascending order, in the hash of the key that signed the quote (Part 3, TPM2_Quote). */
export const quotedDigest = (hash: number, pcrs: readonly number[], valueOf: (pcr: number) => Uint8Array): Uint8Array =>
  digest(hash, ...pcrs.toSorted((one, other) => one - other).map(valueOf))

/** What a log says of one bank, proven by nothing yet. */
export interface Logged {
  readonly events: readonly Event[]
  readonly bank: PcrBank
  /** The value that the log leads to; the value after a reset where nothing was measured. */
  readonly valueOf: (pcr: number) => Uint8Array
}

/** Reads a log for the bank that was asked for. */
export const readLog = (log: Uint8Array, bank: PcrBank): Logged => {
  const events = parsed('log.malformed', () => parseEventLog(log, logLimits))
  const values = parsed('log.bank.missing', () => replay(events, bank.hash))
  return { events, bank, valueOf: (pcr) => values.get(pcr) ?? resetValue(pcr, bank.hash) }
}

/** What a log means whose values are those that were quoted; of these PCRs. */
export const measuredOf = ({ events, bank, valueOf }: Logged, pcrs: readonly number[] = bank.pcrs): Measured => {
  checkData(events, bank.hash)
  checkFirmwarePart(events, bank)
  return { pcrs: pcrValues(pcrs, valueOf), events: events.length }
}

/** PCR index → hex value. */
export const pcrValues = (pcrs: readonly number[], valueOf: (pcr: number) => Uint8Array): Readonly<Record<string, string>> =>
  Object.fromEntries(pcrs.map((pcr) => [String(pcr), Buffer.from(valueOf(pcr)).toString('hex')]))

/** The values that the log leads to in this bank, of these PCRs. Refuses unless they hash to what was quoted. */
export const checkLog = (log: Uint8Array, quote: Quote, bank: PcrBank, signedWith: number): Measured => {
  const logged = readLog(log, bank)
  if (!sameBytes(quote.pcrDigest, quotedDigest(signedWith, bank.pcrs, logged.valueOf))) fail('log.replay.mismatch')
  return measuredOf(logged)
}

/** The one bank that policy asks for, PCRs in ascending order. */
export const bankOf = (selection: { readonly hash: 'sha256' | 'sha384'; readonly pcrs: readonly number[] } | undefined): PcrBank =>
  selection === undefined
    ? fail('quote.selection.bank')
    : { hash: selection.hash === 'sha256' ? alg.sha256 : alg.sha384, pcrs: selection.pcrs.toSorted((one, other) => one - other) }
