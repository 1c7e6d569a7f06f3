import { createCipheriv, createDecipheriv } from 'node:crypto'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { marshalAttest, rawOf, readSignature, type Attest } from '@fleetkey/tpm2/attest.ts'
import { concat, empty, Reader, sized, u16, u32, u64, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, command as code, handle as known, sessionType, tag } from '@fleetkey/tpm2/constants.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { digest, hmac, kdfA } from '@fleetkey/tpm2/kdf.ts'
import { policyAuthorize, policyCommandCode, policySecret } from '@fleetkey/tpm2/policies.ts'
import { sameMac, sessionKey } from '@fleetkey/tpm2/session.ts'
import { marshalPcrSelection, marshalPublic, readPcrSelection, readPublic, type PcrBank, type Public } from '@fleetkey/tpm2/structures.ts'
import { capability } from './capability.ts'
import { marshalNvPublic, nvAttribute, nvName, readNvPublic, type NvIndex } from './nv.ts'
import {
  has,
  isParent,
  loaded,
  makeObject,
  multiply,
  openDuplicate,
  outerUnwrap,
  receiveSeed,
  signData,
  signDigest,
  unwrapPrivate,
  verifyDigest,
  wrapPrivate,
  type Sequence,
  type TpmObject,
} from './objects.ts'
import { handleFault, parameter, rc, Refusal } from './refusal.ts'
import { startPolicy, type PolicyState, type TpmSession } from './sessions.ts'
import type { Entity, Machine } from './software-tpm.ts'
import { packObject, unpackObject } from './state.ts'

export interface Call {
  readonly machine: Machine
  readonly code: number
  readonly entities: readonly Entity[]
  readonly parameters: Reader
  /** Sessions of the command, passwords left out. */
  readonly sessions: readonly TpmSession[]
  readonly powerCycle: () => void
}

interface Answer {
  readonly handle?: number
  readonly parameters?: Uint8Array
}

export interface Command {
  /** Per handle: authorised in the user or admin role, not authorised, or not looked up. */
  readonly handles: readonly ('user' | 'admin' | 'none' | 'raw')[]
  readonly writesNv?: boolean
  readonly run: (call: Call) => Answer
}

const slots = { objects: 3, sessions: 3, persistent: 7 } as const

const objectAt = (call: Call, at: number): TpmObject => {
  const entity = call.entities[at]
  if (entity?.kind !== 'object') throw handleFault(at + 1, rc.handle)
  return entity.object
}

const parentAt = (call: Call, at: number): TpmObject => {
  const object = objectAt(call, at)
  if (!isParent(object)) throw handleFault(at + 1, rc.type)
  return object
}

const policyAt = (call: Call, at: number): TpmSession => {
  const entity = call.entities[at]
  if (entity?.kind !== 'session' || entity.session.type === 'hmac') throw handleFault(at + 1, rc.handle)
  return entity.session
}

const put = (machine: Machine, object: TpmObject | Sequence): number => {
  for (let handle = 0x8000_0000; handle < 0x8000_0000 + slots.objects; handle++)
    if (!machine.objects.has(handle)) {
      machine.objects.set(handle, object)
      return handle
    }
  throw new Refusal(rc.objectMemory)
}

const room = (machine: Machine): void => {
  if (machine.objects.size >= slots.objects) throw new Refusal(rc.objectMemory)
}

const publicOf = (bytes: Uint8Array, number: number): Public => {
  try {
    const reader = new Reader(bytes)
    const key = readPublic(reader)
    reader.end()
    return key
  } catch {
    throw parameter(number, rc.type)
  }
}

const sensitiveCreate = (reader: Reader): { auth: Uint8Array; data: Uint8Array } => {
  const inner = new Reader(reader.sized(512))
  if (inner.left === 0) return { auth: empty, data: empty }
  const auth = inner.sized(64).slice()
  const data = inner.sized(256).slice()
  inner.end()
  return { auth, data }
}

/** TPMS_CREATION_DATA, its hash and ticket: nobody here certifies creation, so they say little. */
const creation = (machine: Machine, hierarchy: number, name: Uint8Array): Uint8Array => {
  const data = concat(u32(0), sized(empty), u8(1), u16(alg.null), sized(empty), sized(empty), sized(empty))
  const hash = digest(alg.sha256, data)
  const ticket = concat(u16(tag.creation), u32(hierarchy), sized(hmac(alg.sha256, machine.durable.proof, u16(tag.creation), name, hash)))
  return concat(sized(data), sized(hash), ticket)
}

