import { concat, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, curve } from '@fleetkey/tpm2/constants.ts'
import { marshalPcrSelection } from '@fleetkey/tpm2/structures.ts'
import { parameter, rc } from './refusal.ts'
import type { Machine } from './software-tpm.ts'

const text = (four: string): number => Buffer.from(four.padEnd(4, '\0'), 'latin1').readUInt32BE(0)

/** TPM_PT (Part 2 §6.13). Manufacturer and vendor string say what this is. */
const properties = new Map<number, number>([
  [0x100, text('2.0')],
  [0x101, 0],
  [0x102, 138],
  [0x103, 8],
  [0x104, 2018],
  [0x105, text('FKSM')],
  [0x106, text('flee')],
  [0x107, text('tkey')],
  [0x108, text(' sim')],
  [0x109, text('ulat')],
  [0x10a, 1],
  [0x10b, 0x0001_0000],
  [0x10c, 0x0000_0001],
  [0x10d, 1024],
  [0x10e, 3],
  [0x10f, 7],
  [0x110, 3],
  [0x111, 64],
  [0x112, 24],
  [0x113, 3],
  [0x114, 0xff_ffff],
  [0x116, 0],
  [0x117, 2048],
  [0x118, 0],
  [0x119, 0],
  [0x11a, alg.sha256],
  [0x11b, alg.aes],
  [0x11c, 128],
  [0x11e, 4096],
  [0x11f, 4096],
  [0x120, 32],
  [0x122, 1024],
  [0x12c, 1024],
  [0x200, 0],
  [0x201, 0xf],
])

/** TPMA_ALGORITHM per algorithm. */
const algorithms = new Map<number, number>([
  [alg.hmac, 0x0105],
  [alg.aes, 0x0002],
  [alg.keyedhash, 0x0108],
  [alg.sha256, 0x0004],
  [alg.ecdsa, 0x0101],
  [alg.ecdh, 0x0201],
  [alg.ecc, 0x0009],
  [alg.cfb, 0x0202],
])

const page = <T>(all: readonly T[], first: (item: T) => boolean, count: number): { more: boolean; items: readonly T[] } => {
  const from = all.filter(first)
  return { more: from.length > count, items: from.slice(0, count) }
}

/** Answer of TPM2_GetCapability. */
export const capability = (machine: Machine, codes: readonly number[], which: number, property: number, count: number): Uint8Array => {
  const answer = (more: boolean, ...parts: readonly Uint8Array[]): Uint8Array => concat(u8(more ? 1 : 0), u32(which), ...parts)
  switch (which) {
    case 0: {
      const { more, items } = page([...algorithms], ([id]) => id >= property, count)
      return answer(more, u32(items.length), ...items.map(([id, attributes]) => concat(u16(id), u32(attributes))))
    }
    case 1: {
      const all = [...machine.nv.all.map(({ index }) => index), ...machine.sessions.keys(), ...machine.objects.keys(), ...machine.durable.persistent.keys()]
      const kind = property >>> 24
      // Loaded HMAC and policy sessions are listed under one range each; saved ones there are none of.
      const { more, items } = page(
        all.toSorted((a, b) => a - b),
        (handle) => handle >>> 24 === kind && handle >= property,
        count,
      )
      return answer(more, u32(items.length), ...items.map(u32))
    }
    case 2: {
      const { more, items } = page(
        codes.toSorted((a, b) => a - b),
        (one) => one >= property,
        count,
      )
      return answer(more, u32(items.length), ...items.map(u32))
    }
    case 5:
      return answer(false, marshalPcrSelection([{ hash: alg.sha256, pcrs: Array.from({ length: 24 }, (_, pcr) => pcr) }]))
    case 6: {
      const { more, items } = page([...properties], ([id]) => id >= property, count)
      return answer(more, u32(items.length), ...items.map(([id, value]) => concat(u32(id), u32(value))))
    }
    case 8:
      return answer(false, u32(1), u16(curve.p256))
    default:
      throw parameter(1, rc.value)
  }
}
