import { handle as known, responseV0, responseV1, responseWarning } from './constants.ts'

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

/** Hierarchies that have an authorisation value, which whoever owns the machine may have set (Part 1 §13). */
export type Hierarchy = 'owner' | 'endorsement' | 'lockout'

const hierarchyOf = (handle: number | undefined): Hierarchy | undefined =>
  (['owner', 'endorsement', 'lockout'] as const).find((name) => handle !== undefined && known[name] === handle)

/** Layer number that the kernel's resource manager puts into what it says itself (TSS 2.0 header, TSS2_RESMGR_TPM_RC_LAYER). */
const managerLayer = 0x000b_0000

/**
 * The TPM refused a command. `code`: the response code, without the layer of a resource manager; `wrongPassword`: the hierarchy whose authorisation value was
 * wrong, or missing.
 */
export class TpmError extends Error {
  override readonly name = 'TpmError'
  readonly code: number
  readonly wrongPassword: Hierarchy | undefined

  /** `handles`: of the command, in order, those that need authorisation first. */
  constructor(code: number, command: string, handles: readonly number[] = []) {
    const own = (code & 0xffff_0000) === managerLayer ? code & 0xffff : code
    const refused = isAuthFailure(own) ? hierarchyOf(handles[((own >> 8) & 0x7) - 1]) : undefined
    const more = refused === undefined ? '' : `: the password of the ${refused} hierarchy is wrong or missing`
    super(`TPM: ${command}: ${responseName(own)} (0x${own.toString(16).padStart(3, '0')})${more}`)
    this.code = own
    this.wrongPassword = refused
  }

  /** Whether this is that format-one error, about whatever handle, session or parameter. */
  is(base: number): boolean {
    return (this.code & 0x080) !== 0 ? (this.code & 0x3f) === (base & 0x3f) : this.code === base
  }
}

/** Refused for what a parameter holds, not for the moment (Part 2 §6.6.3, format one). */
export const isOfParameter = (error: unknown): error is TpmError => error instanceof TpmError && (error.code & 0x0c0) === 0x0c0

/** The TPM shows another endorsement key than the one that it is pinned to: it is another TPM, was given new seeds, or somebody in between poses as it. */
export class OtherEk extends Error {
  override readonly name = 'OtherEk'

  /** Names of the keys. */
  constructor(pinned: Uint8Array, found: Uint8Array) {
    const hex = (name: Uint8Array): string => Buffer.from(name).toString('hex')
    super(
      `the endorsement key of this TPM (${hex(found)}) is not the one that this device enrolled with (${hex(pinned)}): ` +
        'it is another TPM, or it was given new seeds, or somebody between it and the agent poses as it. Nothing is sent to it that he could read',
    )
  }
}

/** BAD_AUTH, or AUTH_FAIL where failures are counted, of a session: its HMAC or password did not fit. */
const isAuthFailure = (code: number): boolean => (code & 0x8c0) === 0x880 && ((code & 0x3f) === (rc.authFail & 0x3f) || (code & 0x3f) === (rc.badAuth & 0x3f))

/** The TPM could not be reached, answered something that is no response, or its answer was tampered with on the way. */
export class TpmTransportError extends Error {
  override readonly name = 'TpmTransportError'
}

export const rc = {
  success: 0,
  initialize: 0x100,
  hierarchy: 0x085,
  handle: 0x08b,
  value: 0x084,
  authFail: 0x08e,
  badAuth: 0x0a2,
  badTag: 0x01e,
  commandCode: 0x143,
  policyFail: 0x09d,
  integrity: 0x09f,
  pcrChanged: 0x128,
  authUnavailable: 0x12f,
  objectMemory: 0x902,
  sessionMemory: 0x903,
  memory: 0x904,
  sessionHandles: 0x905,
  objectHandles: 0x906,
  yielded: 0x908,
  testing: 0x90a,
  nvRate: 0x920,
  lockout: 0x921,
  retry: 0x922,
  referenceH0: 0x910,
  referenceS0: 0x918,
} as const