const seedOf = (machine: Machine, hierarchy: number): Uint8Array => {
  switch (hierarchy) {
    case known.endorsement:
      return machine.durable.endorsementSeed
    case known.owner:
      return machine.durable.ownerSeed
    case known.platform:
      return machine.durable.platformSeed
    case known.null:
      return machine.contextKey
    default:
      throw handleFault(1, rc.hierarchy)
  }
}

const createPrimary = ({ machine, entities, parameters }: Call): Answer => {
  const hierarchy = entities[0]?.handle ?? 0
  const seed = seedOf(machine, hierarchy)
  const { auth, data } = sensitiveCreate(parameters)
  const templateBytes = parameters.sized(512)
  const template = publicOf(templateBytes, 2)
  parameters.sized(64)
  readPcrSelection(parameters)
  room(machine)
  const context = digest(alg.sha256, templateBytes, data)
  const made = makeObject(template, auth, data, (label, length) => kdfA(alg.sha256, seed, `PRIMARY ${label}`, context, empty, length * 8))
  const object = loaded(made.public, made.sensitive, hierarchy, hierarchy)
  return { handle: put(machine, object), parameters: concat(sized(object.bytes), creation(machine, hierarchy, object.name), sized(object.name)) }
}

const create = (call: Call): Answer => {
  const { machine, parameters } = call
  const parent = parentAt(call, 0)
  const { auth, data } = sensitiveCreate(parameters)
  const template = publicOf(parameters.sized(512), 2)
  parameters.sized(64)
  readPcrSelection(parameters)
  if ((template.attributes & attribute.fixedTPM) !== 0 && !has(parent, attribute.fixedTPM)) throw parameter(2, rc.attributes)
  const made = makeObject(template, auth, data, (_label, length) => machine.random(length))
  const object = loaded(made.public, made.sensitive, parent.qualifiedName, parent.hierarchy)
  const privateBytes = wrapPrivate(parent, made.public, made.sensitive)
  return { parameters: concat(sized(privateBytes), sized(object.bytes), creation(machine, parent.hierarchy, object.name)) }
}

const load = (call: Call): Answer => {
  const parent = parentAt(call, 0)
  const wrapped = call.parameters.sized(1024)
  const key = publicOf(call.parameters.sized(512), 2)
  room(call.machine)
  const object = loaded(key, unwrapPrivate(parent, key, wrapped), parent.qualifiedName, parent.hierarchy)
  return { handle: put(call.machine, object), parameters: sized(object.name) }
}

/** Public areas, or both areas in the null hierarchy. */
const loadExternal = (call: Call): Answer => {
  const inPrivate = call.parameters.sized(512)
  const key = publicOf(call.parameters.sized(512), 2)
  const hierarchy = call.parameters.u32()
  room(call.machine)
  if (inPrivate.length === 0) {
    const object = loaded(key, null, hierarchy, hierarchy)
    return { handle: put(call.machine, object), parameters: sized(object.name) }
  }
  if (hierarchy !== known.null) throw parameter(3, rc.hierarchy)
  const reader = new Reader(inPrivate)
  if (reader.u16() !== key.type) throw parameter(1, rc.type)
  const sensitive = { auth: reader.sized(64).slice(), seed: reader.sized(64).slice(), secret: reader.sized(256).slice() }
  reader.end()
  const object = loaded(key, sensitive, hierarchy, hierarchy)
  return { handle: put(call.machine, object), parameters: sized(object.name) }
}

