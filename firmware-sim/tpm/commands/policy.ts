import { concat, empty, sized, u32, u64, u8 } from '@fleetkey/tpm2/bytes.ts'
import { command as code, tag } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import { marshalPcrSelection } from '@fleetkey/tpm2/structures.ts'
import { command, named, objectAt, sessionAt, user, type Answer, type Call, type Command } from '../command.ts'
import { accepts, type Entity } from '../entities.ts'
import type { Input, Parameters } from '../input.ts'
import { present } from '../pcrs.ts'
import { digestBytes, nameBytes, pcrSelection, signature, sizeOfHash, u32 as readU32, verifiedTicket, yesNo } from '../readers.ts'
import { asParameter, parameter, rc, Refusal } from '../refusal.ts'
import type { PolicyState, TpmSession } from '../sessions.ts'
import { verifyDigest } from '../signing.ts'
import { marshalTicket, nullTicket, ticketDigest } from '../tickets.ts'

const policyAt = (call: Call): TpmSession => sessionAt(call, call.entities.length - 1)
const isTrial = (session: TpmSession): boolean => session.type === 'trial'

/** The digest grows by a command and what it says; other conditions are kept beside it. */
const extend = (session: TpmSession, number: number, parts: readonly Uint8Array[], change: Partial<PolicyState> = {}): void => {
  session.policy = { ...session.policy, digest: digest(session.hash, session.policy.digest, u32(number), ...parts), ...change }
}

/** PolicyUpdate of Part 3 §23: H(H(old ‖ CC ‖ name) ‖ ref). */
const extendByEntity = (session: TpmSession, number: number, of: { name: Uint8Array; ref: Uint8Array }): void => {
  extend(session, number, [of.name])
  session.policy = { ...session.policy, digest: digest(session.hash, session.policy.digest, of.ref) }
}

interface Assertion {
  readonly nonce: Uint8Array
  readonly cpHash: Uint8Array
  readonly ref: Uint8Array
  /** Seconds; negative: a ticket is wanted. */
  readonly expiration: number
}

const readAssertion = (p: Parameters): Assertion => ({
  nonce: p.take(digestBytes),
  cpHash: p.take(digestBytes),
  ref: p.take(digestBytes),
  expiration: p.take(readU32) | 0,
})

/** Milliseconds since power on when an assertion ends; null: never. */
const timeoutOf = (call: Call, session: TpmSession, { nonce, expiration }: Assertion): number | null => {
  if (expiration === 0) return null
  const milliseconds = Math.min(Math.abs(expiration), 0x7fff_ffff) * 1000
  return nonce.length === 0 ? milliseconds + (call.machine.time % 1000) : session.policy.startTime + milliseconds
}

/** PolicyParameterChecks of Part 4. */
const checkAssertion = (call: Call, session: TpmSession, of: Assertion): number | null => {
  const timeout = timeoutOf(call, session, of)
  if (of.nonce.length > 0 && !sameMac(of.nonce, session.nonceTpm)) throw parameter(1, rc.nonce)
  if (timeout !== null && timeout < call.machine.time) throw parameter(4, rc.expired)
  if (of.cpHash.length > 0) {
    if (of.cpHash.length !== sizeOfHash(session.hash)) throw parameter(2, rc.size)
    if (session.policy.bound !== null && !sameMac(session.policy.bound.digest, of.cpHash)) throw new Refusal(rc.cpHash)
  }
  return timeout
}

const asserted = (session: TpmSession, of: Assertion, timeout: number | null): void => {
  const { bound, expires } = session.policy
  session.policy = {
    ...session.policy,
    bound: of.cpHash.length > 0 ? { what: 'parameters', digest: of.cpHash } : bound,
    expires: timeout === null ? expires : Math.min(timeout, expires ?? timeout),
  }
}

const hierarchyOf = (entity: Entity | undefined): number => (entity?.kind === 'object' ? entity.object.hierarchy : (entity?.handle ?? 0))

const policySecret = (call: Call, of: Assertion): Answer => {
  const session = policyAt(call)
  const [entity] = call.entities
  const name = entity?.name ?? empty
  const timeout = isTrial(session) ? null : checkAssertion(call, session, of)
  extendByEntity(session, code.policySecret, { name, ref: of.ref })
  asserted(session, of, timeout)
  if (of.expiration >= 0 || timeout === null) return { parameters: concat(sized(empty), nullTicket(tag.authSecret)) }
  const bytes = u64(BigInt(timeout))
  const hierarchy = hierarchyOf(entity)
  const ticket = ticketDigest.secret(call.machine, hierarchy, { timeout: bytes, cpHash: of.cpHash, ref: of.ref, name })
  return { parameters: concat(sized(bytes), marshalTicket(tag.authSecret, hierarchy, ticket)) }
}

