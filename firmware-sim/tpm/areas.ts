import { handle as known, session as flag } from '@fleetkey/tpm2/constants.ts'
import type { Command } from './command.ts'
import { accepts } from './entities.ts'
import { Input } from './input.ts'
import type { Machine } from './machine.ts'
import { rc, Refusal, sessionFault } from './refusal.ts'
import type { TpmSession } from './sessions.ts'

/** One authorisation area of a command (Part 1 §18.5). `session` null: a password. */
export interface Area {
  readonly handle: number
  readonly nonce: Uint8Array
  readonly attributes: number
  readonly mac: Uint8Array
  readonly session: TpmSession | null
}

const maxAreas = 3
const reserved = 0x18
const crypts = flag.audit | flag.encrypt | flag.decrypt

const readOne = (input: Input): Omit<Area, 'session'> => {
  const handle = input.u32()
  if (handle !== known.password && !accepts.anySession(handle)) throw new Refusal(rc.value)
  const nonce = input.sized(64).slice()
  const attributes = input.u8()
  if ((attributes & reserved) !== 0) throw new Refusal(rc.reservedBits)
  return { handle, nonce, attributes, mac: input.sized(64).slice() }
}

const numbered = <T>(number: number, work: () => T): T => {
  try {
    return work()
  } catch (error) {
    throw error instanceof Refusal ? sessionFault(number, error.rc) : error
  }
}

/** Reads the areas and checks what can be checked without knowing whom they authorise (RetrieveSessionData of Part 4). */
export const readAreas = (machine: Machine, command: Command, bytes: Uint8Array): readonly Area[] => {
  const input = new Input(bytes)
  const areas: Area[] = []
  while (input.left > 0) {
    const number = areas.length + 1
    if (number > maxAreas) throw sessionFault(number, rc.size)
    const area = numbered(number, () => readOne(input))
    areas.push({ ...area, session: sessionOf(machine, area, number) })
    numbered(number, () => checkAttributes(machine, command, areas))
  }
  return areas
}

const sessionOf = (machine: Machine, area: Omit<Area, 'session'>, number: number): TpmSession | null => {
  if (area.handle === known.password) {
    if ((area.attributes & ~flag.continue) !== 0) throw sessionFault(number, rc.attributes)
    if (area.nonce.length > 0) throw sessionFault(number, rc.nonce)
    return null
  }
  const session = machine.sessions.get(area.handle)
  if (session === undefined) throw new Refusal(rc.referenceS0 + number - 1)
  return session
}

/** The last area against those before it. */
const checkAttributes = (machine: Machine, command: Command, areas: readonly Area[]): void => {
  const area = areas.at(-1)
  if (area?.session === null || area === undefined) return
  const before = areas.slice(0, -1)
  const wants = (one: Area, bit: number): boolean => (one.attributes & bit) !== 0
  if (before.some(({ handle }) => handle === area.handle)) throw new Refusal(rc.handle)
  for (const [bit, allowed] of [
    [flag.decrypt, command.decrypt],
    [flag.encrypt, command.encrypt],
  ] as const) {
    if (!wants(area, bit)) continue
    if (allowed !== true || before.some((one) => wants(one, bit))) throw new Refusal(rc.attributes)
    if (area.session.symmetric === null) throw new Refusal(rc.symmetric)
  }
  if (!wants(area, flag.audit)) return
  if (before.some((one) => wants(one, flag.audit)) || area.session.type !== 'hmac') throw new Refusal(rc.attributes)
  const exclusive = wants(area, flag.auditExclusive) && !wants(area, flag.auditReset) && area.session.audit
  if (exclusive && machine.exclusiveSession !== area.handle) throw new Refusal(rc.exclusive)
}

/** Whether a session that authorises nobody is good for something. */
export const isCrypting = (area: Area): boolean => (area.attributes & crypts) !== 0

/** Place of the area with this attribute, -1 when there is none. */
export const withAttribute = (areas: readonly Area[], bit: number): number => areas.findIndex((one) => one.session !== null && (one.attributes & bit) !== 0)
