import { concat, empty, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, handle as known } from '@fleetkey/tpm2/constants.ts'
import { slots, type Machine } from './machine.ts'
import { isSet, nameAlgOf, nvAttribute, nvName, type NvIndex } from './nv.ts'
import { has, trimmed, type Sequence, type TpmObject } from './objects.ts'
import { handleFault, rc, Refusal } from './refusal.ts'
import type { TpmSession } from './sessions.ts'

/** What a handle stands for. */
export type Entity =
  | { readonly kind: 'permanent' | 'pcr'; readonly handle: number; readonly name: Uint8Array }
  | { readonly kind: 'object'; readonly handle: number; readonly name: Uint8Array; readonly object: TpmObject }
  | { readonly kind: 'sequence'; readonly handle: number; readonly name: Uint8Array; readonly sequence: Sequence }
  | { readonly kind: 'nv'; readonly handle: number; readonly name: Uint8Array; readonly index: NvIndex }
  | { readonly kind: 'session'; readonly handle: number; readonly name: Uint8Array; readonly session: TpmSession }

/** Which handles a command takes in a place (TPMI types of Part 2 §9). */
export type Accepts = (handle: number) => boolean

const between =
  (first: number, last: number): Accepts =>
  (handle) =>
    handle >= first && handle <= last
const oneOf =
  (...handles: readonly number[]): Accepts =>
  (handle) =>
    handles.includes(handle)
const any =
  (...accepts: readonly Accepts[]): Accepts =>
  (handle) =>
    accepts.some((one) => one(handle))

const transient = between(0x8000_0000, 0x8000_0000 + slots.objects - 1)
const persistent = between(0x8100_0000, 0x81ff_ffff)
const hmacSession = between(0x0200_0000, 0x0200_0000 + slots.activeSessions - 1)
const policySession = between(0x0300_0000, 0x0300_0000 + slots.activeSessions - 1)
const nvIndex = between(0x0100_0000, 0x01ff_ffff)
const isPcr = between(0, 23)
const object = any(transient, persistent)

export const accepts = {
  object,
  objectOrNull: any(object, oneOf(known.null)),
  parentOrNull: any(object, oneOf(known.owner, known.platform, known.endorsement, known.null)),
  entity: any(oneOf(known.owner, known.endorsement, known.platform, known.lockout), object, nvIndex, isPcr),
  entityOrNull: any(oneOf(known.owner, known.endorsement, known.platform, known.lockout, known.null), object, nvIndex, isPcr),
  pcr: isPcr,
  pcrOrNull: any(isPcr, oneOf(known.null)),
  policySession,
  anySession: any(hmacSession, policySession),
  context: any(transient, hmacSession, policySession),
  saved: any(oneOf(0x8000_0000, 0x8000_0001, 0x8000_0002), hmacSession, policySession),
  persistent,
  hierarchyOrNull: oneOf(known.owner, known.platform, known.endorsement, known.null),
  hierarchyAuth: oneOf(known.owner, known.platform, known.endorsement, known.lockout),
  endorsement: oneOf(known.endorsement),
  provision: oneOf(known.owner, known.platform),
  clear: oneOf(known.lockout, known.platform),
  lockout: oneOf(known.lockout),
  nvAuth: any(oneOf(known.owner, known.platform), nvIndex),
  nvIndex,
} as const satisfies Readonly<Record<string, Accepts>>

/** Looks up what a handle stands for (EntityGetLoadStatus of Part 4). `number`: its place in the command, from 1. */
export const resolve = (machine: Machine, handle: number, number: number): Entity => {
  const name = u32(handle)
  switch (handle >>> 24) {
    case 0x00:
      return { kind: 'pcr', handle, name }
    case 0x01: {
      const index = machine.nv.get(handle)
      if (index === undefined) throw handleFault(number, rc.handle)
      return { kind: 'nv', handle, name: nvName(index), index }
    }
    case 0x02:
    case 0x03: {
      const session = machine.sessions.get(handle)
      if (session === undefined) throw new Refusal(rc.referenceH0 + number - 1)
      return { kind: 'session', handle, name, session }
    }
    case 0x40:
      return { kind: 'permanent', handle, name }
    default:
      return resolveObject(machine, handle, number)
  }
}

const resolveObject = (machine: Machine, handle: number, number: number): Entity => {
  if (handle >>> 24 === 0x81) {
    const found = machine.durable.persistent.get(handle)
    if (found === undefined) throw handleFault(number, rc.handle)
    // A persistent object is brought into a slot while it is used.
    if (machine.objects.size >= slots.objects) throw new Refusal(rc.objectMemory)
    return { kind: 'object', handle, name: found.name, object: found }
  }
  const found = machine.objects.get(handle)
  if (found === undefined) throw new Refusal(rc.referenceH0 + number - 1)
  if (found.kind === 'object') return { kind: 'object', handle, name: found.name, object: found }
  return { kind: 'sequence', handle, name: empty, sequence: found }
}

/** The authorisation value of an entity as it is now, without trailing zeros. */
export const authOf = (machine: Machine, entity: Entity): Uint8Array => {
  switch (entity.kind) {
    case 'permanent':
      return trimmed(machine.durable.auths[String(entity.handle)] ?? empty)
    case 'object':
      return entity.object.sensitive?.auth ?? empty
    case 'sequence':
      return entity.sequence.auth
    case 'nv':
      return trimmed((machine.nv.get(entity.handle) ?? entity.index).auth)
    default:
      return empty
  }
}

/** The policy of an entity and the hash it is made with; an empty digest when it has none. */
export const policyOf = (machine: Machine, entity: Entity): { readonly hash: number; readonly digest: Uint8Array } => {
  switch (entity.kind) {
    case 'permanent':
      return machine.durable.policies[String(entity.handle)] ?? { hash: alg.null, digest: empty }
    case 'object':
      return { hash: entity.object.public.nameAlg, digest: entity.object.public.authPolicy }
    case 'nv':
      return { hash: nameAlgOf(entity.index), digest: entity.index.policy }
    default:
      return { hash: alg.null, digest: empty }
  }
}

/** Whether wrong values for this entity do not count towards a lockout. */
export const isExempt = (entity: Entity): boolean => {
  switch (entity.kind) {
    case 'permanent':
      return entity.handle !== known.lockout
    case 'object':
      return has(entity.object, attribute.noDA)
    case 'nv':
      return isSet(entity.index, nvAttribute.noDA)
    default:
      return true
  }
}

/** What a session is bound to: the Name, and the value as it was (SessionComputeBoundEntity of Part 4). */
export const bindValue = (machine: Machine, entity: Entity): Uint8Array => {
  const value = new Uint8Array(68)
  value.set(entity.name)
  const auth = authOf(machine, entity)
  for (const [at, byte] of auth.entries()) {
    const place = value.length - auth.length + at
    value[place] = (value[place] ?? 0) ^ byte
  }
  return concat(value)
}
