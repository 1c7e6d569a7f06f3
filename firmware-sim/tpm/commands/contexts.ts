import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { concat, sized, u32, u64 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, command as code, handle as known } from '@fleetkey/tpm2/constants.ts'
import { cfbDecrypt, cfbEncrypt, digest, hmac } from '@fleetkey/tpm2/kdf.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import { command, handleAt, named, put, user, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import { Input } from '../input.ts'
import { slots, type Machine } from '../machine.ts'
import { has } from '../objects.ts'
import { hierarchyOrNull } from '../readers.ts'
import { handleFault, parameter, rc, Refusal } from '../refusal.ts'
import type { TpmSession } from '../sessions.ts'
import { packObject, unpackObject } from '../state.ts'

/** Part of a context that the TPM keeps to itself: encrypted and bound to its sequence number, handle and hierarchy (Part 1 §30). */
interface Context {
  readonly sequence: bigint
  readonly handle: number
  readonly hierarchy: number
}

const keyOf = (machine: Machine): Uint8Array => digest(alg.sha256, machine.nullSeed, machine.durable.proof)
const header = ({ sequence, handle, hierarchy }: Context): Uint8Array => concat(u64(sequence), u32(handle), u32(hierarchy))
const macOf = (machine: Machine, of: Context, encrypted: Uint8Array): Uint8Array => hmac(alg.sha512, keyOf(machine), header(of), encrypted)

const seal = (machine: Machine, of: Context, content: unknown): Uint8Array => {
  const iv = machine.random(16)
  const encrypted = concat(iv, cfbEncrypt(keyOf(machine), encode(content), iv))
  return concat(sized(macOf(machine, of, encrypted)), encrypted)
}

/** A blob too short for its integrity value is refused without saying which parameter it was, as the reference implementation does. */
const open = (machine: Machine, of: Context, blob: Uint8Array): unknown => {
  const input = new Input(blob)
  const mac = input.sized(64)
  const encrypted = input.rest()
  if (mac.length !== 64 || encrypted.length < 8) throw parameter(1, rc.size)
  if (!sameMac(mac, macOf(machine, of, encrypted))) throw parameter(1, rc.integrity)
  return decode(cfbDecrypt(keyOf(machine), encrypted.subarray(16), encrypted.subarray(0, 16)))
}

const saved = (context: Context, machine: Machine, content: unknown): Uint8Array => concat(header(context), sized(seal(machine, context, content)))

/** A session leaves the TPM with its context. */
const saveSession = (machine: Machine, session: TpmSession): Uint8Array => {
  machine.contextSequence++
  machine.sessions.delete(session.handle)
  machine.savedSessions.set(session.handle, machine.contextSequence)
  return saved({ sequence: machine.contextSequence, handle: session.handle, hierarchy: known.null }, machine, { session: { ...session } })
}

/** An object stays until it is flushed. */
const saveObject = (call: Call): Uint8Array => {
  const { machine } = call
  const object = machine.objects.get(handleAt(call, 0))
  // A hash under way cannot be taken out of node:crypto; the reference implementation can.
  if (object?.kind !== 'object') throw handleFault(1, rc.type)
  machine.objectSequence++
  const handle = has(object, attribute.stClear) ? 0x8000_0002 : 0x8000_0000
  return saved({ sequence: machine.objectSequence, handle, hierarchy: object.hierarchy }, machine, { object: packObject(object) })
}

/** TPMS_CONTEXT. */
const contextStructure = (input: Input): { context: Context; blob: Uint8Array } => {
  const sequence = input.u64()
  const handle = input.u32()
  if (!accepts.saved(handle)) throw new Refusal(rc.value)
  return { context: { sequence, handle, hierarchy: hierarchyOrNull(input) }, blob: input.sized(2680 + 500) }
}

const loadSession = (machine: Machine, context: Context, session: TpmSession): number => {
  // Only the newest context of a session is good, and only once.
  if (machine.savedSessions.get(session.handle) !== context.sequence) throw parameter(1, rc.handle)
  if (machine.sessions.size >= slots.sessions) throw new Refusal(rc.sessionMemory)
  machine.savedSessions.delete(session.handle)
  machine.sessions.set(session.handle, session)
  return session.handle
}

const contextHandle = (input: Input): number => {
  const handle = input.u32()
  if (!accepts.context(handle)) throw new Refusal(rc.value)
  return handle
}

const persistentHandle = (input: Input): number => {
  const handle = input.u32()
  if (!accepts.persistent(handle)) throw new Refusal(rc.value)
  return handle
}

/** The platform's persistent handles are the upper half. */
const isPlatforms = (handle: number): boolean => handle >= 0x8180_0000

const evict = (call: Call, handle: number): void => {
  const { machine } = call
  const [auth, entity] = call.entities
  if (entity?.kind !== 'object' || entity.object.sensitive === null || entity.object.hierarchy === known.null || has(entity.object, attribute.stClear))
    throw handleFault(2, rc.attributes)
  const isPersistent = accepts.persistent(entity.handle)
  if (isPersistent && entity.handle !== handle) throw handleFault(2, rc.handle)
  const platform = auth?.handle === known.platform
  if (platform ? !isPersistent && entity.object.hierarchy !== known.platform : entity.object.hierarchy === known.platform) throw handleFault(2, rc.hierarchy)
  if (!isPersistent && isPlatforms(handle) !== platform) throw parameter(1, rc.range)
  const persistent = new Map(machine.durable.persistent)
  if (isPersistent) persistent.delete(handle)
  else if (persistent.has(handle)) throw new Refusal(rc.nvDefined)
  else if (persistent.size >= slots.persistent) throw new Refusal(rc.nvSpace)
  else persistent.set(handle, entity.object)
  machine.changed({ persistent })
}

/** Saving, loading, flushing what is loaded; what is to stay without power. */
export const contextCommands: readonly (readonly [number, Command])[] = [
  [
    code.contextSave,
    command({
      handles: [named(accepts.context)],
      sessions: false,
      read: () => undefined,
      run(call) {
        const [entity] = call.entities
        call.machine.disorder()
        return { parameters: entity?.kind === 'session' ? saveSession(call.machine, entity.session) : saveObject(call) }
      },
    }),
  ],
  [
    code.contextLoad,
    command({
      handles: [],
      sessions: false,
      read: (p) => p.take(contextStructure),
      run({ machine }, { context, blob }) {
        const content = open(machine, context, blob) as { object?: unknown; session?: TpmSession }
        machine.disorder()
        if (content.session !== undefined) return { handle: loadSession(machine, context, content.session) }
        return { handle: put(machine, unpackObject(content.object)) }
      },
    }),
  ],
  [
    code.flushContext,
    command({
      handles: [],
      sessions: false,
      read: (p) => p.take(contextHandle),
      run({ machine }, handle) {
        if (machine.exclusiveSession === handle) machine.exclusiveSession = null
        const found = machine.objects.delete(handle) || machine.sessions.delete(handle) || machine.savedSessions.delete(handle)
        if (!found) throw parameter(1, rc.handle)
      },
    }),
  ],
  [code.evictControl, command({ handles: [user(accepts.provision), named(accepts.object)], read: (p) => p.take(persistentHandle), run: evict })],
]
