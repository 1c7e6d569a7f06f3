/** A response code other than success (TPM 2.0 Part 2 §6.6). */
export class Refusal extends Error {
  readonly rc: number

  constructor(rc: number) {
    super(`rc 0x${rc.toString(16)}`)
    this.rc = rc
  }
}

export const rc = {
  initialize: 0x100,
  failure: 0x101,
  authType: 0x124,
  authMissing: 0x125,
  authUnavailable: 0x12f,
  nvRange: 0x146,
  nvUninitialized: 0x14a,
  nvSpace: 0x14b,
  nvAuthorization: 0x149,
  nvDefined: 0x14c,
  badContext: 0x150,
  commandSize: 0x142,
  commandCode: 0x143,
  authSize: 0x144,
  badTag: 0x01e,
  sensitive: 0x155,
  pcrChanged: 0x128,
  asymmetric: 0x081,
  attributes: 0x082,
  hash: 0x083,
  value: 0x084,
  hierarchy: 0x085,
  mode: 0x089,
  type: 0x08a,
  handle: 0x08b,
  range: 0x08d,
  authFail: 0x08e,
  scheme: 0x092,
  size: 0x095,
  symmetric: 0x096,
  selector: 0x098,
  insufficient: 0x09a,
  signature: 0x09b,
  key: 0x09c,
  policyFail: 0x09d,
  integrity: 0x09f,
  ticket: 0x0a0,
  badAuth: 0x0a2,
  policyCc: 0x0a4,
  binding: 0x0a5,
  eccPoint: 0x0a7,
  objectMemory: 0x902,
  sessionMemory: 0x903,
  referenceH0: 0x910,
  referenceS0: 0x918,
} as const

/** About the n-th parameter, handle or session (from 1). */
export const parameter = (number: number, code: number): Refusal => new Refusal(code | 0x40 | (number << 8))
export const handleFault = (number: number, code: number): Refusal => new Refusal(code | (number << 8))
export const sessionFault = (number: number, code: number): Refusal => new Refusal(code | 0x800 | (number << 8))