const startAuthSession = ({ machine, entities, parameters }: Call): Answer => {
  const [salter, bound] = entities
  const nonceCaller = parameters.sized(64)
  const secret = parameters.sized(600)
  const type = parameters.u8()
  const symmetric = parameters.u16()
  if (symmetric === alg.aes && (parameters.u16() !== 128 || parameters.u16() !== alg.cfb)) throw parameter(4, rc.mode)
  if (symmetric !== alg.aes && symmetric !== alg.null) throw parameter(4, rc.symmetric)
  if (parameters.u16() !== alg.sha256) throw parameter(5, rc.hash)
  if (nonceCaller.length < 16 || nonceCaller.length > 32) throw parameter(1, rc.size)
  const types = { [sessionType.hmac]: 'hmac', [sessionType.policy]: 'policy', [sessionType.trial]: 'trial' } as const
  const kind = types[type as keyof typeof types]
  if (kind === undefined) throw parameter(3, rc.value)
  let salt: Uint8Array = empty
  if (salter !== undefined && salter.handle !== known.null) {
    if (salter.kind !== 'object' || !has(salter.object, attribute.decrypt)) throw handleFault(1, rc.key)
    salt = receiveSeed(salter.object, secret, 'SECRET', parameter(2, rc.value))
  } else if (secret.length > 0) throw parameter(2, rc.value)
  if (machine.sessions.size >= slots.sessions) throw new Refusal(rc.sessionMemory)
  const base = kind === 'hmac' ? 0x0200_0000 : 0x0300_0000
  const taken = new Set([...machine.sessions.keys()].map((handle) => handle & 0xff_ffff))
  const free = Array.from({ length: slots.sessions }, (_, at) => at).find((at) => !taken.has(at)) ?? 0
  const nonceTpm = machine.random(32)
  const isBound = bound !== undefined && bound.handle !== known.null
  const session: TpmSession = {
    handle: base + free,
    type: kind,
    key: sessionKey(concat(isBound ? bound.auth : empty, salt), nonceTpm, nonceCaller),
    bound: isBound && kind === 'hmac' ? bound.name : null,
    encrypts: symmetric === alg.aes,
    nonceTpm,
    policy: startPolicy,
  }
  machine.sessions.set(session.handle, session)
  return { handle: session.handle, parameters: sized(nonceTpm) }
}

const flush = ({ machine, parameters }: Call): Answer => {
  const handle = parameters.u32()
  if (!machine.objects.delete(handle) && !machine.sessions.delete(handle)) throw parameter(1, rc.handle)
  return {}
}

const contextAead = 'aes-256-gcm'

const contextSave = (call: Call): Answer => {
  const { machine } = call
  const handle = call.entities[0]?.handle ?? 0
  const session = machine.sessions.get(handle)
  const object = machine.objects.get(handle)
  if (session === undefined && object?.kind !== 'object') throw handleFault(1, rc.handle)
  machine.contextSequence++
  const sequence = BigInt(machine.contextSequence)
  const content = encode(session === undefined ? { object: packObject(object as TpmObject) } : { session: { ...session } })
  const nonce = machine.random(12)
  const cipher = createCipheriv(contextAead, machine.contextKey, nonce)
  cipher.setAAD(u64(sequence))
  const blob = concat(nonce, cipher.update(content), cipher.final(), cipher.getAuthTag())
  // A session leaves the TPM with its context; an object stays until it is flushed.
  if (session !== undefined) machine.sessions.delete(handle)
  const hierarchy = session === undefined ? (object as TpmObject).hierarchy : known.null
  return { parameters: concat(u64(sequence), u32(session === undefined ? 0x8000_0000 : handle), u32(hierarchy), sized(blob)) }
}

const contextLoad = ({ machine, parameters }: Call): Answer => {
  const sequence = parameters.u64()
  parameters.u32()
  parameters.u32()
  const blob = parameters.sized(2048)
  let content: { object?: unknown; session?: TpmSession }
  try {
    const decipher = createDecipheriv(contextAead, machine.contextKey, blob.subarray(0, 12))
    decipher.setAAD(u64(sequence))
    decipher.setAuthTag(blob.subarray(-16))
    content = decode(concat(decipher.update(blob.subarray(12, -16)), decipher.final())) as typeof content
  } catch {
    throw parameter(1, rc.integrity)
  }
  if (content.session !== undefined) {
    if (machine.sessions.size >= slots.sessions) throw new Refusal(rc.sessionMemory)
    machine.sessions.set(content.session.handle, content.session)
    return { handle: content.session.handle }
  }
  return { handle: put(machine, unpackObject(content.object)) }
}

const evictControl = (call: Call): Answer => {
  const { machine } = call
  const handle = call.parameters.u32()
  const persistent = new Map(machine.durable.persistent)
  if (handle >>> 24 !== 0x81) throw parameter(1, rc.value)
  if (persistent.has(handle)) {
    if (call.entities[1]?.handle !== handle) throw new Refusal(rc.nvDefined)
    persistent.delete(handle)
  } else {
    if (persistent.size >= slots.persistent) throw new Refusal(rc.nvSpace)
    persistent.set(handle, objectAt(call, 1))
  }
  machine.durable = { ...machine.durable, persistent }
  machine.changed()
  return {}
}

const updatePolicy = (session: TpmSession, change: Partial<PolicyState>): Answer => {
  session.policy = { ...session.policy, ...change }
  return {}
}

const runPolicySecret = (call: Call): Answer => {
  const session = policyAt(call, 1)
  const { parameters } = call
  parameters.sized(64)
  parameters.sized(64)
  const ref = parameters.sized(64)
  parameters.u32()
  updatePolicy(session, { digest: policySecret(session.policy.digest, call.entities[0]?.name ?? empty, ref) })
  return { parameters: concat(sized(empty), u16(tag.authSecret), u32(known.null), sized(empty)) }
}

