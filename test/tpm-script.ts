import { randomBytes } from 'node:crypto'
import { concat, empty, Reader, sized, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known, session as flag, sessionType, tag } from '@fleetkey/tpm2/constants.ts'
import { shareSeed } from '@fleetkey/tpm2/credential.ts'
import { kdfA } from '@fleetkey/tpm2/kdf.ts'
import { authorisation, decryptParameter, encryptParameter, hashOf } from '@fleetkey/tpm2/session.ts'

/** A session as a script keeps it. `auth` is the value of the entity that it authorises, when its HMAC covers it. */
export interface ScriptSession {
  readonly handle: number
  readonly key: Uint8Array
  nonceTpm: Uint8Array
}

/** One authorisation area: a password, a session, or bytes as they are. */
export type Authorisation =
  | { readonly password: Uint8Array; readonly session?: never }
  | {
      readonly session: ScriptSession
      readonly auth?: Uint8Array
      readonly attributes?: number
      /** The entity's value where parameter encryption covers it and the HMAC does not (a policy without PolicyAuthValue). */
      readonly encryptAuth?: Uint8Array
    }
  | { readonly raw: Uint8Array; readonly session?: never }

export interface Step {
  readonly code: number
  /** Handles, each with its Name when a session's HMAC covers it; a permanent one's Name is itself. */
  readonly handles?: readonly (number | { readonly handle: number; readonly name: Uint8Array })[]
  readonly auth?: readonly Authorisation[]
  readonly parameters?: Uint8Array
  readonly givesHandle?: boolean
  /** Whether a response HMAC is checked; a script that sends a wrong one has nothing to check. */
  readonly unchecked?: boolean
}

export interface Outcome {
  readonly rc: number
  readonly handle: number
  readonly parameters: Uint8Array
  /** The whole response. */
  readonly raw: Uint8Array
}

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
export const password = (value: Uint8Array = empty): Authorisation => ({ password: value })

/**
 * Speaks a TPM's wire protocol without an opinion: sends what a script says, whatever it is, and gives back what came. Sessions, their HMACs and parameter
 * encryption are worked out here (Part 1 §19, §21), and response HMACs checked.
 */
export class ScriptTpm {
  readonly #send: (bytes: Uint8Array) => Promise<Uint8Array>

  constructor(send: (bytes: Uint8Array) => Promise<Uint8Array>) {
    this.#send = send
  }

  async raw(bytes: Uint8Array): Promise<Uint8Array> {
    return await this.#send(bytes)
  }

  async run(step: Step): Promise<Outcome> {
    const { bytes, nonces } = commandBytes(step)
    const raw = await this.#send(bytes)
    const reader = new Reader(raw)
    const [responseTag, size, rc] = [reader.u16(), reader.u32(), reader.u32()]
    if (size !== raw.length) throw new Error(`a response of ${raw.length} bytes that says ${size}`)
    if (rc !== 0) {
      if (raw.length !== 10 || responseTag !== tag.noSessions) throw new Error('an error with more than its code')
      return { rc, handle: 0, parameters: empty, raw }
    }
    const handle = step.givesHandle === true ? reader.u32() : 0
    if (step.auth === undefined || step.auth.length === 0) return { rc, handle, parameters: reader.rest(), raw }
    const parameters = reader.bytes(reader.u32())
    const hash = hashOf(u32(0), u32(step.code), parameters)
    const replies = step.auth.map(() => ({ nonce: reader.sized(64), attributes: reader.u8(), mac: reader.sized(64) }))
    reader.end()
    let clear = parameters
    for (const [at, one] of step.auth.entries()) {
      const reply = replies[at]
      if (one.session === undefined || reply === undefined) continue
      const { session, auth = empty } = one
      const expected = authorisation({
        omitted: reply.mac.length === 0,
        key: session.key,
        auth,
        hash,
        newer: reply.nonce,
        older: nonces[at] ?? empty,
        attributes: reply.attributes,
      })
      if (step.unchecked !== true && Buffer.compare(expected, reply.mac) !== 0) throw new Error('a response HMAC that does not verify')
      session.nonceTpm = reply.nonce.slice()
      if (((one.attributes ?? flag.continue) & flag.encrypt) === 0) continue
      const body = new Reader(parameters)
      const first = body.sized()
      clear = concat(sized(decryptParameter(session.key, one.encryptAuth ?? auth, session.nonceTpm, nonces[at] ?? empty, first)), body.rest())
    }
    return { rc, handle, parameters: clear, raw }
  }