/** An outside key's word, over this session's nonce, an expiration, a command and a reference. */
const policySigned = (call: Call, of: Assertion & { signed: ReturnType<typeof signature> }): Answer => {
  const session = policyAt(call)
  const key = objectAt(call, 0)
  const timeout = isTrial(session) ? null : checkAssertion(call, session, of)
  if (!isTrial(session)) {
    const hash = digest(of.signed.hash, of.nonce, u32(of.expiration >>> 0), of.cpHash, of.ref)
    asParameter(5, () => verifyDigest(key, hash, of.signed))
  }
  extendByEntity(session, code.policySigned, { name: key.name, ref: of.ref })
  asserted(session, of, timeout)
  // Tickets of signed assertions are not made: nobody here redeems them (TPM2_PolicyTicket is not implemented).
  return { parameters: concat(sized(empty), nullTicket(tag.authSigned)) }
}

const digests = (input: Input): readonly Uint8Array[] => {
  const count = input.u32()
  if (count < 2 || count > 8) throw new Refusal(rc.size)
  return Array.from({ length: count }, () => input.sized(64).slice())
}

const policyOr = (call: Call, branches: readonly Uint8Array[]): void => {
  const session = policyAt(call)
  if (!isTrial(session) && !branches.some((branch) => sameMac(branch, session.policy.digest))) throw parameter(1, rc.value)
  session.policy = { ...session.policy, digest: digest(session.hash, new Uint8Array(sizeOfHash(session.hash)), u32(code.policyOr), ...branches) }
}

const policyPcr = (call: Call, { expected, banks }: { expected: Uint8Array; banks: ReturnType<typeof pcrSelection> }): void => {
  const { pcrs } = call.machine
  const session = policyAt(call)
  const { pcrUpdates } = session.policy
  const now = pcrs.digestOf(session.hash, banks)
  if (!isTrial(session)) {
    if (pcrUpdates !== null && pcrUpdates !== pcrs.updates) throw new Refusal(rc.pcrChanged)
    if (expected.length > 0 && !sameMac(expected, now)) throw parameter(1, rc.value)
  }
  const used = isTrial(session) && expected.length > 0 ? expected : now
  extend(session, code.policyPcr, [marshalPcrSelection(present(banks)), used], isTrial(session) ? {} : { pcrUpdates: pcrs.updates })
}

interface Authorize {
  readonly approved: Uint8Array
  readonly ref: Uint8Array
  readonly keyName: Uint8Array
  readonly ticket: { readonly hierarchy: number; readonly digest: Uint8Array }
}

const policyAuthorize = (call: Call, { approved, ref, keyName, ticket }: Authorize): void => {
  const session = policyAt(call)
  const hash = ((keyName[0] ?? 0) << 8) | (keyName[1] ?? 0)
  if (sizeOfHash(hash) === 0) throw parameter(3, rc.hash)
  if (keyName.length !== sizeOfHash(hash) + 2) throw parameter(3, rc.size)
  if (!isTrial(session)) {
    if (!sameMac(approved, session.policy.digest)) throw parameter(1, rc.value)
    const expected = ticketDigest.verified(call.machine, ticket.hierarchy, digest(hash, approved, ref), keyName)
    if (!sameMac(ticket.digest, expected)) throw parameter(4, rc.value)
  }
  session.policy = { ...session.policy, digest: new Uint8Array(sizeOfHash(session.hash)) }
  extendByEntity(session, code.policyAuthorize, { name: keyName, ref })
}

const policyCommandCode = (call: Call, wanted: number): void => {
  const session = policyAt(call)
  if (session.policy.commandCode !== null && session.policy.commandCode !== wanted) throw parameter(1, rc.value)
  if (!call.knows(wanted)) throw parameter(1, rc.policyCc)
  extend(session, code.policyCommandCode, [u32(wanted)], { commandCode: wanted })
}

const policyLocality = (call: Call, wanted: number): void => {
  const session = policyAt(call)
  const before = session.policy.locality
  if (wanted === 0 || (before !== 0 && before < 32 !== wanted < 32)) throw parameter(1, rc.range)
  if (wanted >= 32 && before !== 0 && before !== wanted) throw parameter(1, rc.range)
  const locality = wanted < 32 ? (before === 0 ? 0x1f : before) & wanted : wanted
  if (locality === 0) throw parameter(1, rc.range)
  extend(session, code.policyLocality, [u8(wanted)], { locality })
}

