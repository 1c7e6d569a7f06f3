import { createHash, createHmac } from 'node:crypto'
import { concat, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, command as code, generated, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import { digest, hashName, hmac } from '@fleetkey/tpm2/kdf.ts'
import { command, handleAt, needRoom, objectAt, put, sequenceAt, user, type Answer, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import type { Input } from '../input.ts'
import type { Machine } from '../machine.ts'
import { has, trimmed } from '../objects.ts'
import { digestBytes, hashAlg, hashOrNull, hierarchyOrNull, maxBuffer, sizeOfHash } from '../readers.ts'
import { handleFault, parameter, rc, Refusal } from '../refusal.ts'
import { marshalTicket, nullTicket, ticketDigest } from '../tickets.ts'
import { extendEvent, eventDigests } from './pcr.ts'

/** Key and hash of an HMAC; `asked` null: the key's own. */
const hmacKey = (call: Call, asked: number | null): { secret: Uint8Array; hash: number } => {
  const key = objectAt(call, 0)
  if (key.public.type !== alg.keyedhash || key.sensitive === null) throw handleFault(1, rc.type)
  if (has(key, attribute.restricted)) throw handleFault(1, rc.attributes)
  if (!has(key, attribute.sign)) throw handleFault(1, rc.key)
  const own = key.public.scheme?.hash ?? null
  const hash = own === null ? asked : asked === null || asked === own ? own : null
  if (hash === null) throw parameter(2, rc.value)
  return { secret: key.sensitive.secret, hash }
}

/** TPMI_ALG_MAC_SCHEME: the command is also TPM2_MAC, whose ciphers are not here. */
const macScheme = (input: Input): number | null => {
  const scheme = input.u16()
  if (scheme === alg.null) return null
  if (sizeOfHash(scheme) === 0) throw new Refusal(rc.symmetric)
  return scheme
}

/** Data that begins like the TPM's own statements must not be signed by a restricted key (Part 1 §31.4.3). */
const isStatement = (data: Uint8Array): boolean => Buffer.compare(data.subarray(0, 4), u32(generated)) === 0
/** Of a sequence the first block must be long enough to tell. */
const isSafe = (first: Uint8Array): boolean => first.length >= 4 && !isStatement(first)

const hashed = (machine: Machine, hierarchy: number, of: { hash: number; digest: Uint8Array; safe: boolean }): Answer => {
  const good = hierarchy !== known.null && of.safe
  const ticket = good ? marshalTicket(tag.hashcheck, hierarchy, ticketDigest.hash(machine, hierarchy, of)) : nullTicket(tag.hashcheck)
  return { parameters: concat(sized(of.digest), ticket) }
}

const hashStart = ({ machine }: Call, auth: Uint8Array, hash: number | null): Answer => {
  const kept = { kind: 'sequence', auth: trimmed(auth) } as const
  const start = (of: number): ReturnType<typeof createHash> => createHash(hashName(of).name)
  if (hash !== null) return { handle: put(machine, { ...kept, work: { kind: 'hash', hash, state: start(hash), firstBlock: null } }) }
  return { handle: put(machine, { ...kept, work: { kind: 'event', states: new Map(eventDigests.map((of) => [of, start(of)])) } }) }
}

const update = (call: Call, data: Uint8Array): void => {
  // The reference implementation blames the first parameter for the wrong handle.
  if (call.entities[0]?.kind !== 'sequence') throw parameter(1, rc.mode)
  const { work } = sequenceAt(call, 0)
  if (work.kind === 'event') for (const state of work.states.values()) state.update(data)
  else {
    if (work.kind === 'hash') work.firstBlock ??= data
    work.state.update(data)
  }
}

const complete = (call: Call, { data, hierarchy }: { data: Uint8Array; hierarchy: number }): Answer => {
  const { work } = sequenceAt(call, 0)
  if (work.kind === 'event') throw handleFault(1, rc.mode)
  const result = new Uint8Array(work.state.update(data).digest())
  call.machine.objects.delete(handleAt(call, 0))
  if (work.kind === 'hmac') return { parameters: concat(sized(result), nullTicket(tag.hashcheck)) }
  return hashed(call.machine, hierarchy, { hash: work.hash, digest: result, safe: isSafe(work.firstBlock ?? data) })
}

const completeEvent = (call: Call, data: Uint8Array): Answer => {
  const { work } = sequenceAt(call, 1)
  if (work.kind !== 'event') throw handleFault(2, rc.mode)
  const digests = [...work.states].map(([hash, state]) => ({ hash, digest: () => new Uint8Array(state.update(data).digest()) }))
  const values = extendEvent(call, digests)
  call.machine.objects.delete(handleAt(call, 1))
  return { parameters: concat(u32(values.length), ...values.map(({ hash, digest: value }) => concat(u16(hash), value))) }
}

/** Hashes and HMACs, in one go and in sequences. */
export const hashingCommands: readonly (readonly [number, Command])[] = [
  [
    code.hash,
    command({
      handles: [],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ data: p.take(maxBuffer), hash: p.take(hashAlg), hierarchy: p.take(hierarchyOrNull) }),
      run: ({ machine }, { data, hash, hierarchy }) => hashed(machine, hierarchy, { hash, digest: digest(hash, data), safe: !isStatement(data) }),
    }),
  ],
  [
    code.hmac,
    command({
      handles: [user(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ data: p.take(maxBuffer), asked: p.take(macScheme) }),
      run(call, { data, asked }) {
        const { secret, hash } = hmacKey(call, asked)
        return { parameters: sized(hmac(hash, secret, data)) }
      },
    }),
  ],
  [
    code.hmacStart,
    command({
      handles: [user(accepts.object)],
      decrypt: true,
      read: (p) => ({ auth: p.take(digestBytes), asked: p.take(macScheme) }),
      run(call, { auth, asked }) {
        const { secret, hash } = hmacKey(call, asked)
        needRoom(call.machine)
        const state = createHmac(hashName(hash).name, secret)
        return { handle: put(call.machine, { kind: 'sequence', auth: trimmed(auth), work: { kind: 'hmac', state } }) }
      },
    }),
  ],
  [
    code.hashSequenceStart,
    command({
      handles: [],
      decrypt: true,
      read: (p) => ({ auth: p.take(digestBytes), hash: p.take(hashOrNull) }),
      run: (call, { auth, hash }) => hashStart(call, auth, hash),
    }),
  ],
  [code.sequenceUpdate, command({ handles: [user(accepts.object)], decrypt: true, read: (p) => p.take(maxBuffer), run: update })],
  [
    code.sequenceComplete,
    command({
      handles: [user(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ data: p.take(maxBuffer), hierarchy: p.take(hierarchyOrNull) }),
      run: complete,
    }),
  ],
  [
    code.eventSequenceComplete,
    command({ handles: [user(accepts.pcrOrNull), user(accepts.object)], decrypt: true, read: (p) => p.take(maxBuffer), run: completeEvent }),
  ],
]
