import { responseV0, responseV1, responseWarning } from './constants.ts'

/** The name of a response code (Part 2 §6.6), and what it is about: `AUTH_FAIL of session 1`. */
export const responseName = (code: number): string => {
  if ((code & 0xf80) === 0x900) return responseWarning[code & 0xfff] ?? `warning 0x${code.toString(16)}`
  if ((code & 0x080) === 0) return responseV0[code & 0x7f] ?? `error 0x${code.toString(16)}`
  const name = responseV1[code & 0x3f] ?? `error 0x${code.toString(16)}`
  const number = (code >> 8) & 0xf
  if ((code & 0x40) !== 0) return `${name} of parameter ${number}`
  if (number === 0) return name
  return number >= 8 ? `${name} of session ${number - 8}` : `${name} of handle ${number}`
}

/** The TPM refused a command. `code`: the response code as it came; `about`: its format-one base code, or itself. */
export class TpmError extends Error {
  override readonly name = 'TpmError'
  readonly code: number

  constructor(code: number, command: string) {
    super(`TPM: ${command}: ${responseName(code)} (0x${code.toString(16).padStart(3, '0')})`)
    this.code = code
  }

  /** Whether this is that format-one error, about whatever handle, session or parameter. */
  is(base: number): boolean {
    return (this.code & 0x080) !== 0 ? (this.code & 0x3f) === (base & 0x3f) : this.code === base
  }
}

/** The TPM could not be reached, answered something that is no response, or its answer was tampered with on the way. */
export class TpmTransportError extends Error {
  override readonly name = 'TpmTransportError'
}

export const rc = {
  success: 0,
  initialize: 0x100,
  handle: 0x08b,
  value: 0x084,
  authFail: 0x08e,
  integrity: 0x09f,
  objectMemory: 0x902,
  sessionMemory: 0x903,
  yielded: 0x908,
  testing: 0x90a,
  retry: 0x922,
  referenceH0: 0x910,
  referenceS0: 0x918,
} as const
