import { ascii, concat, sameBytes, TpmFormatError } from './bytes.ts'
import { alg } from './constants.ts'
import { digest, hashName } from './kdf.ts'

/** Event types in use (TCG PC Client Platform Firmware Profile §10.4.1). They and the event data are not authenticated: only digests are. */
export const eventType = { postCode: 0x1, noAction: 0x3, separator: 0x4, action: 0x5, ipl: 0xd, compactHash: 0xc } as const

/** One TCG_PCR_EVENT2. */
export interface Event {
  readonly pcr: number
  readonly type: number
  /** Digest per bank (TPM_ALG_ID). */
  readonly digests: ReadonlyMap<number, Uint8Array>
  readonly data: Uint8Array
}

const specId = concat(ascii('Spec ID Event03'), new Uint8Array(1))
const maxEventData = 64 << 10

/** Little-endian reader: the log, unlike the TPM, is a PC's. */
class LogReader {
  readonly #view: DataView
  readonly #bytes: Uint8Array
  #at = 0

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  }

  get done(): boolean {
    return this.#at === this.#bytes.length
  }

  bytes(length: number): Uint8Array {
    if (length > this.#bytes.length - this.#at) throw new TpmFormatError('the event log ends inside an event')
    this.#at += length
    return this.#bytes.subarray(this.#at - length, this.#at)
  }

  u8(): number {
    return this.bytes(1)[0] ?? 0
  }

  u16(): number {
    this.bytes(2)
    return this.#view.getUint16(this.#at - 2, true)
  }

  u32(): number {
    this.bytes(4)
    return this.#view.getUint32(this.#at - 4, true)
  }
}

/** Banks and digest sizes of the header event, which has the SHA-1 form of TPM 1.2 logs (§10.4.5.1). */
const readHeader = (log: LogReader): ReadonlyMap<number, number> => {
  if (log.u32() !== 0 || log.u32() !== eventType.noAction || log.bytes(20).some((byte) => byte !== 0)) throw new TpmFormatError('no crypto-agile event log')
  const size = log.u32()
  if (size > 1024) throw new TpmFormatError('a header event that is too large')
  const header = new LogReader(log.bytes(size))
  if (!sameBytes(header.bytes(16), specId)) throw new TpmFormatError('no Spec ID event')
  header.u32()
  if (header.u8() !== 0 || header.u8() !== 2) throw new TpmFormatError('another version of the event log')
  header.u8()
  const sizeOfUint = header.u8()
  if (sizeOfUint !== 1 && sizeOfUint !== 2) throw new TpmFormatError('a Spec ID event with another integer size')
  const count = header.u32()
  if (count === 0 || count > 8) throw new TpmFormatError(`${count} banks in the event log`)
  const banks = new Map<number, number>()
  for (let i = 0; i < count; i++) {
    const [hash, length] = [header.u16(), header.u16()]
    const known = [alg.sha1, alg.sha256, alg.sha384, alg.sha512].find((one) => one === hash)
    if (banks.has(hash) || length > 64 || (known !== undefined && hashName(known).size !== length)) throw new TpmFormatError('a bank with another digest size')
    banks.set(hash, length)
  }
  header.bytes(header.u8())
  if (!header.done) throw new TpmFormatError('trailing bytes in the Spec ID event')
  return banks
}

/** Parses a TCG crypto-agile event log (§10.4.5). Throws TpmFormatError, also when it is longer than `maxBytes` or has more than `maxEvents` events. */
export const parseEventLog = (bytes: Uint8Array, limits: { maxEvents: number; maxBytes: number }): readonly Event[] => {
  if (bytes.length > limits.maxBytes) throw new TpmFormatError(`an event log of ${bytes.length} bytes`)
  const log = new LogReader(bytes)
  const banks = readHeader(log)
  const events: Event[] = []
  while (!log.done) {
    if (events.length >= limits.maxEvents) throw new TpmFormatError(`more than ${limits.maxEvents} events`)
    const [pcr, type, count] = [log.u32(), log.u32(), log.u32()]
    if (pcr > 23) throw new TpmFormatError(`an event of PCR ${pcr}`)
    if (count !== banks.size) throw new TpmFormatError(`${count} digests where ${banks.size} banks were announced`)
    const digests = new Map<number, Uint8Array>()
    for (let i = 0; i < count; i++) {
      const hash = log.u16()
      const size = banks.get(hash)
      if (size === undefined || digests.has(hash)) throw new TpmFormatError(`a digest of bank ${hash.toString(16)}`)
      digests.set(hash, log.bytes(size))
    }
    const size = log.u32()
    if (size > maxEventData) throw new TpmFormatError(`an event of ${size} bytes`)
    events.push({ pcr, type, digests, data: log.bytes(size) })
  }
  return events
}

/**
 * PCR values that the events lead to, from zeros; PCR 0 starts at the startup locality that an EV_NO_ACTION says (§10.4.5.3), PCRs 17 to 22 at ones. Only
 * PCRs with events are in the result. Throws TpmFormatError when an event has no digest of the bank.
 */
export const replay = (events: readonly Event[], hash: number = alg.sha256): ReadonlyMap<number, Uint8Array> => {
  const values = new Map<number, Uint8Array>()
  const { size } = hashName(hash)
  const locality = events.find(({ pcr, type, data }) => pcr === 0 && type === eventType.noAction && sameBytes(data.subarray(0, 16), startup))?.data[16] ?? 0
  const start = (pcr: number): Uint8Array => {
    const value = new Uint8Array(size).fill(pcr >= 17 && pcr <= 22 ? 0xff : 0)
    if (pcr === 0) value[size - 1] = locality
    return value
  }
  for (const { pcr, type, digests } of events) {
    if (type === eventType.noAction) continue
    const own = digests.get(hash)
    if (own === undefined) throw new TpmFormatError(`an event without a digest of bank ${hash.toString(16)}`)
    values.set(pcr, digest(hash, values.get(pcr) ?? start(pcr), own))
  }
  if (locality !== 0 && !values.has(0)) values.set(0, start(0))
  return values
}

const startup = concat(ascii('StartupLocality'), new Uint8Array(1))

/** Digest over PCR values in ascending order, as a quote has it (Part 3, TPM2_Quote). A PCR without value counts as zeros. */
export const pcrDigest = (values: ReadonlyMap<number, Uint8Array>, pcrs: readonly number[], hash: number = alg.sha256): Uint8Array =>
  digest(alg.sha256, ...pcrs.toSorted((a, b) => a - b).map((pcr) => values.get(pcr) ?? new Uint8Array(hashName(hash).size)))

/** The log's bytes, with the Spec ID header of these banks. */
export const marshalEventLog = (events: readonly Event[], banks: readonly number[] = [alg.sha256]): Uint8Array => {
  const le16 = (value: number): Uint8Array => Uint8Array.of(value, value >> 8)
  const le32 = (value: number): Uint8Array => Uint8Array.of(value, value >> 8, value >> 16, value >> 24)
  const algorithms = banks.flatMap((hash) => [le16(hash), le16(hashName(hash).size)])
  const header = concat(specId, le32(0), Uint8Array.of(0, 2, 0, 2), le32(banks.length), ...algorithms, Uint8Array.of(0))
  return concat(
    le32(0),
    le32(eventType.noAction),
    new Uint8Array(20),
    le32(header.length),
    header,
    ...events.flatMap(({ pcr, type, digests, data }) => [
      le32(pcr),
      le32(type),
      le32(digests.size),
      ...[...digests].flatMap(([hash, value]) => [le16(hash), value]),
      le32(data.length),
      data,
    ]),
  )
}
