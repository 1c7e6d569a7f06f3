import { alg, handle as known } from '@fleetkey/tpm2/constants.ts'
import { isLockedOut } from './lockout.ts'
import { slots, type Machine } from './machine.ts'
import { nvAttribute, typeOf } from './nv.ts'

const text = (four: string): number => Buffer.from(four.padEnd(4, '\0'), 'latin1').readUInt32BE(0)

/** TPM_PT that never change (Part 2 §6.13). Manufacturer and vendor string say what this is. */
export const fixedProperties: readonly (readonly [number, number])[] = [
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
  // Largest buffer; slots for objects, persistent objects, sessions.
  [0x10d, 1024],
  [0x10e, slots.objects],
  [0x10f, slots.persistent],
  [0x110, slots.sessions],
  [0x111, slots.activeSessions],
  // PCRs, bytes of a selection, gap of saved sessions.
  [0x112, 24],
  [0x113, 3],
  [0x114, 0xffff],
  [0x116, 0],
  [0x117, 2048],
  [0x118, 6],
  [0x119, 4096],
  // How contexts are protected.
  [0x11a, alg.sha256],
  [0x11b, alg.aes],
  [0x11c, 256],
  [0x11d, 255],
  [0x11e, 4096],
  [0x11f, 4096],
  [0x120, 64],
  [0x122, 1024],
  [0x12c, 1024],
]

/** TPMA_PERMANENT: which hierarchies have a value, whether TPM2_Clear is off, whether the TPM is locked out. */
const permanent = ({ durable }: Machine): number => {
  const isSet = (handle: number): boolean => (durable.auths[String(handle)]?.length ?? 0) > 0
  const bits: readonly (readonly [boolean, number])[] = [
    [isSet(known.owner), 1 << 0],
    [isSet(known.endorsement), 1 << 1],
    [isSet(known.lockout), 1 << 2],
    [durable.clearDisabled, 1 << 8],
    [isLockedOut(durable.lockout), 1 << 9],
    [true, 1 << 10],
  ]
  return bits.reduce((sum, [set, bit]) => (set ? sum | bit : sum), 0)
}

/** TPM_PT that commands change. */
export const variableProperties = (machine: Machine): readonly (readonly [number, number])[] => {
  const { durable, sessions, savedSessions, objects, nv } = machine
  const active = sessions.size + savedSessions.size
  const { lockout, orderly, persistent } = durable
  return [
    [0x200, permanent(machine)],
    // All hierarchies are enabled; the highest bit: shut down orderly.
    [0x201, 0xf | (orderly === 'clear' || orderly === 'state' ? 0x8000_0000 : 0)],
    [0x202, nv.all.length],
    [0x203, sessions.size],
    [0x204, slots.sessions - sessions.size],
    [0x205, active],
    [0x206, slots.activeSessions - active],
    [0x207, slots.objects - objects.size],
    [0x208, persistent.size],
    [0x209, slots.persistent - persistent.size],
    [0x20a, nv.all.filter((one) => typeOf(one) === nvAttribute.counter).length],
    [0x20b, 8],
    [0x20c, 0],
    [0x20d, 2],
    [0x20e, lockout.failedTries],
    [0x20f, lockout.maxTries],
    [0x210, lockout.recoveryTime],
    [0x211, lockout.lockoutRecovery],
    [0x212, 0],
    [0x213, 0],
    [0x214, 0],
  ]
}
