import { concat, empty, sized, u32, u64, u8 } from '@fleetkey/tpm2/bytes.ts'
import { command as code } from '@fleetkey/tpm2/constants.ts'
import { accepts } from '../entities.ts'
import { command, nothing, user, type Command } from '../command.ts'
import type { Input } from '../input.ts'
import { buffer, publicParameters, u16, u64 as readU64, yesNo } from '../readers.ts'
import { asParameter, parameter, rc, Refusal } from '../refusal.ts'

/** TPM_SU: whether state. */
const startupType = (input: Input): boolean => {
  const type = input.u16()
  if (type > 1) throw new Refusal(rc.value)
  return type === 1
}

/** TPML_ALG of TPM2_IncrementalSelfTest: everything is tested at once, so nothing is left to do. */
const algorithms = (input: Input): void => {
  const count = input.u32()
  if (count > 64) throw new Refusal(rc.size)
  input.bytes(count * 2)
}

/** Start, shutdown, self-tests, random numbers, clock. */
export const startupCommands: readonly (readonly [number, Command])[] = [
  [
    code.startup,
    command({ handles: [], sessions: false, read: (p) => p.take(startupType), run: ({ machine }, state) => asParameter(1, () => machine.startup(state)) }),
  ],
  [code.shutdown, command({ handles: [], read: (p) => p.take(startupType), run: ({ machine }, state) => machine.shutdown(state) })],
  [code.selfTest, command({ handles: [], read: (p) => p.take(yesNo), run: nothing })],
  [code.incrementalSelfTest, command({ handles: [], read: (p) => p.take(algorithms), run: () => ({ parameters: u32(0) }) })],
  [code.getTestResult, command({ handles: [], encrypt: true, read: nothing, run: () => ({ parameters: concat(sized(empty), u32(0)) }) })],
  [code.testParms, command({ handles: [], read: (p) => p.take(publicParameters), run: nothing })],
  [
    code.getRandom,
    command({
      handles: [],
      encrypt: true,
      read: (p) => p.take(u16),
      run: ({ machine }, wanted) => ({ parameters: sized(machine.random(Math.min(64, wanted))) }),
    }),
  ],
  [code.stirRandom, command({ handles: [], decrypt: true, read: (p) => p.take(buffer(128)), run: nothing })],
  [
    code.readClock,
    command({
      handles: [],
      read: nothing,
      run({ machine }) {
        const { clock, resetCount, restartCount, safe } = machine.clock()
        return { parameters: concat(u64(BigInt(machine.time)), u64(clock), u32(resetCount), u32(restartCount), u8(safe ? 1 : 0)) }
      },
    }),
  ],
  [
    code.clockSet,
    command({
      handles: [user(accepts.provision)],
      read: (p) => p.take(readU64),
      run({ machine }, time) {
        if (time > 0xffff_0000_0000_0000n || time < machine.clock().clock) throw parameter(1, rc.value)
        machine.changed({ clock: Number(time) })
      },
    }),
  ],
]
