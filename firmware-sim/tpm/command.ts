import type { Accepts, Entity } from './entities.ts'
import type { Parameters } from './input.ts'
import type { Machine } from './machine.ts'
import { has, type Sequence, type TpmObject } from './objects.ts'
import { handleFault, rc, Refusal } from './refusal.ts'
import type { TpmSession } from './sessions.ts'
import type { NvIndex } from './nv.ts'
import { slots } from './machine.ts'
import { attribute } from '@fleetkey/tpm2/constants.ts'

/** How a handle's entity takes part: authorised in a role (Part 1 §19.2), or only named. */
export type Role = 'user' | 'admin' | 'duplicate' | 'none'

export interface HandleRule {
  readonly accepts: Accepts
  readonly role: Role
}

export interface Call {
  readonly machine: Machine
  readonly code: number
  readonly entities: readonly Entity[]
  /** Whether this TPM has a command. */
  readonly knows: (code: number) => boolean
}

export interface Answer {
  readonly handle?: number
  readonly parameters?: Uint8Array
}

/** One command of Part 3: what it takes, and what it does once everything it takes is there and authorised. */
export interface Command<P = unknown> {
  readonly handles: readonly HandleRule[]
  /** Whether the first parameter of the command, of the response, is a TPM2B that a session may encrypt. */
  readonly decrypt?: boolean
  readonly encrypt?: boolean
  /** Some commands take no sessions at all. */
  readonly sessions?: false
  /** For an NV index: its write attributes decide, not its read attributes. */
  readonly writesNv?: boolean
  readonly read: (parameters: Parameters) => P
  readonly run: (call: Call, parameters: P) => Answer | void
}

/** Keeps a command's parameter type to itself. */
export const command = <P>(of: Command<P>): Command => of as Command

export const user = (accepts: Accepts): HandleRule => ({ accepts, role: 'user' })
export const admin = (accepts: Accepts): HandleRule => ({ accepts, role: 'admin' })
export const duplicate = (accepts: Accepts): HandleRule => ({ accepts, role: 'duplicate' })
export const named = (accepts: Accepts): HandleRule => ({ accepts, role: 'none' })
export const nothing = (): undefined => undefined

const entityAt = (call: Call, at: number): Entity => {
  const entity = call.entities[at]
  if (entity === undefined) throw new Error(`no handle ${at}`)
  return entity
}

export const handleAt = (call: Call, at: number): number => entityAt(call, at).handle

/** The object in this place; null for the null handle. A sequence is none: TYPE. */
export const objectOrNullAt = (call: Call, at: number): TpmObject | null => {
  const entity = entityAt(call, at)
  if (entity.kind === 'permanent') return null
  if (entity.kind !== 'object') throw handleFault(at + 1, rc.type)
  return entity.object
}

export const objectAt = (call: Call, at: number): TpmObject => {
  const object = objectOrNullAt(call, at)
  if (object === null) throw handleFault(at + 1, rc.type)
  return object
}

export const sequenceAt = (call: Call, at: number): Sequence => {
  const entity = entityAt(call, at)
  if (entity.kind !== 'sequence') throw handleFault(at + 1, rc.mode)
  return entity.sequence
}

export const sessionAt = (call: Call, at: number): TpmSession => {
  const entity = entityAt(call, at)
  if (entity.kind !== 'session') throw handleFault(at + 1, rc.handle)
  return entity.session
}

export const nvAt = (call: Call, at: number): NvIndex => {
  const entity = entityAt(call, at)
  if (entity.kind !== 'nv') throw handleFault(at + 1, rc.handle)
  return call.machine.nv.get(entity.handle) ?? entity.index
}

/** Refuses when there is no slot for another object; commands that make one ask first. */
export const needRoom = (machine: Machine): void => {
  if (machine.objects.size >= slots.objects) throw new Refusal(rc.objectMemory)
}

/** Puts an object into a free slot; its handle. */
export const put = (machine: Machine, object: TpmObject | Sequence): number => {
  needRoom(machine)
  let handle = 0x8000_0000
  while (machine.objects.has(handle)) handle++
  machine.objects.set(handle, object)
  return handle
}

/** A key that signs, or none. Refuses with KEY. */
export const signerAt = (call: Call, at: number): TpmObject | null => {
  const entity = entityAt(call, at)
  if (entity.kind === 'sequence') throw handleFault(at + 1, rc.key)
  const key = objectOrNullAt(call, at)
  if (key !== null && !has(key, attribute.sign)) throw handleFault(at + 1, rc.key)
  return key
}
