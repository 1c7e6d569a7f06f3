import { ascii, concat, sameBytes, TpmFormatError } from './bytes.ts'
import { alg } from './constants.ts'
import { hashName } from './kdf.ts'
import { LittleEndianReader } from './little-endian.ts'

/**
 * Event types in use (TCG PC Client Platform Firmware Profile §10.4.1). They and the event data are not authenticated: only digests are. No decision of
 * ours rests on a type, but for EV_NO_ACTION, which the replay does not extend: a measurement renamed to it is missing from the PCR.
 */
export const eventType = { postCode: 0x1, noAction: 0x3, separator: 0x4, action: 0x5, ipl: 0xd, compactHash: 0xc } as const

/** Digest size of each bank (TPM_ALG_ID) that the header announces. */
export type Banks = ReadonlyMap<number, number>

export const refuse = (reason: string, detail: string): never => {
  throw new TpmFormatError(`event log: ${detail}`, `log.${reason}`)
}

export const specId = concat(ascii('Spec ID Event03'), new Uint8Array(1))
const maxHeader = 1024
const maxBanks = 8
const known: readonly number[] = [alg.sha1, alg.sha256, alg.sha384, alg.sha512]
export const isZero = (bytes: Uint8Array): boolean => bytes.every((byte) => byte === 0)
export const logReader = (bytes: Uint8Array): LittleEndianReader => new LittleEndianReader(bytes, 'log.truncated')

/** Whether this is a whole log in the SHA-1 form of TPM 1.2 (TCG_PCR_EVENT), which measures nothing that SHA-1 does not forge. */
const isSha1Log = (bytes: Uint8Array): boolean => {
  try {
    for (const log = logReader(bytes); !log.done;) {
      const pcr = log.u32()
      // Windows keeps remarks in PCR -1.
      if (pcr > 23 && pcr !== 0xffff_ffff) return false
      log.bytes(4 + 20)
      log.bytes(log.u32())
    }
    return bytes.length > 0
  } catch {
    return false
  }
}

/** The algorithms of a TCG_EfiSpecIdEvent (§10.4.5.1). */
const readBanks = (header: LittleEndianReader): Banks => {
  const count = header.u32()
  if (count === 0 || count > maxBanks) refuse('bank.count', `${count} banks`)
  const banks = new Map<number, number>()
  for (let i = 0; i < count; i++) {
    const [hash, length] = [header.u16(), header.u16()]
    if (banks.has(hash)) refuse('bank.duplicate', `bank ${hash.toString(16)} twice`)
    const right = known.includes(hash) ? hashName(hash).size === length : length > 0 && length <= 64
    if (!right) refuse('digest.size', `digests of ${length} bytes for bank ${hash.toString(16)}`)
    banks.set(hash, length)
  }
  return banks
}

/** Banks and digest sizes of the header event, which has the SHA-1 form (§10.4.5.1). */
export const readHeader = (log: LittleEndianReader, whole: Uint8Array): Banks => {
  const [pcr, type, hash, size] = [log.u32(), log.u32(), log.bytes(20), log.u32()]
  if (size > maxHeader && type === eventType.noAction) refuse('header', `a header of ${size} bytes`)
  const header = logReader(log.bytes(size))
  if (type !== eventType.noAction || size < specId.length || !sameBytes(header.bytes(specId.length), specId))
    return isSha1Log(whole) ? refuse('sha1-format', 'in the SHA-1 form of TPM 1.2') : refuse('header', 'no Spec ID event')
  if (pcr !== 0 || !isZero(hash)) refuse('header', 'a Spec ID event that measures something')
  header.u32()
  const [minor, major] = [header.u8(), header.u8()]
  header.u8()
  const sizeOfUint = header.u8()
  if (minor !== 0 || major !== 2 || (sizeOfUint !== 1 && sizeOfUint !== 2)) refuse('header', `version ${major}.${minor}`)
  const banks = readBanks(header)
  header.bytes(header.u8())
  return header.done ? banks : refuse('header', 'trailing bytes in the Spec ID event')
}
