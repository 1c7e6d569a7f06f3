/** A response code other than success (TPM 2.0 Part 2 §6.6). */
export class Refusal extends Error {
  readonly rc: number

  constructor(rc: number) {
    super(`rc 0x${rc.toString(16)}`)
    this.rc = rc
  }
}

/** Format-zero codes and warnings as they are; format-one codes (bit 7) without handle, session or parameter number. */
export const rc = {
  badTag: 0x01e,
  initialize: 0x100,
  failure: 0x101,
  sequence: 0x103,
  disabled: 0x120,
  exclusive: 0x121,
  authType: 0x124,
  authMissing: 0x125,
  policy: 0x126,
  pcr: 0x127,
  pcrChanged: 0x128,
  authUnavailable: 0x12f,
  commandSize: 0x142,
  commandCode: 0x143,
  authSize: 0x144,
  authContext: 0x145,
  nvRange: 0x146,
  nvLocked: 0x148,
  nvAuthorization: 0x149,
  nvUninitialized: 0x14a,
  nvSpace: 0x14b,
  nvDefined: 0x14c,
  cpHash: 0x151,
  sensitive: 0x155,
  asymmetric: 0x081,
  attributes: 0x082,
  hash: 0x083,
  value: 0x084,
  hierarchy: 0x085,
  keySize: 0x087,
  mode: 0x089,
  type: 0x08a,
  handle: 0x08b,
  kdf: 0x08c,
  range: 0x08d,
  authFail: 0x08e,
  nonce: 0x08f,
  scheme: 0x092,
  size: 0x095,
  symmetric: 0x096,
  tag: 0x097,
  selector: 0x098,
  insufficient: 0x09a,
  signature: 0x09b,
  key: 0x09c,
  policyFail: 0x09d,
  integrity: 0x09f,
  ticket: 0x0a0,
  reservedBits: 0x0a1,
  badAuth: 0x0a2,
  expired: 0x0a3,
  policyCc: 0x0a4,
  binding: 0x0a5,
  curve: 0x0a6,
  eccPoint: 0x0a7,
  contextGap: 0x901,
  objectMemory: 0x902,
  sessionMemory: 0x903,
  locality: 0x907,
  referenceH0: 0x910,
  referenceS0: 0x918,
  lockout: 0x921,
  retry: 0x922,
} as const

const formatOne = 0x80
const ofParameter = 0x40
const ofSession = 0x800

/** A format-one code gets the number (from 1) of what it is about; a code that has one, or can have none, stays. */
const numbered = (code: number, kind: number, number: number): number => ((code & formatOne) !== 0 && (code & ~0xbf) === 0 ? code | kind | (number << 8) : code)

/** About the n-th parameter, handle or session (from 1). */
export const parameter = (number: number, code: number): Refusal => new Refusal(numbered(code, ofParameter, number))
export const handleFault = (number: number, code: number): Refusal => new Refusal(numbered(code, 0, number))
export const sessionFault = (number: number, code: number): Refusal => new Refusal(numbered(code, ofSession, number))

/** Runs `work`; what it refuses without a number is about this parameter. */
export const asParameter = <T>(number: number, work: () => T): T => {
  try {
    return work()
  } catch (error) {
    if (error instanceof Refusal) throw parameter(number, error.rc)
    throw error
  }
}
