import { concat, empty, sized, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { command, handle as known } from '@fleetkey/tpm2/constants.ts'
import { password } from '../tpm-script.ts'
import { createPrimary, flush, owner, sealed, storage, type Scenario } from './recorder.ts'

const frame = (tag: number, code: number, body: Uint8Array = empty): Uint8Array => concat(u16(tag), u32(10 + body.length), u32(code), body)
const area = (session: number, attributes: number, value: Uint8Array = empty, nonce: Uint8Array = empty): Uint8Array =>
  concat(u32(session), sized(nonce), u8(attributes), sized(value))

/** Headers, handles, authorisation areas and sizes that are wrong. */
export const framing: Scenario = async (on) => {
  await on.raw('tag', frame(0x8003, command.getRandom, u16(8)))
  await on.raw('tag 0', frame(0, command.getRandom, u16(8)))
  await on.raw('size too large', concat(u16(0x8001), u32(13), u32(command.getRandom), u16(8)))
  await on.raw('unknown command', frame(0x8001, 0x19f))
  await on.raw('unknown vendor command', frame(0x8001, 0x2000_0001))
  await on.raw('no parameters', frame(0x8001, command.getRandom))
  await on.raw('half a parameter', frame(0x8001, command.getRandom, u8(1)))
  await on.raw('trailing byte', frame(0x8001, command.getRandom, concat(u16(8), u8(0))))
  await on.raw('startup again', frame(0x8001, command.startup, u16(0)))
  await on.raw('startup with sessions', frame(0x8002, command.startup, u16(0)))
  await on.raw('no handle', frame(0x8001, command.readPublic))
  await on.raw('half a handle', frame(0x8001, command.readPublic, u16(0x8000)))
  for (const handle of [0, 0x0100_0000, 0x0200_0000, 0x4000_0001, 0x8000_0000, 0x8000_0003, 0x8100_0000, 0xffff_ffff])
    await on.raw(`handle ${handle.toString(16)}`, frame(0x8001, command.readPublic, u32(handle)))
  await on.raw('no session where one is needed', frame(0x8001, command.createPrimary, u32(owner)))
  const clear = (areas: Uint8Array): Uint8Array => frame(0x8002, command.dictionaryAttackLockReset, concat(u32(known.lockout), areas))
  await on.raw('authorisation size 0', clear(u32(0)))
  await on.raw('authorisation size 8', clear(concat(u32(8), new Uint8Array(8))))
  await on.raw('authorisation size too large', clear(concat(u32(100), area(known.password, 1))))
  await on.raw('authorisation size missing', clear(empty))
  await on.raw('half an area', clear(concat(u32(9), area(known.password, 1, new Uint8Array(4)).subarray(0, 9))))
  await on.raw('session 0', clear(concat(u32(9), area(0, 1))))
  await on.raw('session not loaded', clear(concat(u32(9), area(0x0200_0000, 1))))
  await on.raw('session out of range', clear(concat(u32(9), area(0x0200_0040, 1))))
  await on.raw('policy session not loaded', clear(concat(u32(9), area(0x0300_0001, 1))))
  await on.raw('reserved bit', clear(concat(u32(9), area(known.password, 0x09))))
  for (const bit of [0x02, 0x04, 0x20, 0x40, 0x80]) await on.raw(`password with ${bit}`, clear(concat(u32(9), area(known.password, 1 | bit))))
  await on.raw('password with a nonce', clear(concat(u32(25), area(known.password, 1, empty, new Uint8Array(16)))))
  await on.raw('wrong password', clear(concat(u32(13), area(known.password, 1, Uint8Array.of(1, 2, 3, 4)))))
  await on.raw('lockout itself locked out', clear(concat(u32(9), area(known.password, 1))))
  await on.raw(
    'two passwords for one handle',
    frame(0x8002, command.clear, concat(u32(known.platform), u32(18), area(known.password, 1), area(known.password, 1))),
  )
  await on.raw('four areas', clear(concat(u32(36), ...Array.from({ length: 4 }, () => area(known.password, 1)))))
  await on.raw('sessions where none are taken', frame(0x8002, command.flushContext, concat(u32(9), area(known.password, 1), u32(0x8000_0000))))
  await on.raw('a response', concat(u16(0x8001), u32(10), u32(0)))
  const { handle } = await on.step('primary', createPrimary(owner, storage))
  await on.step('trailing bytes change nothing', { code: command.flushContext, parameters: concat(u32(handle), u8(0)) })
  await on.step('still there', { code: command.readPublic, handles: [handle] })
  await on.step('data in a primary', createPrimary(owner, sealed, { data: new Uint8Array(16) }))
  await on.step('null hierarchy', createPrimary(known.null, storage))
  await on.step('full', createPrimary(owner, storage))
  await on.step('wrong hierarchy', createPrimary(known.lockout, storage))
  await on.step('password of the null hierarchy', { ...createPrimary(known.null, storage), auth: [password(Uint8Array.of(1))] })
  await on.step('flush', flush(handle))
  await on.step('flush twice', flush(handle))
  await on.step('flush what cannot be flushed', flush(0x8100_0000))
}
