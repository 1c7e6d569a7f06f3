import { concat, empty, Reader, sized, TpmFormatError, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { attribute, handle as known, session as flag, tag } from '@fleetkey/tpm2/constants.ts'
import { authorisation, decryptParameter, encryptParameter, hashOf, sameMac } from '@fleetkey/tpm2/session.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import { commands, type Call, type Command } from './commands.ts'
import { Nv, nvAttribute, nvName, type NvIndex } from './nv.ts'
import { has, type Sequence, type TpmObject } from './objects.ts'
import { Pcrs } from './pcrs.ts'
import { handleFault, rc, Refusal, sessionFault } from './refusal.ts'
import type { TpmSession } from './sessions.ts'
import { freshState, packState, unpackState, type Durable } from './state.ts'

export interface SoftwareTpmOptions {
  /** What `save` was last handed; without it the TPM is new. */
  readonly state?: Uint8Array
  readonly random: (length: number) => Uint8Array
  readonly now: () => number
  /** Called whenever what survives a loss of power has changed. */
  readonly save?: (state: Uint8Array) => void
}

/**
 * A TPM 2.0 in this process: a simulator, not a security boundary, and it says so (manufacturer FKSM). It speaks the TPM's wire protocol for the commands that
 * Fleetkey's agent and tpm2-tools use, with real authorisation, sessions and parameter encryption. P-256, HMAC and sealed objects; the SHA-256 bank.
 */
export interface SoftwareTpm {
  /** One command, its response. Whatever comes in, a well-formed response comes out. */
  execute(command: Uint8Array): Uint8Array
  /** Loss of power: PCRs, loaded objects and sessions are gone. `startup` says whether the firmware starts the TPM (its ROM does). */
  powerCycle(): void
  /** What the boot ROM measures, without a command. */
  extend(pcr: number, digest: Uint8Array): void
  /** The factory's way into NV: readable by owner and platform. */
  writeNv(index: number, bytes: Uint8Array): void
  state(): Uint8Array
  transport(): Transport
}

/** Everything a command can reach. */
export interface Machine {
  durable: Durable
  nv: Nv
  readonly pcrs: Pcrs
  readonly objects: Map<number, TpmObject | Sequence>
  readonly sessions: Map<number, TpmSession>
  readonly random: (length: number) => Uint8Array
  /** Encrypts saved contexts; new with every start. */
  contextKey: Uint8Array
  contextSequence: number
  started: boolean
  readonly clock: () => { clock: bigint; resetCount: number; restartCount: number; safe: boolean }
  changed(): void
}

export type Entity =
  | { readonly kind: 'permanent' | 'pcr'; readonly handle: number; readonly name: Uint8Array; readonly auth: Uint8Array }
  | { readonly kind: 'object'; readonly handle: number; readonly name: Uint8Array; readonly auth: Uint8Array; readonly object: TpmObject }
  | { readonly kind: 'sequence'; readonly handle: number; readonly name: Uint8Array; readonly auth: Uint8Array; readonly sequence: Sequence }
  | { readonly kind: 'nv'; readonly handle: number; readonly name: Uint8Array; readonly auth: Uint8Array; readonly index: NvIndex }
  | { readonly kind: 'session'; readonly handle: number; readonly name: Uint8Array; readonly auth: Uint8Array; readonly session: TpmSession }

const maxCommand = 4096
const hierarchies: ReadonlySet<number> = new Set([known.owner, known.null, known.lockout, known.endorsement, known.platform])

const entityOf = (machine: Machine, handle: number, number: number): Entity => {
  const kind = handle >>> 24
  if (kind === 0x00 && handle < 24) return { kind: 'pcr', handle, name: u32(handle), auth: empty }
  if (kind === 0x40 && hierarchies.has(handle)) return { kind: 'permanent', handle, name: u32(handle), auth: machine.durable.auths[String(handle)] ?? empty }
  if (kind === 0x01) {
    const index = machine.nv.get(handle)
    if (index !== undefined) return { kind: 'nv', handle, name: nvName(index), auth: index.auth, index }
    throw handleFault(number, rc.handle)
  }
  if (kind === 0x02 || kind === 0x03) {
    const session = machine.sessions.get(handle)
    if (session !== undefined) return { kind: 'session', handle, name: u32(handle), auth: empty, session }
    throw new Refusal(rc.referenceS0 + number - 1)
  }
  const found = kind === 0x81 ? machine.durable.persistent.get(handle) : machine.objects.get(handle)
  if (found?.kind === 'object') return { kind: 'object', handle, name: found.name, auth: found.sensitive?.auth ?? empty, object: found }
  if (found !== undefined) return { kind: 'sequence', handle, name: empty, auth: found.auth, sequence: found }
  throw kind === 0x80 ? new Refusal(rc.referenceH0 + number - 1) : handleFault(number, rc.handle)
}

/** One authorisation area of a command. */
interface Area {
  readonly handle: number
  readonly nonce: Uint8Array
  readonly attributes: number
  readonly mac: Uint8Array
  readonly session: TpmSession | null
}

const readAreas = (machine: Machine, reader: Reader): readonly Area[] => {
  const size = reader.u32()
  if (size < 9 || size > reader.left) throw new Refusal(rc.authSize)
  const areas: Area[] = []
  const inner = new Reader(reader.bytes(size))
  while (inner.left > 0) {
    const number = areas.length + 1
    if (number > 3) throw new Refusal(rc.authSize)
    const [handle, nonce, attributes, mac] = [inner.u32(), inner.sized(64), inner.u8(), inner.sized(64)]
    const session = handle === known.password ? null : machine.sessions.get(handle)
    if (session === undefined) throw new Refusal(rc.referenceS0 + number - 1)
    areas.push({ handle, nonce, attributes, mac, session })
  }
  return areas
}

const trimmed = (auth: Uint8Array): Uint8Array => {
  let end = auth.length
  while (end > 0 && auth[end - 1] === 0) end--
  return auth.subarray(0, end)
}

/** Whether an entity's own value may authorise it in this role (Part 1 §19.2). */
const valueAllowed = (entity: Entity, role: 'user' | 'admin', command: Command): boolean => {
  if (entity.kind === 'object') return role === 'user' ? has(entity.object, attribute.userWithAuth) : !has(entity.object, attribute.adminWithPolicy)
  if (entity.kind === 'nv') return (entity.index.attributes & (command.writesNv === true ? nvAttribute.authWrite : nvAttribute.authRead)) !== 0
  return true
}

/** Refuses a value where only a policy may (AUTH_TYPE), and where this entity's value does not count (AUTH_UNAVAILABLE). */
const checkValueAllowed = (entity: Entity, role: 'user' | 'admin', command: Command): void => {
  if (role === 'admin' && entity.kind === 'object' && has(entity.object, attribute.adminWithPolicy)) throw new Refusal(rc.authType)
  if (!valueAllowed(entity, role, command)) throw new Refusal(rc.authUnavailable)
}

const policyOf = (entity: Entity): Uint8Array =>
  entity.kind === 'object' ? entity.object.public.authPolicy : entity.kind === 'nv' ? entity.index.policy : empty

/** Objects without dictionary-attack protection say BAD_AUTH, others AUTH_FAIL. */
const denied = (entity: Entity | undefined, number: number): Refusal => {
  const free = entity === undefined || entity.kind !== 'object' || has(entity.object, attribute.noDA)
  return sessionFault(number, free ? rc.badAuth : rc.authFail)
}

/** The authorisation value that a session's HMAC and parameter encryption use for this entity. */
const valueOf = (session: TpmSession, entity: Entity | undefined): Uint8Array => {
  if (entity === undefined) return empty
  if (session.type === 'policy') return session.policy.needsAuth ? entity.auth : empty
  return session.bound !== null && Buffer.compare(session.bound, entity.name) === 0 ? empty : entity.auth
}

export const createSoftwareTpm = (options: SoftwareTpmOptions): SoftwareTpm => {
  const { random, now } = options
  let started = now()
  const durable = options.state === undefined ? freshState(random) : unpackState(options.state)
  const machine: Machine = {
    durable,
    nv: new Nv(durable.nv),
    pcrs: new Pcrs(),
    objects: new Map(),
    sessions: new Map(),
    random,
    contextKey: random(32),
    contextSequence: 0,
    started: false,
    clock: () => ({
      clock: BigInt(Math.max(0, Math.round(machine.durable.clock + now() - started))),
      resetCount: machine.durable.resetCount,
      restartCount: 0,
      safe: true,
    }),
    changed() {
      machine.durable = { ...machine.durable, nv: machine.nv.all }
      options.save?.(packState(machine.durable))
    },
  }

  const powerCycle = (): void => {
    machine.pcrs.reset()
    machine.objects.clear()
    machine.sessions.clear()
    machine.contextKey = random(32)
    machine.started = true
    machine.durable = { ...machine.durable, clock: machine.durable.clock + Math.max(0, now() - started), resetCount: (machine.durable.resetCount + 1) >>> 0 }
    started = now()
    machine.changed()
  }
  powerCycle()

  const authoriseOne = (area: Area, entity: Entity, of: { role: 'user' | 'admin'; number: number; command: Command; code: number }): void => {
    const { role, number, command, code } = of
    if (area.session === null) {
      checkValueAllowed(entity, role, command)
      if (!sameMac(trimmed(area.mac), trimmed(entity.auth))) throw denied(entity, number)
      return
    }
    if (area.session.type === 'trial') throw sessionFault(number, rc.attributes)
    if (area.session.type === 'hmac') {
      checkValueAllowed(entity, role, command)
      return
    }
    const { policy } = area.session
    if (policyOf(entity).length === 0 || Buffer.compare(policyOf(entity), policy.digest) !== 0) throw sessionFault(number, rc.policyFail)
    if (policy.commandCode !== null && policy.commandCode !== code) throw sessionFault(number, rc.policyCc)
    if (policy.pcrUpdates !== null && policy.pcrUpdates !== machine.pcrs.updates) throw new Refusal(rc.pcrChanged)
    if (policy.needsPassword && !sameMac(trimmed(area.mac), trimmed(entity.auth))) throw denied(entity, number)
  }

  const run = (bytes: Uint8Array): Uint8Array => {
    const reader = new Reader(bytes)
    const [commandTag, size, code] = [reader.u16(), reader.u32(), reader.u32()]
    if (commandTag !== tag.noSessions && commandTag !== tag.sessions) throw new Refusal(rc.badTag)
    if (size !== bytes.length || size > maxCommand) throw new Refusal(rc.commandSize)
    const command = commands.get(code)
    if (command === undefined) throw new Refusal(rc.commandCode)
    const entities = command.handles.map((role, at) => {
      const handle = reader.u32()
      // A handle that names something to come, or a hierarchy's null, is the command's own affair.
      if (role === 'raw') return { kind: 'permanent', handle, name: u32(handle), auth: empty } as const
      return entityOf(machine, handle, at + 1)
    })
    const areas = commandTag === tag.sessions ? readAreas(machine, reader) : []
    const needed = command.handles.filter((role) => role === 'user' || role === 'admin').length
    if (areas.length < needed) throw new Refusal(rc.authMissing)
    const raw = reader.rest()
    const cpHash = hashOf(u32(code), ...entities.map(({ name }) => name), raw)
    const authorised = (at: number): Entity | undefined => (at < needed ? entities[at] : undefined)

    const decrypting = areas.findIndex(({ attributes }) => (attributes & flag.decrypt) !== 0)
    const encrypting = areas.findIndex(({ attributes }) => (attributes & flag.encrypt) !== 0)
    for (const [at, area] of areas.entries()) {
      const entity = authorised(at)
      const role = command.handles[at]
      if (entity !== undefined && (role === 'user' || role === 'admin')) authoriseOne(area, entity, { role, number: at + 1, command, code })
      if (area.session === null) continue
      if (area.session.type === 'policy' && area.session.policy.needsPassword) continue
      const others =
        at === 0
          ? [decrypting, encrypting]
              .filter((other, place, all) => other > 0 && all.indexOf(other) === place)
              .map((other) => areas[other]?.session?.nonceTpm ?? empty)
          : []
      const auth = valueOf(area.session, entity)
      const expected = authorisation({
        omitted: area.mac.length === 0,
        key: area.session.key,
        auth,
        hash: cpHash,
        newer: area.nonce,
        older: area.session.nonceTpm,
        others,
        attributes: area.attributes,
      })
      if (!sameMac(expected, area.mac)) throw denied(entity, at + 1)
    }
    let parameters = raw
    const decryptor = areas[decrypting]
    if (decryptor !== undefined) {
      if (decryptor.session === null || !decryptor.session.encrypts) throw sessionFault(decrypting + 1, rc.attributes)
      const inner = new Reader(raw)
      const first = inner.sized(maxCommand)
      const auth = valueOf(decryptor.session, authorised(decrypting))
      parameters = concat(sized(decryptParameter(decryptor.session.key, auth, decryptor.nonce, decryptor.session.nonceTpm, first)), inner.rest())
    }
    const values = areas.map((area, at) => (area.session === null ? empty : valueOf(area.session, authorised(at))))

    const input = new Reader(parameters)
    const call: Call = { machine, code, entities, parameters: input, sessions: areas.flatMap(({ session }) => (session === null ? [] : [session])), powerCycle }
    const answer = command.run(call)
    if (input.left > 0) throw new Refusal(rc.size)

    if (areas.length === 0) return respond(tag.noSessions, 0, concat(...(answer.handle === undefined ? [] : [u32(answer.handle)]), answer.parameters ?? empty))
    for (const { session } of areas) if (session !== null) session.nonceTpm = random(32)
    let output = answer.parameters ?? empty
    const encryptor = areas[encrypting]
    if (encryptor !== undefined) {
      if (encryptor.session === null || !encryptor.session.encrypts || output.length < 2) throw sessionFault(encrypting + 1, rc.attributes)
      const inner = new Reader(output)
      const first = inner.sized(maxCommand)
      output = concat(
        sized(encryptParameter(encryptor.session.key, values[encrypting] ?? empty, encryptor.session.nonceTpm, encryptor.nonce, first)),
        inner.rest(),
      )
    }
    const rpHash = hashOf(u32(0), u32(code), output)
    const replies = areas.map((area, at) => {
      if (area.session === null) return concat(sized(empty), u8(area.attributes | flag.continue), sized(empty))
      const { session, attributes, nonce } = area
      const mac = authorisation({
        omitted: area.mac.length === 0,
        key: session.key,
        auth: values[at] ?? empty,
        hash: rpHash,
        newer: session.nonceTpm,
        older: nonce,
        attributes,
      })
      // A policy session is used up by what it authorised; one that is not to continue is flushed.
      if (session.type === 'policy' && at < needed)
        session.policy = { ...session.policy, digest: new Uint8Array(32), commandCode: null, needsAuth: false, needsPassword: false, pcrUpdates: null }
      if ((attributes & flag.continue) === 0) machine.sessions.delete(session.handle)
      return concat(sized(session.nonceTpm), u8(attributes), sized(mac))
    })
    const head = answer.handle === undefined ? [] : [u32(answer.handle)]
    return respond(tag.sessions, 0, concat(...head, u32(output.length), output, ...replies))
  }

  const execute = (bytes: Uint8Array): Uint8Array => {
    try {
      return run(bytes)
    } catch (error) {
      if (error instanceof Refusal) return respond(tag.noSessions, error.rc, empty)
      if (error instanceof TpmFormatError || error instanceof RangeError) return respond(tag.noSessions, rc.insufficient, empty)
      return respond(tag.noSessions, rc.failure, empty)
    }
  }

  return {
    execute,
    powerCycle,
    extend: (pcr, digest) => machine.pcrs.extend(pcr, digest),
    writeNv(index, bytes) {
      const attributes = nvAttribute.ppRead | nvAttribute.ownerRead | nvAttribute.authRead | nvAttribute.ppWrite | nvAttribute.noDA | nvAttribute.written
      machine.nv.remove(index)
      machine.nv.define({ index, attributes, policy: empty, auth: empty, data: bytes.slice() })
      machine.changed()
    },
    state: () => packState(machine.durable),
    transport: () => ({ send: async (command) => execute(command), close: async () => undefined }),
  }
}

const respond = (responseTag: number, code: number, body: Uint8Array): Uint8Array => concat(u16(responseTag), u32(10 + body.length), u32(code), body)
