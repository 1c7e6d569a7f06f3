import { concat, empty, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { attribute, command as code, handle as known, session as flag } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import { isCrypting, withAttribute, type Area } from './areas.ts'
import type { Command, Role } from './command.ts'
import { authOf, bindValue, isExempt, policyOf, type Entity } from './entities.ts'
import { Input } from './input.ts'
import { isLockedOut } from './lockout.ts'
import type { Machine } from './machine.ts'
import { isSet, nvAttribute } from './nv.ts'
import { has, trimmed } from './objects.ts'
import { rc, Refusal, sessionFault } from './refusal.ts'
import { cryptParameter, sessionMac, type TpmSession } from './sessions.ts'

/** A command with its handles resolved and its areas read. */
export interface Request {
  readonly machine: Machine
  readonly code: number
  readonly command: Command
  readonly entities: readonly Entity[]
  readonly areas: readonly Area[]
  /** Parameters as they came, the first one perhaps encrypted. */
  readonly parameters: Uint8Array
}

/** The entity that the area in this place authorises. */
const authorised = (request: Request, at: number): { entity: Entity; role: Exclude<Role, 'none'> } | null => {
  const [entity, rule] = [request.entities[at], request.command.handles[at]]
  return entity === undefined || rule === undefined || rule.role === 'none' ? null : { entity, role: rule.role }
}

const cpHash = (request: Request, hash: number): Uint8Array => digest(hash, u32(request.code), ...request.entities.map(({ name }) => name), request.parameters)

/** Whether no value will do in this role (Part 1 §19.2). */
const needsPolicy = (entity: Entity, role: Role): boolean =>
  role === 'duplicate' || (role === 'admin' && (entity.kind !== 'object' || has(entity.object, attribute.adminWithPolicy)))

const isValueAvailable = (request: Request, entity: Entity, role: Role): boolean => {
  if (entity.kind === 'object') return entity.object.sensitive !== null && (has(entity.object, attribute.userWithAuth) || role === 'admin')
  if (entity.kind === 'nv') return isSet(entity.index, request.command.writesNv === true ? nvAttribute.authWrite : nvAttribute.authRead)
  return true
}

const isPolicyAvailable = (request: Request, entity: Entity, role: Role): boolean => {
  if (entity.kind === 'object') return entity.object.sensitive !== null
  if (entity.kind === 'permanent') return policyOf(request.machine, entity).digest.length > 0
  if (entity.kind !== 'nv' || entity.index.policy.length === 0) return false
  return needsPolicy(entity, role) || isSet(entity.index, request.command.writesNv === true ? nvAttribute.policyWrite : nvAttribute.policyRead)
}

/** Refuses while locked out. The first use of a protected entity after a start is noted before it happens, and asked for again. */
const checkLockedOut = (machine: Machine, lockout: boolean): void => {
  if (lockout) {
    if (!machine.durable.lockout.enabled) throw new Refusal(rc.lockout)
    return
  }
  if (isLockedOut(machine.durable.lockout)) throw new Refusal(rc.lockout)
  if (machine.protectedUsed) return
  machine.protectedUsed = true
  machine.changed({ orderly: 'protected-used' })
  throw new Refusal(rc.retry)
}

/** A wrong value: counted for what is protected. */
const denied = (request: Request, area: Area, entity: Entity | null): Refusal => {
  const { session } = area
  const exempt = entity === null || isExempt(entity)
  if (session === null ? exempt : !session.daBound && (exempt || !session.includesAuth)) return new Refusal(rc.badAuth)
  request.machine.fail(session?.lockoutBound === true || entity?.handle === known.lockout)
  return new Refusal(rc.authFail)
}

const checkPolicy = (request: Request, session: TpmSession, entity: Entity, role: Role): void => {
  const { machine } = request
  const { policy } = session
  if (request.code === code.policySecret && !policy.needsPassword && !policy.needsAuth) throw new Refusal(rc.mode)
  if (policy.pcrUpdates !== null && policy.pcrUpdates !== machine.pcrs.updates) throw new Refusal(rc.pcrChanged)
  const wanted = policyOf(machine, entity)
  if (!sameMac(policy.digest, wanted.digest) || wanted.hash !== session.hash) throw new Refusal(rc.policyFail)
  if (policy.expires !== null && policy.expires < machine.time) throw new Refusal(rc.expired)
  if (policy.commandCode !== null) {
    if (policy.commandCode !== request.code) throw new Refusal(rc.policyCc)
  } else if (role !== 'user') throw new Refusal(rc.policyFail)
  if (policy.locality !== 0 && !isLocality(policy.locality, machine.locality)) throw new Refusal(rc.locality)
  if (policy.bound !== null && !sameMac(policy.bound.digest, boundDigest(request, session))) throw new Refusal(rc.policyFail)
  if (policy.nvWritten !== null && (entity.kind !== 'nv' || isSet(entity.index, nvAttribute.written) !== policy.nvWritten)) throw new Refusal(rc.policyFail)
}

const isLocality = (wanted: number, locality: number): boolean => (wanted < 32 ? (wanted & (1 << locality)) !== 0 : wanted === locality)

const boundDigest = (request: Request, session: TpmSession): Uint8Array =>
  session.policy.bound?.what === 'parameters' ? cpHash(request, session.hash) : digest(session.hash, ...request.entities.map(({ name }) => name))

/** One area against the entity it authorises (CheckAuthSession of Part 4). */
const checkArea = (request: Request, at: number, entity: Entity, role: Role): void => {
  const { machine } = request
  const area = request.areas[at]
  if (area === undefined) return
  const { session } = area
  if (session !== null) {
    const { policy, bound } = session
    session.includesAuth = session.type === 'policy' ? policy.needsAuth || policy.needsPassword : bound === null || !sameMac(bound, bindValue(machine, entity))
  }
  if ((session === null || session.includesAuth) && !isExempt(entity)) checkLockedOut(machine, entity.handle === known.lockout)
  if (session?.type === 'policy') {
    if (!isPolicyAvailable(request, entity, role)) throw new Refusal(rc.authUnavailable)
    checkPolicy(request, session, entity, role)
  } else {
    if (needsPolicy(entity, role)) throw new Refusal(rc.authType)
    if (!isValueAvailable(request, entity, role)) throw new Refusal(rc.authUnavailable)
  }
  if (session === null || session.policy.needsPassword) {
    if (!sameMac(trimmed(area.mac), authOf(machine, entity))) throw denied(request, area, entity)
  } else checkMac(request, at, session, entity)
}

const checkMac = (request: Request, at: number, session: TpmSession, entity: Entity | null): void => {
  const area = request.areas[at]
  if (area === undefined) return
  const expected = sessionMac(session, {
    auth: entity !== null && session.includesAuth ? authOf(request.machine, entity) : empty,
    omitted: area.mac.length === 0,
    hash: cpHash(request, session.hash),
    newer: area.nonce,
    older: session.nonceTpm,
    others: at === 0 && entity !== null ? otherNonces(request.areas) : [],
    attributes: area.attributes,
  })
  if (!sameMac(expected, area.mac)) throw denied(request, area, entity)
}

/** The first session's HMAC also covers the nonces of other sessions that encrypt (Part 1 §19.6.5). */
const otherNonces = (areas: readonly Area[]): readonly Uint8Array[] => {
  const places = [withAttribute(areas, flag.decrypt), withAttribute(areas, flag.encrypt)]
  return places.filter((place, at) => place > 0 && places.indexOf(place) === at).map((place) => areas[place]?.session?.nonceTpm ?? empty)
}

/** Checks every area (ParseSessionBuffer of Part 4); the parameters in clear. */
export const authorise = (request: Request): Uint8Array => {
  const { machine, command, areas } = request
  for (const at of command.handles.keys()) if (authorised(request, at) !== null && at >= areas.length) throw new Refusal(rc.authMissing)
  for (const [at, area] of areas.entries()) {
    try {
      const whom = authorised(request, at)
      if (area.session === null && whom === null) throw new Refusal(rc.handle)
      if (area.session?.type === 'trial') throw new Refusal(rc.attributes)
      if (area.session?.daBound === true) checkLockedOut(machine, area.session.lockoutBound)
      if (whom !== null) checkArea(request, at, whom.entity, whom.role)
      else if (area.session !== null) {
        if (!isCrypting(area)) throw new Refusal(rc.attributes)
        area.session.includesAuth = false
        checkMac(request, at, area.session, null)
      }
    } catch (error) {
      throw error instanceof Refusal ? sessionFault(at + 1, error.rc) : error
    }
  }
  return decrypted(request)
}

/** The value that parameter encryption uses: the entity's, whether the HMAC covers it or not (Part 1 §21.2). */
const extraKey = (request: Request, at: number): Uint8Array => {
  const whom = authorised(request, at)
  return whom === null ? empty : authOf(request.machine, whom.entity)
}

const decrypted = (request: Request): Uint8Array => {
  const at = withAttribute(request.areas, flag.decrypt)
  const area = request.areas[at]
  if (area === undefined || area.session === null || request.parameters.length < 2) return request.parameters
  const input = new Input(request.parameters)
  const size = input.u16()
  if (size > request.parameters.length) throw sessionFault(at + 1, rc.size)
  const first = input.bytes(Math.min(size, input.left))
  const of = { auth: extraKey(request, at), newer: area.nonce, older: area.session.nonceTpm, decrypt: true }
  return concat(u16(size), cryptParameter(area.session, of, first), input.rest())
}

/** The response's first parameter, encrypted for the session that asked for it. Nonces are the new ones. */
export const encrypted = (request: Request, output: Uint8Array): Uint8Array => {
  const at = withAttribute(request.areas, flag.encrypt)
  const area = request.areas[at]
  if (area === undefined || area.session === null) return output
  const input = new Input(output)
  const first = input.sized(0xffff)
  const of = { auth: extraKey(request, at), newer: area.session.nonceTpm, older: area.nonce, decrypt: false }
  return concat(sized(cryptParameter(area.session, of, first)), input.rest())
}

/** HMAC of the response for the session in this place. */
export const responseMac = (request: Request, at: number, session: TpmSession, attributes: number, output: Uint8Array): Uint8Array => {
  const area = request.areas[at]
  if (area === undefined || session.policy.needsPassword) return empty
  const whom = authorised(request, at)
  return sessionMac(session, {
    auth: whom !== null && session.includesAuth ? authOf(request.machine, whom.entity) : empty,
    omitted: area.mac.length === 0,
    hash: digest(session.hash, u32(0), u32(request.code), output),
    newer: session.nonceTpm,
    older: area.nonce,
    others: [],
    attributes,
  })
}