const runPolicyPcr = (call: Call): Answer => {
  const session = policyAt(call, 0)
  const expected = call.parameters.sized(64)
  const banks = readPcrSelection(call.parameters)
  const now = call.machine.pcrs.digestOf(banks)
  if (session.type !== 'trial' && expected.length > 0 && !sameMac(expected, now)) throw parameter(1, rc.value)
  const used = session.type === 'trial' && expected.length > 0 ? expected : now
  const next = digest(alg.sha256, session.policy.digest, u32(code.policyPcr), marshalPcrSelection(banks), used)
  return updatePolicy(session, { digest: next, pcrUpdates: session.type === 'trial' ? null : call.machine.pcrs.updates })
}

const runPolicyOr = (call: Call): Answer => {
  const session = policyAt(call, 0)
  const count = call.parameters.u32()
  if (count < 2 || count > 8) throw parameter(1, rc.size)
  const branches = Array.from({ length: count }, () => call.parameters.sized(64))
  if (session.type !== 'trial' && !branches.some((branch) => sameMac(branch, session.policy.digest))) throw parameter(1, rc.value)
  return updatePolicy(session, { digest: digest(alg.sha256, new Uint8Array(32), u32(code.policyOr), ...branches) })
}

const verifiedTicket = (machine: Machine, hash: Uint8Array, name: Uint8Array): Uint8Array =>
  hmac(alg.sha256, machine.durable.proof, u16(tag.verified), hash, name)

const runPolicyAuthorize = (call: Call): Answer => {
  const session = policyAt(call, 0)
  const { parameters } = call
  const [approved, ref, name] = [parameters.sized(64), parameters.sized(64), parameters.sized(68)]
  const ticketTag = parameters.u16()
  parameters.u32()
  const ticket = parameters.sized(64)
  if (session.type !== 'trial') {
    if (!sameMac(approved, session.policy.digest)) throw parameter(1, rc.value)
    const expected = verifiedTicket(call.machine, digest(alg.sha256, approved, ref), name)
    if (ticketTag !== tag.verified || !sameMac(ticket, expected)) throw parameter(4, rc.value)
  }
  return updatePolicy(session, { digest: policyAuthorize(name, ref) })
}

const runPolicyCommandCode = (call: Call): Answer => {
  const session = policyAt(call, 0)
  const wanted = call.parameters.u32()
  return updatePolicy(session, { digest: policyCommandCode(session.policy.digest, wanted), commandCode: wanted })
}

const runPolicyAuthValue = (call: Call, how: 'needsAuth' | 'needsPassword'): Answer => {
  const session = policyAt(call, 0)
  return updatePolicy(session, {
    digest: digest(alg.sha256, session.policy.digest, u32(code.policyAuthValue)),
    needsAuth: false,
    needsPassword: false,
    [how]: true,
  })
}

const activateCredential = (call: Call): Answer => {
  const [activated, key] = [objectAt(call, 0), objectAt(call, 1)]
  if (!isParent(key)) throw handleFault(2, rc.type)
  const blob = call.parameters.sized(512)
  const seed = receiveSeed(key, call.parameters.sized(600), 'IDENTITY', parameter(2, rc.eccPoint))
  const plain = new Reader(outerUnwrap(key.public, seed, activated.name, blob, parameter(1, rc.integrity)))
  return { parameters: sized(plain.sized(64)) }
}

const runMakeCredential = (call: Call): Answer => {
  const key = objectAt(call, 0)
  const secret = call.parameters.sized(32)
  const name = call.parameters.sized(68)
  const made = makeCredential({ ek: key.bytes, name, secret: { bytes: () => secret }, random: call.machine.random })
  return { parameters: concat(sized(made.blob), sized(made.secret)) }
}

