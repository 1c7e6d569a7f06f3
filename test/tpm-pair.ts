import { connect, type Socket } from 'node:net'
import { randomBytes } from 'node:crypto'
import { createSoftwareTpm, type SoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { concat, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known } from '@fleetkey/tpm2/constants.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { startSwtpm, type RunningSwtpm } from './swtpm.ts'
import { password, ScriptTpm } from './tpm-script.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

/** A TPM that scripts run on: the reference or ours. */
export interface Subject {
  readonly name: 'swtpm' | 'simulator'
  readonly tpm: ScriptTpm
  /** Power goes without a word and comes back; nobody has sent TPM2_Startup yet. */
  init(): Promise<void>
  setLocality(locality: number): Promise<void>
  /** A TPM as it leaves its factory. */
  renew(): Promise<void>
  stop(): Promise<void>
}

const startup = concat(u16(0x8001), u32(12), u32(command.startup), u16(0))

/** TPM2_PCR_Allocate is not among our commands: the reference gets the one bank that ours has, with the start that it takes. */
const allocatePcrCode = 0x12b
const allocation = concat(
  u32(4),
  ...[alg.sha1, alg.sha256, alg.sha384, alg.sha512].map((hash) => concat(u16(hash), u8(3), new Uint8Array(3).fill(hash === alg.sha256 ? 0xff : 0))),
)

/** swtpm's control channel (tpm_ioctl.h): one command, its whole answer. */
const control = async (path: string, bytes: Uint8Array): Promise<void> => {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const socket: Socket = connect(path, () => void socket.write(bytes))
  socket.once('data', (answer: Buffer) => {
    socket.destroy()
    if (answer.readUInt32BE(0) === 0) resolve()
    else reject(new Error(`swtpm's control channel answered ${answer.readUInt32BE(0)}`))
  })
  socket.once('error', reject)
  await promise
}

/** A socket that is there does not listen yet. */
const opened = async (spec: string): Promise<Transport> => {
  for (let attempt = 0; ; attempt++)
    try {
      return await openTransport(spec)
    } catch (error) {
      if (attempt > 100) throw error
      await new Promise((resolve) => void setTimeout(resolve, 5))
    }
}

export const reference = async (): Promise<Subject> => {
  let running: RunningSwtpm
  let transport: Transport
  const side = (): string => `${running.spec.slice('unix:'.length)}.ctrl`
  const init = async (): Promise<void> => await control(side(), concat(u32(2), u32(0)))
  const begin = async (): Promise<void> => {
    running = await startSwtpm()
    transport = await opened(running.spec)
    await tpm.must({ code: allocatePcrCode, handles: [known.platform], auth: [password()], parameters: allocation })
    await tpm.must({ code: command.shutdown, parameters: u16(0) })
    await init()
    await transport.send(startup)
  }
  const end = async (): Promise<void> => {
    await transport.close()
    await running.stop()
  }
  const tpm = new ScriptTpm(async (bytes) => await transport.send(bytes))
  await begin()
  return {
    name: 'swtpm',
    tpm,
    init,
    setLocality: async (locality) => await control(side(), concat(u32(5), u8(locality))),
    async renew() {
      await end()
      await begin()
    },
    stop: end,
  }
}

/** Starts ours as often as the reference was started, so that counters agree. */
export const simulator = async (now: () => number = () => Date.now()): Promise<Subject> => {
  let made: SoftwareTpm
  const begin = (): void => {
    made = createSoftwareTpm({ random, now })
    made.powerCycle()
  }
  begin()
  return {
    name: 'simulator',
    tpm: new ScriptTpm(async (bytes) => made.execute(bytes)),
    init: async () => made.powerCycle({ shutdown: 'none', startup: 'none' }),
    setLocality: async (locality) => made.setLocality(locality),
    renew: async () => begin(),
    stop: async () => undefined,
  }
}
