import { concat, empty, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command as code, curve, handle as known } from '@fleetkey/tpm2/constants.ts'
import { marshalPcrSelection } from '@fleetkey/tpm2/structures.ts'
import type { Command } from './command.ts'
import type { Machine } from './machine.ts'
import { policyOf, type Entity } from './entities.ts'
import { fixedProperties, variableProperties } from './properties.ts'
import { parameter, rc } from './refusal.ts'

/** TPMA_ALGORITHM per algorithm. */
const algorithms = new Map<number, number>([
  [alg.rsa, 0x0009],
  [alg.sha1, 0x0004],
  [alg.hmac, 0x0104],
  [alg.aes, 0x0002],
  [alg.keyedhash, 0x030c],
  [alg.xor, 0x0006],
  [alg.sha256, 0x0004],
  [alg.sha384, 0x0004],
  [alg.sha512, 0x0004],
  [alg.rsassa, 0x0101],
  [alg.rsapss, 0x0101],
  [alg.oaep, 0x0201],
  [alg.ecdsa, 0x0101],
  [alg.ecdh, 0x0401],
  [alg.ecc, 0x0009],
  [alg.cfb, 0x0202],
])

/** Commands whose response begins with a handle. */
const givesHandle: ReadonlySet<number> = new Set([
  code.createPrimary,
  code.load,
  code.loadExternal,
  code.startAuthSession,
  code.contextLoad,
  code.hmacStart,
  code.hashSequenceStart,
])

/** TPMA_CC: code, number of handles, whether the response has one. */
const commandAttributes = ([number, { handles }]: readonly [number, Command]): number =>
  (number | (handles.length << 25) | (givesHandle.has(number) ? 1 << 28 : 0)) >>> 0

const permanents = [known.owner, known.null, known.password, known.lockout, known.endorsement, known.platform]

/** Handles of one type; sessions that are loaded are asked for as HMAC sessions, saved ones as policy sessions. */
const handlesOf = (machine: Machine, type: number): readonly number[] => {
  switch (type) {
    case 0x00:
      return Array.from({ length: 24 }, (_, pcr) => pcr)
    case 0x01:
      return machine.nv.all.map(({ index }) => index)
    case 0x02:
      return [...machine.sessions.keys()]
    case 0x03:
      return [...machine.savedSessions.keys()].map((handle) => 0x0200_0000 | (handle & 0xff_ffff))
    case 0x40:
      return permanents
    case 0x80:
      return [...machine.objects.keys()]
    case 0x81:
      return [...machine.durable.persistent.keys()]
    default:
      throw parameter(2, rc.handle)
  }
}

export interface Asked {
  readonly which: number
  readonly property: number
  readonly count: number
}

/** One page of a list: what is at or above the property asked for, at most `count` and what a response can hold. */
const page = (asked: Asked, all: readonly (readonly [number, Uint8Array])[], most: number): Uint8Array => {
  const from = all.filter(([key]) => key >= asked.property).toSorted(([one], [other]) => one - other)
  const items = from.slice(0, Math.min(asked.count, most))
  return concat(u8(from.length > items.length ? 1 : 0), u32(asked.which), u32(items.length), ...items.map(([, bytes]) => bytes))
}

const pair = ([id, value]: readonly [number, number]): readonly [number, Uint8Array] => [id, concat(u32(id), u32(value >>> 0))]

/** Loaded and saved sessions are counted by their number, whatever they are for. */
const handlePage = (machine: Machine, asked: Asked): Uint8Array => {
  const type = asked.property >>> 24
  const order = (handle: number): number => (type === 0x02 || type === 0x03 ? ((type << 24) | (handle & 0xff_ffff)) >>> 0 : handle)
  return page(
    asked,
    handlesOf(machine, type).map((handle) => [order(handle), u32(handle)] as const),
    254,
  )
}

const policies = (machine: Machine, asked: Asked): Uint8Array => {
  if (asked.property >>> 24 !== 0x40) throw parameter(2, rc.value)
  const entity = (handle: number): Entity => ({ kind: 'permanent', handle, name: empty })
  const all = [known.owner, known.lockout, known.endorsement, known.platform].map((handle) => {
    const { hash, digest } = policyOf(machine, entity(handle))
    return [handle, concat(u32(handle), u16(hash), digest)] as const
  })
  return page(asked, all, 14)
}

/** Which localities may do what with a PCR, as bit maps per property (TPM_PT_PCR). */
const pcrProperties: readonly (readonly [number, number])[] = [
  [0x00, 0x00_ffff],
  [0x01, 0xff_ffff],
  [0x02, 0x81_0000],
  [0x03, 0xff_ffff & ~0x7e_0000],
  [0x04, 0x81_0000],
  [0x05, 0x91_ffff],
  [0x06, 0x81_0000],
  [0x07, 0xf9_ffff],
  [0x08, 0xf1_0000],
  [0x09, 0xff_ffff],
  [0x0a, 0x7e_0000],
  [0x11, 0xe1_0000],
  [0x12, 0x7e_0000],
]

/** Answer of TPM2_GetCapability. */
export const capability = (machine: Machine, commands: readonly (readonly [number, Command])[], asked: Asked): Uint8Array => {
  switch (asked.which) {
    case 0:
      return page(
        asked,
        [...algorithms].map(([id, attributes]) => [id, concat(u16(id), u32(attributes))] as const),
        126,
      )
    case 1:
      return handlePage(machine, asked)
    case 2:
      return page(
        asked,
        commands.map((one) => [one[0], u32(commandAttributes(one))] as const),
        256,
      )
    case 3:
    case 4:
      return page(asked, [], 0)
    case 5:
      if (asked.property !== 0) throw parameter(2, rc.value)
      return concat(u8(0), u32(5), marshalPcrSelection([{ hash: alg.sha256, pcrs: Array.from({ length: 24 }, (_, pcr) => pcr) }]))
    case 6:
      return page(asked, [...fixedProperties, ...variableProperties(machine)].map(pair), 127)
    case 7:
      return page(
        asked,
        pcrProperties.map(([id, bits]) => [id, concat(u32(id), u8(3), u8(bits), u8(bits >> 8), u8(bits >> 16))] as const),
        84,
      )
    case 8:
      return page(
        asked,
        [curve.p256, curve.p384].map((id) => [id, u16(id)] as const),
        508,
      )
    case 9:
      return policies(machine, asked)
    default:
      throw parameter(1, rc.value)
  }
}
