import { concat, empty, sized, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { command as code, session as flag, tag } from '@fleetkey/tpm2/constants.ts'
import { readAreas, type Area } from './areas.ts'
import { authorise, encrypted, responseMac, type Request } from './authorise.ts'
import type { Answer, Command } from './command.ts'
import { commands } from './commands.ts'
import { resolve, type Entity } from './entities.ts'
import { Input, Parameters } from './input.ts'
import type { Machine } from './machine.ts'
import { structureTags } from './readers.ts'
import { handleFault, rc, Refusal } from './refusal.ts'
import { startPolicy } from './sessions.ts'

const maxCommand = 4096

export const respond = (responseTag: number, result: number, body: Uint8Array): Uint8Array => concat(u16(responseTag), u32(10 + body.length), u32(result), body)

/** All handles first, then what they stand for. */
const entitiesOf = (machine: Machine, command: Command, input: Input): readonly Entity[] => {
  const handles = command.handles.map(({ accepts }, at) => {
    if (input.left < 4) throw handleFault(at + 1, rc.insufficient)
    const handle = input.u32()
    if (!accepts(handle)) throw handleFault(at + 1, rc.value)
    return handle
  })
  return handles.map((handle, at) => resolve(machine, handle, at + 1))
}

const areasOf = (machine: Machine, command: Command, input: Input): readonly Area[] => {
  const size = input.u32()
  if (size < 9 || size > input.left) throw new Refusal(rc.size)
  const bytes = input.bytes(size)
  if (command.sessions === false) throw new Refusal(rc.authContext)
  return readAreas(machine, command, bytes)
}

/** Runs one command in the order of the reference implementation (Part 4, ExecCommand.c): header, handles, areas, parameters, and only then its work. */
export const run = (machine: Machine, bytes: Uint8Array): Uint8Array => {
  machine.tick()
  const input = new Input(bytes)
  const commandTag = input.u16()
  if (commandTag !== tag.noSessions && commandTag !== tag.sessions) throw new Refusal(structureTags.has(commandTag) ? rc.badTag : rc.value)
  const size = input.u32()
  if (size !== bytes.length || size > maxCommand) throw new Refusal(rc.commandSize)
  const number = input.u32()
  const command = commands.get(number)
  if (command === undefined) throw new Refusal(rc.commandCode)
  if (machine.started === (number === code.startup)) throw new Refusal(rc.initialize)
  const entities = entitiesOf(machine, command, input)
  const areas = commandTag === tag.sessions ? areasOf(machine, command, input) : []
  const request: Request = { machine, code: number, command, entities, areas, parameters: input.rest() }
  const parameters = new Parameters(authorise(request))
  const read = command.read(parameters)
  if (parameters.left > 0) throw new Refusal(rc.size)
  const answer = command.run({ machine, code: number, entities, knows: (one) => commands.has(one) }, read) ?? {}
  return commandTag === tag.sessions ? withSessions(request, answer) : withoutSessions(machine, command, answer)
}

const withoutSessions = (machine: Machine, command: Command, answer: Answer): Uint8Array => {
  if (command.sessions !== false) machine.exclusiveSession = null
  return respond(tag.noSessions, 0, concat(...head(answer), answer.parameters ?? empty))
}

const head = ({ handle }: Answer): readonly Uint8Array[] => (handle === undefined ? [] : [u32(handle)])

const withSessions = (request: Request, answer: Answer): Uint8Array => {
  const { machine, areas } = request
  for (const { session } of areas) if (session !== null) session.nonceTpm = machine.random(session.nonceTpm.length)
  const output = encrypted(request, answer.parameters ?? empty)
  const attributes = audited(machine, areas)
  const replies = areas.map((area, at) => reply(request, area, { at, attributes: attributes[at] ?? area.attributes, output }))
  return respond(tag.sessions, 0, concat(...head(answer), u32(output.length), output, ...replies))
}

/** Attributes of the response: an audit session is told whether it still is the only one. */
const audited = (machine: Machine, areas: readonly Area[]): readonly number[] => {
  const auditing = areas.find(({ session, attributes }) => session !== null && (attributes & flag.audit) !== 0)
  if (auditing === undefined || auditing.session === null) {
    machine.exclusiveSession = null
    return areas.map(({ attributes }) => attributes)
  }
  const { session } = auditing
  if (!session.audit || (auditing.attributes & flag.auditReset) !== 0) machine.exclusiveSession = session.handle
  else if (machine.exclusiveSession !== session.handle) machine.exclusiveSession = null
  session.audit = true
  const exclusive = machine.exclusiveSession === session.handle ? flag.auditExclusive : 0
  return areas.map((area) => (area === auditing ? (area.attributes & ~flag.auditExclusive) | exclusive : area.attributes))
}

const reply = (request: Request, area: Area, of: { at: number; attributes: number; output: Uint8Array }): Uint8Array => {
  const { session } = area
  if (session === null) return concat(sized(empty), u8(of.attributes | flag.continue), sized(empty))
  const mac = responseMac(request, of.at, session, of.attributes, of.output)
  // A policy is used up by the command that it was shown to; a session that is not to continue is flushed.
  if (session.type === 'policy') session.policy = startPolicy(session.hash, request.machine.time)
  if ((of.attributes & flag.continue) === 0) request.machine.sessions.delete(session.handle)
  return concat(sized(session.nonceTpm), u8(of.attributes), sized(mac))
}
