import { concat, sized } from '@fleetkey/tpm2/bytes.ts'
import { command as code, handle as known } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { admin, command, handleAt, named, nvAt, user, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import { isSet, marshalNvPublic, nameAlgOf, nvAttribute as a, nvName, readNvPublic, typeOf, type NvIndex, type NvPublic } from '../nv.ts'
import { trimmed } from '../objects.ts'
import { digestBytes, maxBuffer, sizeOfHash, u16 } from '../readers.ts'
import { handleFault, parameter, rc, Refusal } from '../refusal.ts'

/** Owner and platform by their attribute; the index by its own value or policy, which its session has shown. `at`: place of the authorising handle. */
const checkAuthority = (call: Call, at: number, index: NvIndex, bits: { owner: number; platform: number }): void => {
  const by = handleAt(call, at)
  const bit = by === known.owner ? bits.owner : by === known.platform ? bits.platform : null
  if (bit === null ? by !== index.index : !isSet(index, bit)) throw new Refusal(rc.nvAuthorization)
}

export const checkNvRead = (call: Call, at: number, index: NvIndex): void => {
  if (isSet(index, a.readLocked)) throw new Refusal(rc.nvLocked)
  checkAuthority(call, at, index, { owner: a.ownerRead, platform: a.ppRead })
  if (!isSet(index, a.written)) throw new Refusal(rc.nvUninitialized)
}

const checkWrite = (call: Call, index: NvIndex): void => {
  if (isSet(index, a.writeLocked)) throw new Refusal(rc.nvLocked)
  checkAuthority(call, 0, index, { owner: a.ownerWrite, platform: a.ppWrite })
}

const types: ReadonlySet<number> = new Set([0, a.counter, a.bits, a.extend])

/** What TPM2_NV_DefineSpace asks (Part 3 §31.3); `platform`: who defines. */
const checkPublic = (of: NvPublic, authSize: number, platform: boolean): void => {
  const has = (bit: number): boolean => (of.attributes & bit) !== 0
  const type = of.attributes & a.typeMask
  if (of.policy.length !== 0 && of.policy.length !== sizeOfHash(of.nameAlg)) throw parameter(2, rc.size)
  if (authSize > sizeOfHash(of.nameAlg)) throw parameter(1, rc.size)
  if (!types.has(type)) throw parameter(2, rc.attributes)
  if (type === a.extend ? of.size !== sizeOfHash(of.nameAlg) : type !== 0 && of.size !== 8) throw parameter(2, rc.size)
  if (type === a.counter && has(a.clearStClear)) throw parameter(2, rc.attributes)
  if (has(a.written | a.writeLocked | a.readLocked)) throw parameter(2, rc.attributes)
  if (!has(a.ownerRead | a.ppRead | a.authRead | a.policyRead)) throw parameter(2, rc.attributes)
  if (!has(a.ownerWrite | a.ppWrite | a.authWrite | a.policyWrite)) throw parameter(2, rc.attributes)
  if (has(a.clearStClear) && has(a.writeDefine)) throw parameter(2, rc.attributes)
  if (has(a.platformCreate) !== platform) throw handleFault(1, rc.attributes)
  // Deletion by policy is for the platform, by a command that is not implemented here.
  if (has(a.policyDelete)) throw parameter(2, rc.attributes)
  if (of.size > 1024 && has(a.writeAll)) throw parameter(2, rc.size)
}

const define = (call: Call, { auth, area }: { auth: Uint8Array; area: NvPublic }): void => {
  const { machine } = call
  const value = trimmed(auth)
  checkPublic(area, value.length, handleAt(call, 0) === known.platform)
  const { index, nameAlg, attributes, policy, size } = area
  machine.nv.define({ index, nameAlg, attributes, policy, auth: value, data: new Uint8Array(size) })
  machine.changed()
}

const undefine = (call: Call): void => {
  const index = nvAt(call, 1)
  if (handleAt(call, 0) === known.owner && isSet(index, a.platformCreate)) throw new Refusal(rc.nvAuthorization)
  call.machine.nv.remove(index.index)
  call.machine.changed()
}

const write = (call: Call, { data, offset }: { data: Uint8Array; offset: number }): void => {
  const index = nvAt(call, 1)
  checkWrite(call, index)
  if (typeOf(index) !== 0) throw new Refusal(rc.attributes)
  if (offset > index.data.length) throw parameter(2, rc.value)
  if (data.length > index.data.length - offset) throw new Refusal(rc.nvRange)
  if (isSet(index, a.writeAll) && data.length < index.data.length) throw new Refusal(rc.nvRange)
  call.machine.nv.write(index, offset, data)
  call.machine.changed()
}

const counterOf = (call: Call, index: NvIndex): bigint =>
  isSet(index, a.written) ? Buffer.from(index.data).readBigUInt64BE() : call.machine.durable.maxCounter

/** A new counter starts above every one that there has been, so that none can be wound back by defining it again. */
const increment = (call: Call): void => {
  const index = nvAt(call, 1)
  checkWrite(call, index)
  if (typeOf(index) !== a.counter) throw handleFault(2, rc.attributes)
  const value = counterOf(call, index) + 1n
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(value)
  call.machine.nv.write(index, 0, bytes)
  const { maxCounter } = call.machine.durable
  call.machine.changed({ maxCounter: value > maxCounter ? value : maxCounter })
}

const extend = (call: Call, data: Uint8Array): void => {
  const index = nvAt(call, 1)
  checkWrite(call, index)
  if (typeOf(index) !== a.extend) throw handleFault(2, rc.attributes)
  const hash = nameAlgOf(index)
  const old = isSet(index, a.written) ? index.data : new Uint8Array(sizeOfHash(hash))
  call.machine.nv.write(index, 0, digest(hash, old, data))
  call.machine.changed()
}

const setBits = (call: Call, bits: bigint): void => {
  const index = nvAt(call, 1)
  checkWrite(call, index)
  if (typeOf(index) !== a.bits) throw handleFault(2, rc.attributes)
  const old = isSet(index, a.written) ? Buffer.from(index.data).readBigUInt64BE() : 0n
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(old | bits)
  call.machine.nv.write(index, 0, bytes)
  call.machine.changed()
}

const read = (call: Call, { size, offset }: { size: number; offset: number }): { parameters: Uint8Array } => {
  const index = nvAt(call, 1)
  checkNvRead(call, 0, index)
  if (size > 1024) throw parameter(1, rc.value)
  if (offset > index.data.length) throw parameter(2, rc.value)
  if (size > index.data.length - offset) throw new Refusal(rc.nvRange)
  return { parameters: sized(index.data.subarray(offset, offset + size)) }
}

/** Locks; what is locked already, or cannot be read or written yet, is no error. */
const lock = (call: Call, how: { bit: number; needed: number; check: (call: Call, index: NvIndex) => void }): void => {
  const index = nvAt(call, 1)
  try {
    how.check(call, index)
  } catch (error) {
    if (!(error instanceof Refusal) || error.rc === rc.nvAuthorization) throw error
    if (error.rc === rc.nvLocked) return
  }
  if (!isSet(index, how.needed)) throw handleFault(2, rc.attributes)
  call.machine.nv.change(index, { attributes: index.attributes | how.bit })
  call.machine.changed()
}

const changeAuth = (call: Call, value: Uint8Array): void => {
  const index = nvAt(call, 0)
  const auth = trimmed(value)
  if (auth.length > sizeOfHash(nameAlgOf(index))) throw parameter(1, rc.size)
  call.machine.nv.change(index, { auth })
  call.machine.changed()
}

const byAuth = [user(accepts.nvAuth), named(accepts.nvIndex)]
const none = (): undefined => undefined

export const nvCommands: readonly (readonly [number, Command])[] = [
  [
    code.nvDefineSpace,
    command({ handles: [user(accepts.provision)], decrypt: true, read: (p) => ({ auth: p.take(digestBytes), area: p.take(readNvPublic) }), run: define }),
  ],
  [code.nvUndefineSpace, command({ handles: [user(accepts.provision), named(accepts.nvIndex)], read: none, run: undefine })],
  [
    code.nvReadPublic,
    command({
      handles: [named(accepts.nvIndex)],
      encrypt: true,
      read: none,
      run(call) {
        const index = nvAt(call, 0)
        return { parameters: concat(sized(marshalNvPublic(index)), sized(nvName(index))) }
      },
    }),
  ],
  [code.nvWrite, command({ handles: byAuth, decrypt: true, writesNv: true, read: (p) => ({ data: p.take(maxBuffer), offset: p.take(u16) }), run: write })],
  [code.nvIncrement, command({ handles: byAuth, writesNv: true, read: none, run: increment })],
  [code.nvExtend, command({ handles: byAuth, decrypt: true, writesNv: true, read: (p) => p.take(maxBuffer), run: extend })],
  [code.nvSetBits, command({ handles: byAuth, writesNv: true, read: (p) => p.take((input) => input.u64()), run: setBits })],
  [code.nvRead, command({ handles: byAuth, encrypt: true, read: (p) => ({ size: p.take(u16), offset: p.take(u16) }), run: read })],
  [
    code.nvWriteLock,
    command({
      handles: byAuth,
      writesNv: true,
      read: none,
      run: (call) => lock(call, { bit: a.writeLocked, needed: a.writeDefine | a.writeStClear, check: checkWrite }),
    }),
  ],
  [
    code.nvReadLock,
    command({
      handles: byAuth,
      read: none,
      run: (call) => lock(call, { bit: a.readLocked, needed: a.readStClear, check: (one, index) => checkNvRead(one, 0, index) }),
    }),
  ],
  [code.nvChangeAuth, command({ handles: [admin(accepts.nvIndex)], decrypt: true, read: (p) => p.take(digestBytes), run: changeAuth })],
]
