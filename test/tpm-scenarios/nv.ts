import { concat, empty, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known } from '@fleetkey/tpm2/constants.ts'
import { nvAttribute as a } from '@fleetkey/firmware-sim/tpm/nv.ts'
import { password, type Authorisation } from '../tpm-script.ts'
import { owner, type Recorder, type Scenario } from './recorder.ts'

const area = (index: number, attributes: number, size: number, of: { policy?: Uint8Array; hash?: number } = {}): Uint8Array =>
  concat(u32(index), u16(of.hash ?? alg.sha256), u32(attributes >>> 0), sized(of.policy ?? empty), u16(size))
const plain = a.ownerRead | a.ownerWrite | a.authRead | a.authWrite | a.noDA
const first = 0x0150_0000

const define = async (on: Recorder, label: string, bytes: Uint8Array, of: { by?: number; auth?: Uint8Array } = {}): Promise<void> => {
  await on.step(label, {
    code: command.nvDefineSpace,
    handles: [of.by ?? owner],
    auth: [password()],
    parameters: concat(sized(of.auth ?? empty), sized(bytes)),
  })
}
const publicOf = async (on: Recorder, label: string, index: number): Promise<void> =>
  void (await on.step(
    { label, see: (reader) => ({ area: Buffer.from(reader.sized()).toString('hex'), name: Buffer.from(reader.sized()).toString('hex') }) },
    { code: command.nvReadPublic, handles: [index] },
  ))

const definitions = async (on: Recorder): Promise<void> => {
  const attempts: readonly (readonly [string, Uint8Array, { by?: number; auth?: Uint8Array }?])[] = [
    ['plain', area(first, plain, 64)],
    ['again', area(first, plain, 64)],
    ['of no size', area(first + 1, plain, 0)],
    ['too large', area(first + 2, plain, 2049)],
    ['largest', area(first + 3, plain, 2048)],
    ['by the platform', area(first + 4, plain | a.platformCreate, 8), { by: known.platform }],
    ['by the platform, not marked so', area(first + 5, plain, 8), { by: known.platform }],
    ['marked the platform’s', area(first + 5, plain | a.platformCreate, 8)],
    ['by the lockout hierarchy', area(first + 5, plain, 8), { by: known.lockout }],
    ['counter', area(first + 5, plain | a.counter, 8)],
    ['counter of 4 bytes', area(first + 6, plain | a.counter, 4)],
    ['counter that starts anew', area(first + 6, plain | a.counter | a.clearStClear, 8)],
    ['bits', area(first + 6, plain | a.bits, 8)],
    ['extended', area(first + 7, plain | a.extend, 32)],
    ['extended, of a wrong size', area(first + 8, plain | a.extend, 20)],
    ['extended by SHA-384', area(first + 8, plain | a.extend, 48, { hash: alg.sha384 })],
    ['no such type', area(first + 9, plain | 0x30, 8)],
    ['written', area(first + 9, plain | a.written, 8)],
    ['locked', area(first + 9, plain | a.writeLocked, 8)],
    ['nobody reads', area(first + 9, a.ownerWrite, 8)],
    ['nobody writes', area(first + 9, a.ownerRead, 8)],
    ['reserved', area(first + 9, plain | (1 << 8), 8)],
    ['policy of a wrong size', area(first + 9, plain, 8, { policy: new Uint8Array(20) })],
    ['policy', area(first + 9, plain | a.policyRead, 8, { policy: new Uint8Array(32) })],
    ['no such hash', area(first + 10, plain, 8, { hash: 0x99 })],
    ['no NV index', area(0x8100_0000, plain, 8)],
    ['deleted by policy', area(first + 10, plain | a.policyDelete, 8, { policy: new Uint8Array(32) })],
    ['value too long', area(first + 10, plain, 8), { auth: new Uint8Array(33).fill(1) }],
    ['value', area(first + 10, plain, 8), { auth: Uint8Array.of(1, 2, 3, 0, 0) }],
    ['all or nothing', area(first + 11, plain | a.writeAll, 16)],
    ['locked after a write', area(first + 12, plain | a.writeDefine, 8)],
    ['read lock', area(first + 13, plain | a.readStClear | a.writeStClear, 8)],
    ['trailing byte', concat(area(first + 14, plain, 8), new Uint8Array(1))],
    ['short', area(first + 14, plain, 8).subarray(0, 12)],
  ]
  for (const [label, bytes, of] of attempts) await define(on, label, bytes, of)
  for (const index of [first, first + 4, first + 5, first + 7, first + 8, first + 9, first + 14]) await publicOf(on, `public ${index - first}`, index)
}

