import { concat, empty, sized, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, command as code, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import { digest, kdfA } from '@fleetkey/tpm2/kdf.ts'
import { qualifiedName } from '@fleetkey/tpm2/names.ts'
import { marshalPcrSelection, marshalPublic, type PcrBank } from '@fleetkey/tpm2/structures.ts'
import { createChecks, loadChecks } from '../checks.ts'
import { admin, command, handleAt, named, needRoom, objectAt, put, user, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import type { Input } from '../input.ts'
import type { Machine } from '../machine.ts'
import { makeObject, type Material } from '../making.ts'
import { has, isParent, isStorage, loaded, loadedExternally, trimmed, type TpmObject } from '../objects.ts'
import { present } from '../pcrs.ts'
import {
  dataBytes,
  digestBytes,
  hierarchyOrNull,
  nameBytes,
  pcrSelection,
  privateBytes,
  publicSized,
  secretBytes,
  sensitiveCreate,
  sizeOfHash,
} from '../readers.ts'
import { asParameter, handleFault, parameter, rc, Refusal } from '../refusal.ts'
import { marshalTicket, ticketDigest } from '../tickets.ts'
import { receiveSeed, sensitiveArea, shareSeedWith, unwrapCredential, unwrapPrivate, wrapCredential, wrapPrivate, type ReadSensitive } from '../wrapping.ts'

const parentAt = (call: Call, at: number): TpmObject => {
  const object = objectAt(call, at)
  if (!isParent(object)) throw handleFault(at + 1, rc.type)
  return object
}

/** TPMS_CREATION_DATA, its hash and ticket: where and in what state of the PCRs an object was made. */
const creation = (
  machine: Machine,
  of: { object: TpmObject; parent: TpmObject | number; outside: Uint8Array; pcrs: readonly PcrBank[] },
): { data: Uint8Array; hash: Uint8Array; ticket: Uint8Array } => {
  const { object, parent } = of
  const { nameAlg } = object.public
  const above =
    typeof parent === 'number'
      ? [u16(alg.null), sized(u32(parent)), sized(u32(parent))]
      : [u16(parent.public.nameAlg), sized(parent.name), sized(parent.qualifiedName)]
  const data = concat(
    marshalPcrSelection(present(of.pcrs)),
    sized(machine.pcrs.digestOf(nameAlg, of.pcrs)),
    u8(1 << machine.locality),
    ...above,
    sized(of.outside),
  )
  const hash = digest(nameAlg, data)
  const { hierarchy } = object
  return { data, hash, ticket: marshalTicket(tag.creation, hierarchy, ticketDigest.creation(machine, hierarchy, object.name, hash)) }
}

const seedOf = (machine: Machine, hierarchy: number): Uint8Array => {
  const { durable } = machine
  const seeds = new Map<number, Uint8Array>([
    [known.endorsement, durable.endorsementSeed],
    [known.owner, durable.ownerSeed],
    [known.platform, durable.platformSeed],
  ])
  return seeds.get(hierarchy) ?? machine.nullSeed
}

const readCreate = (p: { take: <T>(read: (input: Input) => T) => T }) => ({
  sensitive: p.take(sensitiveCreate),
  template: p.take(publicSized),
  outside: p.take(dataBytes),
  pcrs: p.take(pcrSelection),
})
type Create = ReturnType<typeof readCreate>

/** Checks and makes; refusals are about the template, the authorisation value, or nothing. */
const make = (parent: TpmObject | null, { sensitive, template }: Create, material: Material): ReturnType<typeof makeObject> => {
  asParameter(2, () => createChecks(parent, template, sensitive.data.length))
  const auth = trimmed(sensitive.auth)
  if (auth.length > sizeOfHash(template.nameAlg)) throw parameter(1, rc.size)
  return makeObject(template, auth, sensitive.data, material)
}

const createPrimary = (call: Call, input: Create): { handle: number; parameters: Uint8Array } => {
  const { machine } = call
  const hierarchy = handleAt(call, 0)
  needRoom(machine)
  const seed = seedOf(machine, hierarchy)
  const context = digest(alg.sha256, marshalPublic(input.template), input.sensitive.data)
  const made = make(null, input, (label, length) => kdfA(alg.sha256, seed, `PRIMARY ${label}`, context, empty, length * 8))
  const object = loaded(made.public, made.sensitive, hierarchy, hierarchy)
  const { data, hash, ticket } = creation(machine, { object, parent: hierarchy, outside: input.outside, pcrs: input.pcrs })
  return { handle: put(machine, object), parameters: concat(sized(object.bytes), sized(data), sized(hash), ticket, sized(object.name)) }
}

const create = (call: Call, input: Create): { parameters: Uint8Array } => {
  const { machine } = call
  const parent = parentAt(call, 0)
  needRoom(machine)
  const made = make(parent, input, (_label, length) => machine.random(length))
  const object = loaded(made.public, made.sensitive, parent.qualifiedName, parent.hierarchy)
  const { data, hash, ticket } = creation(machine, { object, parent, outside: input.outside, pcrs: input.pcrs })
  const wrapped = wrapPrivate(parent, made.public, made.sensitive, machine.random)
  return { parameters: concat(sized(wrapped), sized(object.bytes), sized(data), sized(hash), ticket) }
}

/** TPM2B_SENSITIVE, null when it is empty. */
const externalSensitive = (input: Input): ReadSensitive | null => {
  const size = input.u16()
  if (size === 0) return null
  const before = input.left
  const sensitive = sensitiveArea(input)
  if (before - input.left !== size) throw new Refusal(rc.size)
  return sensitive
}

const fixed = attribute.fixedTPM | attribute.fixedParent | attribute.restricted

export const objectCommands: readonly (readonly [number, Command])[] = [
  [code.createPrimary, command({ handles: [user(accepts.hierarchyOrNull)], decrypt: true, encrypt: true, read: readCreate, run: createPrimary })],
  [code.create, command({ handles: [user(accepts.object)], decrypt: true, encrypt: true, read: readCreate, run: create })],
  [
    code.load,
    command({
      handles: [user(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ wrapped: p.take(privateBytes), key: p.take(publicSized) }),
      run(call, { wrapped, key }) {
        needRoom(call.machine)
        if (wrapped.length === 0) throw parameter(1, rc.size)
        const parent = parentAt(call, 0)
        const sensitive = asParameter(1, () => unwrapPrivate(parent, key, wrapped))
        loadChecks({ parent, key, sensitive, type: sensitive.type, checkKeys: !has(parent, attribute.fixedTPM), blame: { public: 2, sensitive: 1 } })
        const object = loaded(key, sensitive, parent.qualifiedName, parent.hierarchy)
        return { handle: put(call.machine, object), parameters: sized(object.name) }
      },
    }),
  ],
  [
    code.loadExternal,
    command({
      handles: [],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ sensitive: p.take(externalSensitive), key: p.take(publicSized), hierarchy: p.take(hierarchyOrNull) }),
      run({ machine }, { sensitive, key, hierarchy }) {
        needRoom(machine)
        if (sensitive !== null && hierarchy !== known.null) throw parameter(3, rc.hierarchy)
        if (sensitive !== null && (key.attributes & fixed) !== 0) throw parameter(2, rc.attributes)
        loadChecks({ parent: null, key, sensitive, type: sensitive?.type ?? key.type, checkKeys: true, blame: { public: 2, sensitive: 1 } })
        const object = loadedExternally(key, sensitive, hierarchy)
        return { handle: put(machine, object), parameters: sized(object.name) }
      },
    }),
  ],
  [
    code.readPublic,
    command({
      handles: [named(accepts.object)],
      encrypt: true,
      read: () => undefined,
      run(call) {
        if (call.entities[0]?.kind === 'sequence') throw new Refusal(rc.sequence)
        const object = objectAt(call, 0)
        return { parameters: concat(sized(object.bytes), sized(object.name), sized(object.qualifiedName)) }
      },
    }),
  ],
  [
    code.unseal,
    command({
      handles: [user(accepts.object)],
      encrypt: true,
      read: () => undefined,
      run(call) {
        const object = objectAt(call, 0)
        if (object.public.type !== alg.keyedhash || object.sensitive === null) throw handleFault(1, rc.type)
        if (has(object, attribute.decrypt | attribute.sign | attribute.restricted)) throw handleFault(1, rc.attributes)
        return { parameters: sized(object.sensitive.secret) }
      },
    }),
  ],
  [
    code.objectChangeAuth,
    command({
      handles: [admin(accepts.object), named(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => p.take(digestBytes),
      run(call, value) {
        const [object, parent] = [objectAt(call, 0), objectAt(call, 1)]
        const auth = trimmed(value)
        if (auth.length > sizeOfHash(object.public.nameAlg)) throw parameter(1, rc.size)
        if (Buffer.compare(qualifiedName(parent.qualifiedName, object.name), object.qualifiedName) !== 0 || object.sensitive === null)
          throw handleFault(2, rc.type)
        return { parameters: sized(wrapPrivate(parent, object.public, { ...object.sensitive, auth }, call.machine.random)) }
      },
    }),
  ],
  [
    code.activateCredential,
    command({
      handles: [admin(accepts.object), user(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ blob: p.take((input) => input.sized(132)), secret: p.take(secretBytes) }),
      run(call, { blob, secret }) {
        const [activated, key] = [objectAt(call, 0), objectAt(call, 1)]
        if (!isStorage(key)) throw handleFault(2, rc.type)
        const seed = asParameter(2, () => receiveSeed(key, secret, 'IDENTITY'))
        return { parameters: sized(asParameter(1, () => unwrapCredential(key.public, seed, activated.name, blob))) }
      },
    }),
  ],
  [
    code.makeCredential,
    command({
      handles: [named(accepts.object)],
      decrypt: true,
      encrypt: true,
      read: (p) => ({ credential: p.take(digestBytes), name: p.take(nameBytes) }),
      run(call, { credential, name }) {
        const key = objectAt(call, 0)
        if (!isStorage(key)) throw handleFault(1, rc.type)
        if (credential.length > sizeOfHash(key.public.nameAlg)) throw parameter(1, rc.size)
        const { seed, secret } = shareSeedWith(key.public, 'IDENTITY', call.machine.random)
        return { parameters: concat(sized(wrapCredential(key.public, seed, name, credential)), sized(secret)) }
      },
    }),
  ],
]
