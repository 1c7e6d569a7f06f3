import { concat, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command as code, handle as known } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { command, handleAt, user, type Call, type Command } from '../command.ts'
import { accepts } from '../entities.ts'
import { buffer, digestValues, pcrSelection } from '../readers.ts'

/** Hashes that an event is measured with, whether their bank is here or not. */
export const eventDigests = [alg.sha1, alg.sha256, alg.sha384, alg.sha512] as const

interface Later {
  readonly hash: number
  readonly digest: () => Uint8Array
}

/** Extends the PCR in the first handle, unless it is the null handle, with an event's digests; the digests. */
export const extendEvent = (call: Call, digests: readonly Later[]): readonly { hash: number; digest: Uint8Array }[] => {
  const { machine } = call
  const pcr = handleAt(call, 0)
  if (pcr !== known.null) {
    machine.pcrs.checkExtend(pcr, machine.locality)
    if (pcr < 16) machine.disorder()
  }
  return digests.map(({ hash, digest: make }) => {
    const value = make()
    if (pcr !== known.null && hash === alg.sha256) machine.pcrs.extend(pcr, value)
    return { hash, digest: value }
  })
}

export const pcrCommands: readonly (readonly [number, Command])[] = [
  [code.pcrRead, command({ handles: [], read: (p) => p.take(pcrSelection), run: ({ machine }, banks) => ({ parameters: machine.pcrs.read(banks) }) })],
  [
    code.pcrExtend,
    command({
      handles: [user(accepts.pcrOrNull)],
      read: (p) => p.take(digestValues),
      run(call, values) {
        extendEvent(
          call,
          values.map(({ hash, digest: value }) => ({ hash, digest: () => value })),
        )
      },
    }),
  ],
  [
    code.pcrEvent,
    command({
      handles: [user(accepts.pcrOrNull)],
      decrypt: true,
      read: (p) => p.take(buffer(1024)),
      run(call, event) {
        const values = extendEvent(
          call,
          eventDigests.map((hash) => ({ hash, digest: () => digest(hash, event) })),
        )
        return { parameters: concat(u32(values.length), ...values.map(({ hash, digest: value }) => concat(u16(hash), value))) }
      },
    }),
  ],
  [
    code.pcrReset,
    command({ handles: [user(accepts.pcr)], read: () => undefined, run: (call) => call.machine.pcrs.clear(handleAt(call, 0), call.machine.locality) }),
  ],
]
