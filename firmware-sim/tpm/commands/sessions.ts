import { concat, empty, sized } from '@fleetkey/tpm2/bytes.ts'
import { attribute, command as code, handle as known, sessionType } from '@fleetkey/tpm2/constants.ts'
import { command, named, sessionAt, type Call, type Command } from '../command.ts'
import { accepts, authOf, bindValue, isExempt, type Entity } from '../entities.ts'
import type { Input } from '../input.ts'
import { slots } from '../machine.ts'
import { has, isAsymmetric } from '../objects.ts'
import { digestBytes, hashAlg, secretBytes, sizeOfHash, symmetricSession } from '../readers.ts'
import { handleFault, parameter, rc, Refusal } from '../refusal.ts'
import { isUsable, sessionKeyOf, startPolicy, type TpmSession } from '../sessions.ts'
import { receiveSeed } from '../wrapping.ts'

const types: ReadonlyMap<number, TpmSession['type']> = new Map([
  [sessionType.hmac, 'hmac'],
  [sessionType.policy, 'policy'],
  [sessionType.trial, 'trial'],
] as const)

const readType = (input: Input): TpmSession['type'] => {
  const type = types.get(input.u8())
  if (type === undefined) throw new Refusal(rc.value)
  return type
}

/** The salt that only the holder of the key in the first handle can know. */
const saltOf = (call: Call, secret: Uint8Array): Uint8Array => {
  const [salter] = call.entities
  if (salter === undefined || salter.handle === known.null) {
    if (secret.length > 0) throw parameter(2, rc.value)
    return empty
  }
  if (salter.kind !== 'object' || !isAsymmetric(salter.object)) throw handleFault(1, rc.key)
  if (secret.length === 0) throw parameter(2, rc.value)
  if (salter.object.sensitive === null) throw handleFault(1, rc.handle)
  if (!has(salter.object, attribute.decrypt)) throw handleFault(1, rc.attributes)
  try {
    return receiveSeed(salter.object, secret, 'SECRET')
  } catch (error) {
    throw error instanceof Refusal ? parameter(2, rc.value) : error
  }
}

const boundEntity = (call: Call): Entity | null => {
  const bound = call.entities[1]
  if (bound === undefined || bound.handle === known.null) return null
  if (bound.kind === 'object' && bound.object.sensitive === null) throw handleFault(2, rc.handle)
  return bound
}

const freeNumber = ({ machine }: Call): number => {
  const taken = new Set([...machine.sessions.keys(), ...machine.savedSessions.keys()].map((handle) => handle & 0xff_ffff))
  return Array.from({ length: slots.activeSessions }, (_, at) => at).find((at) => !taken.has(at)) ?? 0
}

export const sessionCommands: readonly (readonly [number, Command])[] = [
  [
    code.startAuthSession,
    command({
      handles: [named(accepts.objectOrNull), named(accepts.entityOrNull)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({
        nonce: p.take(digestBytes),
        secret: p.take(secretBytes),
        type: p.take(readType),
        symmetric: p.take(symmetricSession),
        hash: p.take(hashAlg),
      }),
      run(call, { nonce, secret, type, symmetric, hash }) {
        const { machine } = call
        if (nonce.length < 16 || nonce.length > sizeOfHash(hash)) throw parameter(1, rc.size)
        const salt = saltOf(call, secret)
        const bound = boundEntity(call)
        if (!isUsable(symmetric)) throw parameter(4, rc.mode)
        if (machine.sessions.size >= slots.sessions) throw new Refusal(rc.sessionMemory)
        const handle = (type === 'hmac' ? 0x0200_0000 : 0x0300_0000) + freeNumber(call)
        const nonceTpm = machine.random(nonce.length)
        const value = bound === null ? empty : authOf(machine, bound)
        const session: TpmSession = {
          handle,
          type,
          hash,
          key: bound === null && salt.length === 0 ? empty : sessionKeyOf(hash, concat(value, salt), nonceTpm, nonce),
          bound: bound === null || type !== 'hmac' ? null : bindValue(machine, bound),
          daBound: bound !== null && !isExempt(bound),
          lockoutBound: bound?.handle === known.lockout,
          symmetric,
          nonceTpm,
          audit: false,
          includesAuth: false,
          policy: startPolicy(hash, machine.time),
        }
        machine.sessions.set(handle, session)
        return { handle, parameters: sized(nonceTpm) }
      },
    }),
  ],
  [
    code.policyRestart,
    command({
      handles: [named(accepts.policySession)],
      read: () => undefined,
      run(call) {
        const session = sessionAt(call, 0)
        session.policy = startPolicy(session.hash, call.machine.time)
      },
    }),
  ],
]