const importObject = (call: Call): Answer => {
  const parent = parentAt(call, 0)
  const { parameters } = call
  const encryptionKey = parameters.sized(32)
  const key = publicOf(parameters.sized(512), 2)
  const duplicate = parameters.sized(1024)
  const seed = parameters.sized(600)
  const symmetric = parameters.u16()
  if (symmetric === alg.aes && (parameters.u16() !== 128 || parameters.u16() !== alg.cfb)) throw parameter(5, rc.symmetric)
  if (symmetric !== alg.aes && symmetric !== alg.null) throw parameter(5, rc.symmetric)
  const inner = symmetric === alg.aes
  if ((key.attributes & (attribute.fixedTPM | attribute.fixedParent)) !== 0) throw parameter(2, rc.attributes)
  if ((key.attributes & attribute.encryptedDuplication) !== 0 && (!inner || seed.length === 0)) throw parameter(2, rc.attributes)
  if (inner !== (encryptionKey.length === 16)) throw parameter(1, rc.size)
  const sensitive = openDuplicate(parent, { key, duplicate, seed, innerKey: inner ? encryptionKey : null })
  return { parameters: sized(wrapPrivate(parent, key, sensitive)) }
}

/** Scheme asked for must be the key's own; ECDSA with SHA-256 is all there is. */
const readSignScheme = (reader: Reader, key: TpmObject, number: number): void => {
  const scheme = reader.u16()
  if (scheme !== alg.null && (scheme !== alg.ecdsa || reader.u16() !== alg.sha256)) throw parameter(number, rc.scheme)
  if (scheme === alg.null && (key.public.type !== alg.ecc || key.public.scheme === null)) throw parameter(number, rc.scheme)
}

const signer = (call: Call, at: number): TpmObject => {
  const key = objectAt(call, at)
  if (!has(key, attribute.sign) || key.public.type !== alg.ecc) throw handleFault(at + 1, rc.key)
  return key
}

/** What a quote says of clock and firmware: outside the endorsement and platform hierarchies counters are obfuscated (Part 1 §36.7). */
const attestCommon = (machine: Machine, key: TpmObject, extraData: Uint8Array): Omit<Attest, 'type'> & Pick<Attest, 'qualifiedSigner'> => {
  const clock = machine.clock()
  const plain = key.hierarchy === known.endorsement || key.hierarchy === known.platform
  const mask = Buffer.from(plain ? new Uint8Array(16) : kdfA(alg.sha256, machine.durable.proof, 'OBFUSCATE', key.qualifiedName, empty, 128))
  return {
    qualifiedSigner: key.qualifiedName,
    extraData,
    clockInfo: { ...clock, resetCount: (clock.resetCount + mask.readUInt32BE(0)) >>> 0, restartCount: (clock.restartCount + mask.readUInt32BE(4)) >>> 0 },
    firmwareVersion: 0x0001_0000_0000_0001n + mask.readBigUInt64BE(8),
  }
}

const quote = (call: Call): Answer => {
  const key = signer(call, 0)
  const extraData = call.parameters.sized(64)
  readSignScheme(call.parameters, key, 2)
  const banks: readonly PcrBank[] = readPcrSelection(call.parameters)
  const selection = banks.map(({ hash, pcrs }) => ({ hash, pcrs: hash === alg.sha256 ? pcrs : [] }))
  const attest = marshalAttest({
    type: 'quote',
    ...attestCommon(call.machine, key, extraData),
    selection,
    pcrDigest: call.machine.pcrs.digestOf(banks),
  } as Attest)
  return { parameters: concat(sized(attest), signData(key, attest)) }
}

const certify = (call: Call): Answer => {
  const object = objectAt(call, 0)
  const key = signer(call, 1)
  const extraData = call.parameters.sized(64)
  readSignScheme(call.parameters, key, 2)
  const attest = marshalAttest({
    type: 'certify',
    ...attestCommon(call.machine, key, extraData),
    name: object.name,
    qualifiedName: object.qualifiedName,
  } as Attest)
  return { parameters: concat(sized(attest), signData(key, attest)) }
}

const signIt = (call: Call): Answer => {
  const key = signer(call, 0)
  const hash = call.parameters.sized(64)
  readSignScheme(call.parameters, key, 2)
  const ticketTag = call.parameters.u16()
  call.parameters.u32()
  const ticket = call.parameters.sized(64)
  // A restricted key signs only what this TPM has hashed itself and found not to look like its own statements.
  if (has(key, attribute.restricted) && (ticketTag !== tag.hashcheck || !sameMac(ticket, hashTicket(call.machine, hash)))) throw parameter(3, rc.ticket)
  if (hash.length !== 32) throw parameter(1, rc.size)
  return { parameters: signDigest(key, hash, call.machine.random) }
}

const hashTicket = (machine: Machine, hash: Uint8Array): Uint8Array => hmac(alg.sha256, machine.durable.proof, u16(tag.hashcheck), hash)