const contents = async (on: Recorder): Promise<void> => {
  const write = async (label: string, index: number, data: Uint8Array, of: { offset?: number; by?: number; auth?: Authorisation } = {}): Promise<void> =>
    void (await on.step(`write ${label}`, {
      code: command.nvWrite,
      handles: [of.by ?? owner, index],
      auth: [of.auth ?? password()],
      parameters: concat(sized(data), u16(of.offset ?? 0)),
    }))
  const read = async (label: string, index: number, size: number, of: { offset?: number; by?: number; auth?: Authorisation } = {}): Promise<void> =>
    void (await on.step(
      { label: `read ${label}`, see: (reader) => reader.sized() },
      { code: command.nvRead, handles: [of.by ?? owner, index], auth: [of.auth ?? password()], parameters: concat(u16(size), u16(of.offset ?? 0)) },
    ))
  const simple = async (label: string, code: number, index: number, parameters: Uint8Array = empty): Promise<void> =>
    void (await on.step(label, { code, handles: [owner, index], auth: [password()], parameters }))
  await read('unwritten', first, 8)
  await write('in the middle', first, Uint8Array.of(1, 2, 3), { offset: 10 })
  await read('all', first, 64)
  await read('part', first, 8, { offset: 8 })
  await read('beyond', first, 8, { offset: 60 })
  await read('from beyond', first, 1, { offset: 65 })
  await read('at the end', first, 0, { offset: 64 })
  await read('too much', first, 1025)
  await write('beyond', first, new Uint8Array(8), { offset: 60 })
  await write('from beyond', first, empty, { offset: 65 })
  await write('too much', first, new Uint8Array(1025))
  await write('by itself', first, Uint8Array.of(9), { by: first })
  await read('by itself', first, 4, { by: first })
  await read('by another', first, 4, { by: first + 3 })
  await read('by the platform', first, 4, { by: known.platform })
  await read('no such index', 0x0160_0000, 4)
  await read('an index that is none', 0x8100_0000, 4)
  await write('a counter', first + 5, new Uint8Array(8))
  await simple('increment', command.nvIncrement, first + 5)
  await simple('increment again', command.nvIncrement, first + 5)
  await read('counter', first + 5, 8)
  await simple('increment what is none', command.nvIncrement, first)
  await simple('set bits', command.nvSetBits, first + 6, concat(u32(0), u32(5)))
  await simple('set more bits', command.nvSetBits, first + 6, concat(u32(1), u32(2)))
  await read('bits', first + 6, 8)
  await simple('set bits of what has none', command.nvSetBits, first, concat(u32(0), u32(5)))
  await simple('extend', command.nvExtend, first + 7, sized(Uint8Array.of(1, 2, 3)))
  await read('extended', first + 7, 32)
  await simple('extend what is not', command.nvExtend, first, sized(empty))
  await read('with a value', first + 10, 8, { by: first + 10, auth: password(Uint8Array.of(1, 2, 3)) })
  await write('with a value', first + 10, new Uint8Array(8).fill(4), { by: first + 10, auth: password(Uint8Array.of(1, 2, 3)) })
  await write('with a wrong value', first + 10, new Uint8Array(8).fill(4), { by: first + 10 })
  await write('half of all', first + 11, new Uint8Array(8))
  await write('all of all', first + 11, new Uint8Array(16).fill(1))
  await write('once', first + 12, new Uint8Array(8))
  await simple('lock', command.nvWriteLock, first + 12)
  await write('locked', first + 12, new Uint8Array(8))
  await simple('lock again', command.nvWriteLock, first + 12)
  await simple('lock what has no lock', command.nvWriteLock, first)
  await simple('lock unwritten for reading', command.nvReadLock, first + 13)
  await write('before the read lock', first + 13, new Uint8Array(8))
  await simple('lock for reading', command.nvReadLock, first + 13)
  await read('locked', first + 13, 8)
  await simple('lock for reading what has no lock', command.nvReadLock, first)
  await on.step('change the value by password', {
    code: command.nvChangeAuth,
    handles: [first + 10],
    auth: [password(Uint8Array.of(1, 2, 3))],
    parameters: sized(empty),
  })
  for (const index of [first, first + 12, first + 13]) await publicOf(on, `public of ${index - first} afterwards`, index)
}

export const nv: Scenario = async (on) => {
  await definitions(on)
  await contents(on)
  const undefine = async (label: string, index: number, by: number = owner): Promise<void> =>
    void (await on.step(label, { code: command.nvUndefineSpace, handles: [by, index], auth: [password()] }))
  await undefine('undefine', first)
  await undefine('undefine again', first)
  await undefine('the platform’s by the owner', first + 4)
  await undefine('the platform’s by the platform', first + 4, known.platform)
  await on.step('counter anew', { code: command.nvUndefineSpace, handles: [owner, first + 5], auth: [password()] })
  await define(on, 'define the counter again', area(first + 5, plain | a.counter, 8))
  await on.step('read it before', { code: command.nvRead, handles: [owner, first + 5], auth: [password()], parameters: concat(u16(8), u16(0)) })
  await on.step('increment it', { code: command.nvIncrement, handles: [owner, first + 5], auth: [password()] })
  await on.step(
    { label: 'it did not go back', see: (reader) => reader.sized() },
    { code: command.nvRead, handles: [owner, first + 5], auth: [password()], parameters: concat(u16(8), u16(0)) },
  )
  await on.step('clear', { code: command.clear, handles: [known.lockout], auth: [password()] })
  for (const index of [first + 3, first + 9]) await publicOf(on, `public of ${index - first} after a clear`, index)
}
