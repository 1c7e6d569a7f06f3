import { ascii, concat, sameBytes } from './bytes.ts'
import { alg } from './constants.ts'
import { eventType, isZero, logReader, readHeader, refuse, specId, type Banks } from './event-log-header.ts'
import { digest, hashName } from './kdf.ts'
import { le16, le32, type LittleEndianReader } from './little-endian.ts'

export { eventType } from './event-log-header.ts'

/** One TCG_PCR_EVENT2. */
export interface Event {
  readonly pcr: number
  readonly type: number
  /** Digest per bank (TPM_ALG_ID). */
  readonly digests: ReadonlyMap<number, Uint8Array>
  readonly data: Uint8Array
}

const startup = concat(ascii('StartupLocality'), new Uint8Array(1))
const maxEventData = 64 << 10

/** TPML_DIGEST_VALUES: one digest for each announced bank, in any order (§10.2.2), also where nothing is extended. */
const readDigests = (log: LittleEndianReader, banks: Banks): ReadonlyMap<number, Uint8Array> => {
  const count = log.u32()
  if (count !== banks.size) refuse('digest.count', `${count} digests where ${banks.size} banks were announced`)
  const digests = new Map<number, Uint8Array>()
  for (let i = 0; i < count; i++) {
    const hash = log.u16()
    const size = banks.get(hash) ?? refuse('bank.unknown', `a digest of bank ${hash.toString(16)}`)
    if (digests.has(hash)) refuse('bank.duplicate', `two digests of bank ${hash.toString(16)}`)
    digests.set(hash, log.bytes(size))
  }
  return digests
}

const readEvent = (log: LittleEndianReader, banks: Banks): Event => {
  const [pcr, type] = [log.u32(), log.u32()]
  if (pcr > 23) refuse('pcr', `an event of PCR ${pcr}`)
  const digests = readDigests(log, banks)
  const size = log.u32()
  if (size > maxEventData) refuse('limit.event', `an event of ${size} bytes`)
  return { pcr, type, digests, data: log.bytes(size) }
}

/** Whether an EV_NO_ACTION says where TPM2_Startup came from (§10.4.5.3). */
const saysLocality = ({ type, data }: Event): boolean => type === eventType.noAction && sameBytes(data.subarray(0, startup.length), startup)

/**
 * What EV_NO_ACTION may be (§10.4.5): its digests are zero, for it extends nothing; a startup locality stands once, in PCR 0, before whatever is extended
 * there. Anything else would let a log choose the start of PCR 0 or hide a measurement among the remarks.
 */
const checkNoAction = (events: readonly Event[]): void => {
  let measured = false
  let said = false
  for (const event of events) {
    if (event.type !== eventType.noAction) {
      measured ||= event.pcr === 0
      continue
    }
    if (![...event.digests.values()].every(isZero)) refuse('no-action.digest', 'an EV_NO_ACTION with a digest')
    if (!saysLocality(event)) continue
    const locality = event.data[startup.length] ?? -1
    const wellFormed = event.pcr === 0 && event.data.length === startup.length + 1 && [0, 3, 4].includes(locality)
    if (!wellFormed || measured || said) refuse('startup-locality', `a startup locality that is ${said ? 'a second one' : measured ? 'late' : 'malformed'}`)
    said = true
  }
}

/**
 * Parses a TCG crypto-agile event log (§10.4.5). Throws TpmFormatError with a reason `log.*`, also when it is longer than `maxBytes` or has more than
 * `maxEvents` events. Nothing is allocated for what a length or count merely announces.
 */
export const parseEventLog = (bytes: Uint8Array, limits: { readonly maxEvents: number; readonly maxBytes: number }): readonly Event[] => {
  if (bytes.length > limits.maxBytes) refuse('limit.bytes', `${bytes.length} bytes`)
  const log = logReader(bytes)
  const banks = readHeader(log, bytes)
  const events: Event[] = []
  while (!log.done) {
    if (events.length >= limits.maxEvents) refuse('limit.events', `more than ${limits.maxEvents} events`)
    events.push(readEvent(log, banks))
  }
  checkNoAction(events)
  return events
}

/** How the machine came to run what was measured last. */
export interface Launch {
  /** A dynamic launch (DRTM) sets PCRs 17 to 22 to zero; without one they keep the ones of TPM2_Startup (PC Client Platform TPM Profile, PCR attributes). */
  readonly dynamic?: boolean
}

/** A PCR before the first event, whatever the startup locality. */
export const resetValue = (pcr: number, hash: number = alg.sha256, launch: Launch = {}): Uint8Array =>
  new Uint8Array(hashName(hash).size).fill(pcr >= 17 && pcr <= 22 && launch.dynamic !== true ? 0xff : 0)

/**
 * PCR values that the events lead to; PCR 0 starts at the startup locality that an EV_NO_ACTION says (§10.4.5.3). Only PCRs with events are in the result.
 * Throws TpmFormatError `log.bank.missing` when an event has no digest of the bank.
 */
export const replay = (events: readonly Event[], hash: number = alg.sha256, launch: Launch = {}): ReadonlyMap<number, Uint8Array> => {
  const values = new Map<number, Uint8Array>()
  const locality = events.find((event) => event.pcr === 0 && saysLocality(event))?.data[startup.length] ?? 0
  if (locality !== 0) values.set(0, concat(resetValue(0, hash).subarray(1), Uint8Array.of(locality)))
  for (const { pcr, type, digests } of events) {
    if (type === eventType.noAction) continue
    const own = digests.get(hash) ?? refuse('bank.missing', `an event without a digest of bank ${hash.toString(16)}`)
    values.set(pcr, digest(hash, values.get(pcr) ?? resetValue(pcr, hash, launch), own))
  }
  return values
}

/** Digest over PCR values in ascending order, as a quote has it (Part 3, TPM2_Quote). A PCR without value counts as after TPM2_Startup. */
export const pcrDigest = (values: ReadonlyMap<number, Uint8Array>, pcrs: readonly number[], hash: number = alg.sha256): Uint8Array =>
  digest(alg.sha256, ...pcrs.toSorted((a, b) => a - b).map((pcr) => values.get(pcr) ?? resetValue(pcr, hash)))

/** The log's bytes, with the Spec ID header of these banks. */
export const marshalEventLog = (events: readonly Event[], banks: readonly number[] = [alg.sha256]): Uint8Array => {
  const algorithms = banks.flatMap((hash) => [le16(hash), le16(hashName(hash).size)])
  const header = concat(specId, le32(0), Uint8Array.of(0, 2, 0, 2), le32(banks.length), ...algorithms, Uint8Array.of(0))
  const parts = events.flatMap(({ pcr, type, digests, data }) => [
    le32(pcr),
    le32(type),
    le32(digests.size),
    ...[...digests].flatMap(([hash, value]) => [le16(hash), value]),
    le32(data.length),
    data,
  ])
  // An array, no arguments: a log has more parts than a call may have arguments.
  return new Uint8Array(Buffer.concat([le32(0), le32(eventType.noAction), new Uint8Array(20), le32(header.length), header, ...parts]))
}