const hashIt = (call: Call): Answer => {
  const data = call.parameters.sized(1024)
  if (call.parameters.u16() !== alg.sha256) throw parameter(2, rc.hash)
  const hierarchy = call.parameters.u32()
  const hash = digest(alg.sha256, data)
  const safe = hierarchy !== known.null && Buffer.compare(data.subarray(0, 4), Buffer.from('ff544347', 'hex')) !== 0
  return { parameters: concat(sized(hash), u16(tag.hashcheck), u32(safe ? hierarchy : known.null), sized(safe ? hashTicket(call.machine, hash) : empty)) }
}

const verifySignature = (call: Call): Answer => {
  const key = objectAt(call, 0)
  const hash = call.parameters.sized(64)
  const signature = readSignature(call.parameters)
  if (signature.scheme !== alg.ecdsa || hash.length !== 32) throw parameter(2, rc.scheme)
  if (!verifyDigest(key, hash, rawOf(signature))) throw parameter(2, rc.signature)
  return { parameters: concat(u16(tag.verified), u32(key.hierarchy), sized(verifiedTicket(call.machine, hash, key.name))) }
}

const zgen = (call: Call): Answer => {
  const key = objectAt(call, 0)
  if (!has(key, attribute.decrypt) || has(key, attribute.restricted)) throw handleFault(1, rc.attributes)
  const point = new Reader(call.parameters.sized(256))
  const [x, y] = [point.sized(32), point.sized(32)]
  point.end()
  const z = multiply(key, x, y, parameter(1, rc.eccPoint))
  return { parameters: sized(concat(sized(z.x), sized(z.y))) }
}

const hmacKey = (call: Call, at: number): TpmObject => {
  const key = objectAt(call, at)
  if (key.public.type !== alg.keyedhash || !has(key, attribute.sign) || key.sensitive === null) throw handleFault(at + 1, rc.type)
  return key
}

const readHmacHash = (reader: Reader): void => {
  const hash = reader.u16()
  if (hash !== alg.null && hash !== alg.sha256) throw parameter(2, rc.value)
}

const hmacOnce = (call: Call): Answer => {
  const key = hmacKey(call, 0)
  const data = call.parameters.sized(1024)
  readHmacHash(call.parameters)
  return { parameters: sized(hmac(alg.sha256, key.sensitive?.secret ?? empty, data)) }
}

const hmacStart = (call: Call): Answer => {
  const key = hmacKey(call, 0)
  const auth = call.parameters.sized(64).slice()
  readHmacHash(call.parameters)
  return { handle: put(call.machine, { kind: 'sequence', auth, key: key.sensitive?.secret ?? empty, parts: [] }) }
}

const sequenceAt = (call: Call): Sequence => {
  const entity = call.entities[0]
  if (entity?.kind !== 'sequence') throw handleFault(1, rc.mode)
  return entity.sequence
}

const maxSequence = 1 << 20

const sequenceUpdate = (call: Call): Answer => {
  const sequence = sequenceAt(call)
  if (sequence.parts.reduce((sum, { length }) => sum + length, 0) > maxSequence) throw parameter(1, rc.size)
  sequence.parts.push(call.parameters.sized(1024).slice())
  return {}
}

const sequenceComplete = (call: Call): Answer => {
  const sequence = sequenceAt(call)
  const last = call.parameters.sized(1024)
  call.parameters.u32()
  call.machine.objects.delete(call.entities[0]?.handle ?? 0)
  return { parameters: concat(sized(hmac(alg.sha256, sequence.key, ...sequence.parts, last)), u16(tag.hashcheck), u32(known.null), sized(empty)) }
}

const unseal = (call: Call): Answer => {
  const object = objectAt(call, 0)
  if (object.public.type !== alg.keyedhash || object.public.scheme !== null || object.sensitive === null) throw handleFault(1, rc.type)
  return { parameters: sized(object.sensitive.secret) }
}

const nvAt = (call: Call, at: number): NvIndex => {
  const entity = call.entities[at]
  if (entity?.kind !== 'nv') throw handleFault(at + 1, rc.handle)
  return call.machine.nv.get(entity.handle) ?? entity.index
}

/** Who may: owner and platform by their attribute; the index by its own value or policy, which its session has shown. */
const nvAllowed = (call: Call, index: NvIndex, write: boolean): void => {
  const by = call.entities[0]?.handle
  const bits = write
    ? { owner: nvAttribute.ownerWrite, platform: nvAttribute.ppWrite, own: nvAttribute.authWrite | nvAttribute.policyWrite }
    : { owner: nvAttribute.ownerRead, platform: nvAttribute.ppRead, own: nvAttribute.authRead | nvAttribute.policyRead }
  const bit = by === known.owner ? bits.owner : by === known.platform ? bits.platform : by === index.index ? bits.own : 0
  if ((index.attributes & bit) === 0) throw new Refusal(rc.nvAuthorization)
}