  /** Runs a step that must succeed. */
  async must(step: Step): Promise<Outcome> {
    const outcome = await this.run(step)
    if (outcome.rc !== 0) throw new Error(`command ${step.code.toString(16)} answered ${outcome.rc.toString(16)}`)
    return outcome
  }

  /** TPM2_StartAuthSession, AES-128-CFB and SHA-256; `salter`: a loaded key with its TPMT_PUBLIC, `bound`: an entity with its value. */
  async session(
    type: keyof typeof sessionType,
    of: { salter?: { handle: number; public: Uint8Array }; bound?: { handle: number; auth: Uint8Array } } = {},
  ): Promise<ScriptSession> {
    const nonceCaller = random(32)
    const { seed, secret } = of.salter === undefined ? { seed: empty, secret: empty } : shareSeed(of.salter.public, 'SECRET', random)
    const { handle, parameters } = await this.must({
      code: command.startAuthSession,
      handles: [of.salter?.handle ?? known.null, of.bound?.handle ?? known.null],
      parameters: concat(sized(nonceCaller), sized(secret), u8(sessionType[type]), u16(alg.aes), u16(128), u16(alg.cfb), u16(alg.sha256)),
      givesHandle: true,
    })
    const nonceTpm = new Reader(parameters).sized().slice()
    // Bound to an entity with an empty value, or salted: a key there is, though it may be made of nothing.
    const keyed = of.bound !== undefined || of.salter !== undefined
    const key = keyed ? kdfA(alg.sha256, concat(of.bound?.auth ?? empty, seed), 'ATH', nonceTpm, nonceCaller, 256) : empty
    return { handle, key, nonceTpm }
  }
}

const handleOf = (one: number | { handle: number }): number => (typeof one === 'number' ? one : one.handle)

/** The bytes of a step, and the caller's nonce of each of its areas. */
export const commandBytes = (step: Step): { bytes: Uint8Array; nonces: readonly Uint8Array[] } => {
  const auths = step.auth ?? []
  const nonces = auths.map((one) => (one.session === undefined ? empty : random(32)))
  const parameters = encrypted(step.parameters ?? empty, auths, nonces)
  const names = (step.handles ?? []).map((one) => (typeof one === 'number' ? u32(one) : one.name))
  const hash = hashOf(u32(step.code), ...names, parameters)
  const areas = auths.map((one, at) => area(one, { hash, nonce: nonces[at] ?? empty, others: at === 0 ? otherNonces(auths) : [] }))
  const block = concat(...areas)
  const body = concat(...(step.handles ?? []).map((one) => u32(handleOf(one))), ...(auths.length === 0 ? [] : [u32(block.length), block]), parameters)
  return { bytes: concat(u16(auths.length === 0 ? tag.noSessions : tag.sessions), u32(10 + body.length), u32(step.code), body), nonces }
}

const encrypted = (parameters: Uint8Array, auths: readonly Authorisation[], nonces: readonly Uint8Array[]): Uint8Array => {
  const at = auths.findIndex((one) => one.session !== undefined && ((one.attributes ?? 0) & flag.decrypt) !== 0)
  const one = auths[at]
  if (one?.session === undefined) return parameters
  const reader = new Reader(parameters)
  const first = reader.sized()
  const { key, nonceTpm } = one.session
  return concat(sized(encryptParameter(key, one.encryptAuth ?? one.auth ?? empty, nonces[at] ?? empty, nonceTpm, first)), reader.rest())
}

const area = (one: Authorisation, of: { hash: Uint8Array; nonce: Uint8Array; others: readonly Uint8Array[] }): Uint8Array => {
  if ('raw' in one) return one.raw
  if (one.session === undefined) return concat(u32(known.password), sized(empty), u8(flag.continue), sized('password' in one ? one.password : empty))
  const { session, auth = empty, attributes = flag.continue } = one
  const mac = authorisation({ omitted: true, key: session.key, auth, hash: of.hash, newer: of.nonce, older: session.nonceTpm, others: of.others, attributes })
  return concat(u32(session.handle), sized(of.nonce), u8(attributes), sized(mac))
}

/** nonceTPM of the sessions that encrypt, when they are not the first (Part 1 §19.6.5). */
const otherNonces = (auths: readonly Authorisation[]): readonly Uint8Array[] => {
  const of = (bit: number): number => auths.findIndex((one) => one.session !== undefined && ((one.attributes ?? 0) & bit) !== 0)
  const [decrypting, encrypting] = [of(flag.decrypt), of(flag.encrypt)]
  return [decrypting, encrypting].filter((at, place, all) => at > 0 && all.indexOf(at) === place).map((at) => auths[at]?.session?.nonceTpm ?? empty)
}