const policyCpHash = (call: Call, hash: Uint8Array): void => {
  const session = policyAt(call)
  const { bound } = session.policy
  if (hash.length !== sizeOfHash(session.hash)) throw parameter(1, rc.size)
  if (bound !== null && (bound.what !== 'parameters' || !sameMac(bound.digest, hash))) throw new Refusal(rc.cpHash)
  extend(session, code.policyCpHash, [hash], { bound: { what: 'parameters', digest: hash } })
}

const policyNameHash = (call: Call, hash: Uint8Array): void => {
  const session = policyAt(call)
  if (hash.length !== sizeOfHash(session.hash)) throw parameter(1, rc.size)
  if (session.policy.bound !== null) throw new Refusal(rc.cpHash)
  extend(session, code.policyNameHash, [hash], { bound: { what: 'names', digest: hash } })
}

const policyDuplicationSelect = (call: Call, of: { object: Uint8Array; newParent: Uint8Array; include: boolean }): void => {
  const session = policyAt(call)
  if (session.policy.bound !== null) throw new Refusal(rc.cpHash)
  if (session.policy.commandCode !== null) throw new Refusal(rc.commandCode)
  const names = [...(of.include ? [of.object] : []), of.newParent, u8(of.include ? 1 : 0)]
  const bound = { what: 'names', digest: digest(session.hash, of.object, of.newParent) } as const
  extend(session, code.policyDuplicationSelect, names, { bound, commandCode: code.duplicate })
}

const policyNvWritten = (call: Call, written: boolean): void => {
  const session = policyAt(call)
  if (session.policy.nvWritten !== null && session.policy.nvWritten !== written) throw parameter(1, rc.value)
  extend(session, code.policyNvWritten, [u8(written ? 1 : 0)], { nvWritten: written })
}

/** PolicyAuthValue and PolicyPassword are the same in the digest: how the value is shown is up to whoever uses the object. */
const policyValue = (call: Call, how: 'needsAuth' | 'needsPassword'): void =>
  extend(policyAt(call), code.policyAuthValue, [], { needsAuth: how === 'needsAuth', needsPassword: how === 'needsPassword' })

const onSession = [named(accepts.policySession)]

export const policyCommands: readonly (readonly [number, Command])[] = [
  [code.policySecret, command({ handles: [user(accepts.entity), ...onSession], decrypt: true, encrypt: true, read: readAssertion, run: policySecret })],
  [
    code.policySigned,
    command({
      handles: [named(accepts.object), ...onSession],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ ...readAssertion(p), signed: p.take(signature) }),
      run: policySigned,
    }),
  ],
  [code.policyOr, command({ handles: onSession, read: (p) => p.take(digests), run: policyOr })],
  [
    code.policyPcr,
    command({ handles: onSession, decrypt: true, read: (p) => ({ expected: p.take(digestBytes), banks: p.take(pcrSelection) }), run: policyPcr }),
  ],
  [
    code.policyAuthorize,
    command({
      handles: onSession,
      decrypt: true,
      read: (p): Authorize => ({ approved: p.take(digestBytes), ref: p.take(digestBytes), keyName: p.take(nameBytes), ticket: p.take(verifiedTicket) }),
      run: policyAuthorize,
    }),
  ],
  [code.policyCommandCode, command({ handles: onSession, read: (p) => p.take(readU32), run: policyCommandCode })],
  [code.policyLocality, command({ handles: onSession, read: (p) => p.take((input) => input.u8()), run: policyLocality })],
  [code.policyCpHash, command({ handles: onSession, decrypt: true, read: (p) => p.take(digestBytes), run: policyCpHash })],
  [code.policyNameHash, command({ handles: onSession, decrypt: true, read: (p) => p.take(digestBytes), run: policyNameHash })],
  [
    code.policyDuplicationSelect,
    command({
      handles: onSession,
      decrypt: true,
      read: (p) => ({ object: p.take(nameBytes), newParent: p.take(nameBytes), include: p.take(yesNo) }),
      run: policyDuplicationSelect,
    }),
  ],
  [code.policyNvWritten, command({ handles: onSession, read: (p) => p.take(yesNo), run: policyNvWritten })],
  [code.policyAuthValue, command({ handles: onSession, read: () => undefined, run: (call) => policyValue(call, 'needsAuth') })],
  [code.policyPassword, command({ handles: onSession, read: () => undefined, run: (call) => policyValue(call, 'needsPassword') })],
  [
    code.policyGetDigest,
    command({ handles: onSession, encrypt: true, read: () => undefined, run: (call) => ({ parameters: sized(policyAt(call).policy.digest) }) }),
  ],
]