const nvDefine = (call: Call): Answer => {
  const auth = call.parameters.sized(64).slice()
  call.machine.nv.define(readNvPublic(call.parameters.sized(256), auth))
  call.machine.changed()
  return {}
}

const nvUndefine = (call: Call): Answer => {
  call.machine.nv.remove(nvAt(call, 1).index)
  call.machine.changed()
  return {}
}

const nvWrite = (call: Call): Answer => {
  const index = nvAt(call, 1)
  nvAllowed(call, index, true)
  const data = call.parameters.sized(2048)
  call.machine.nv.write(index, call.parameters.u16(), data)
  call.machine.changed()
  return {}
}

const nvIncrement = (call: Call): Answer => {
  const index = nvAt(call, 1)
  nvAllowed(call, index, true)
  call.machine.nv.increment(index)
  call.machine.changed()
  return {}
}

const nvRead = (call: Call): Answer => {
  const index = nvAt(call, 1)
  nvAllowed(call, index, false)
  const size = call.parameters.u16()
  return { parameters: sized(call.machine.nv.read(index, call.parameters.u16(), size)) }
}

const nvReadPublic = (call: Call): Answer => {
  const index = nvAt(call, 0)
  return { parameters: concat(sized(marshalNvPublic(index)), sized(nvName(index))) }
}

const pcrExtend = (call: Call): Answer => {
  const pcr = call.entities[0]?.handle ?? 24
  const count = call.parameters.u32()
  if (count > 5) throw parameter(1, rc.size)
  for (let at = 0; at < count; at++) {
    const hash = call.parameters.u16()
    if (hash !== alg.sha256) throw parameter(1, rc.hash)
    call.machine.pcrs.extend(pcr, call.parameters.bytes(32))
  }
  return {}
}

const startup = (call: Call): Answer => {
  const type = call.parameters.u16()
  if (type > 1) throw parameter(1, rc.value)
  if (call.machine.started) throw new Refusal(rc.initialize)
  call.machine.started = true
  return {}
}

/** TPM2_Clear: a new owner hierarchy; what was below it is lost. The counters of resets start again. */
const clear = ({ machine }: Call): Answer => {
  const persistent = new Map([...machine.durable.persistent].filter(([, { hierarchy }]) => hierarchy !== known.owner))
  const auths = Object.fromEntries(Object.entries(machine.durable.auths).filter(([handle]) => Number(handle) === known.platform))
  machine.durable = { ...machine.durable, ownerSeed: machine.random(32), proof: machine.random(32), resetCount: 0, auths, persistent }
  for (const [handle, object] of machine.objects) if (object.kind === 'object' && object.hierarchy !== known.platform) machine.objects.delete(handle)
  machine.changed()
  return {}
}

const readClock = ({ machine }: Call): Answer => {
  const { clock, resetCount, restartCount, safe } = machine.clock()
  return { parameters: concat(u64(clock), u64(clock), u32(resetCount), u32(restartCount), u8(safe ? 1 : 0)) }
}

const ecdhKeyGen = (call: Call): Answer => {
  const key = objectAt(call, 0)
  if (key.public.type !== alg.ecc) throw handleFault(1, rc.key)
  const { x, y } = key.public
  const ephemeral = makeObject(
    { ...key.public, attributes: attribute.sensitiveDataOrigin | attribute.decrypt, symmetric: null },
    empty,
    empty,
    (_label, length) => call.machine.random(length),
  )
  const temporary = loaded(ephemeral.public, ephemeral.sensitive, known.null, known.null)
  const z = multiply(temporary, x, y, handleFault(1, rc.key))
  if (ephemeral.public.type !== alg.ecc) throw handleFault(1, rc.key)
  return { parameters: concat(sized(concat(sized(z.x), sized(z.y))), sized(concat(sized(ephemeral.public.x), sized(ephemeral.public.y)))) }
}

const readPublicOf = (call: Call): Answer => {
  const object = objectAt(call, 0)
  return { parameters: concat(sized(marshalPublic(object.public)), sized(object.name), sized(object.qualifiedName)) }
}

const nothing = (): Answer => ({})

/** One row per command. */
export const commands: ReadonlyMap<number, Command> = new Map<number, Command>([
  [code.startup, { handles: [], run: startup }],
  [code.shutdown, { handles: [], run: ({ parameters }) => (parameters.u16(), {}) }],
  [code.selfTest, { handles: [], run: ({ parameters }) => (parameters.u8(), {}) }],
  [code.getTestResult, { handles: [], run: () => ({ parameters: concat(sized(empty), u32(0)) }) }],
  [
    code.getCapability,
    {
      handles: [],
      run: ({ machine, parameters }) => ({ parameters: capability(machine, [...commands.keys()], parameters.u32(), parameters.u32(), parameters.u32()) }),
    },
  ],
  [code.testParms, { handles: [], run: ({ parameters }) => (parameters.rest(), {}) }],
  [code.getRandom, { handles: [], run: ({ machine, parameters }) => ({ parameters: sized(machine.random(Math.min(32, parameters.u16()))) }) }],
  [code.createPrimary, { handles: ['user'], run: createPrimary }],
  [code.create, { handles: ['user'], run: create }],
  [code.load, { handles: ['user'], run: load }],
  [code.loadExternal, { handles: [], run: loadExternal }],
  [code.readPublic, { handles: ['none'], run: readPublicOf }],
  [code.flushContext, { handles: [], run: flush }],
  [code.contextSave, { handles: ['none'], run: contextSave }],
  [code.contextLoad, { handles: [], run: contextLoad }],
  [code.evictControl, { handles: ['user', 'none'], run: evictControl }],
  [code.startAuthSession, { handles: ['none', 'none'], run: startAuthSession }],
  [code.policySecret, { handles: ['user', 'none'], run: runPolicySecret }],
  [code.policyPcr, { handles: ['none'], run: runPolicyPcr }],
  [code.policyOr, { handles: ['none'], run: runPolicyOr }],
  [code.policyAuthorize, { handles: ['none'], run: runPolicyAuthorize }],
  [code.policyCommandCode, { handles: ['none'], run: runPolicyCommandCode }],
  [code.policyAuthValue, { handles: ['none'], run: (call) => runPolicyAuthValue(call, 'needsAuth') }],
  [code.policyPassword, { handles: ['none'], run: (call) => runPolicyAuthValue(call, 'needsPassword') }],
  [code.policyGetDigest, { handles: ['none'], run: (call) => ({ parameters: sized(policyAt(call, 0).policy.digest) }) }],
  [code.policyRestart, { handles: ['none'], run: (call) => updatePolicy(policyAt(call, 0), startPolicy) }],
  [code.activateCredential, { handles: ['admin', 'user'], run: activateCredential }],
  [code.makeCredential, { handles: ['none'], run: runMakeCredential }],
  [code.quote, { handles: ['user'], run: quote }],
  [code.certify, { handles: ['admin', 'user'], run: certify }],
  [code.sign, { handles: ['user'], run: signIt }],
  [code.verifySignature, { handles: ['none'], run: verifySignature }],
  [code.hash, { handles: [], run: hashIt }],
  [code.ecdhZGen, { handles: ['user'], run: zgen }],
  [code.ecdhKeyGen, { handles: ['none'], run: ecdhKeyGen }],
  [code.import, { handles: ['user'], run: importObject }],
  [code.hmac, { handles: ['user'], run: hmacOnce }],
  [code.hmacStart, { handles: ['user'], run: hmacStart }],
  [code.sequenceUpdate, { handles: ['user'], run: sequenceUpdate }],
  [code.sequenceComplete, { handles: ['user'], run: sequenceComplete }],
  [code.unseal, { handles: ['user'], run: unseal }],
  [code.nvDefineSpace, { handles: ['user'], run: nvDefine }],
  [code.nvUndefineSpace, { handles: ['user', 'none'], run: nvUndefine }],
  [code.nvReadPublic, { handles: ['none'], run: nvReadPublic }],
  [code.nvRead, { handles: ['user', 'none'], run: nvRead }],
  [code.nvWrite, { handles: ['user', 'none'], writesNv: true, run: nvWrite }],
  [code.nvIncrement, { handles: ['user', 'none'], writesNv: true, run: nvIncrement }],
  [code.pcrRead, { handles: [], run: ({ machine, parameters }) => ({ parameters: machine.pcrs.read(readPcrSelection(parameters)) }) }],
  [code.pcrExtend, { handles: ['user'], run: pcrExtend }],
  [code.pcrReset, { handles: ['user'], run: ({ machine, entities }) => (machine.pcrs.clear(entities[0]?.handle ?? 0), {}) }],
  [code.readClock, { handles: [], run: readClock }],
  [code.clear, { handles: ['user'], run: clear }],
  [code.dictionaryAttackLockReset, { handles: ['user'], run: nothing }],
])
