import { open, realpath, type FileHandle } from 'node:fs/promises'
import { basename } from 'node:path'
import { concat, u16, u32 } from './bytes.ts'
import { command as code, tag } from './constants.ts'
import { rc, TpmTransportError } from './errors.ts'
import type { Transport } from './transport.ts'

/** Longest response that is believed; a TPM's buffers are 4 KiB. */
export const maxResponse = 16 << 10

/**
 * Devices whose last command has not come back, and since when (milliseconds of the monotonic clock). Such a command holds one of the four threads that
 * serve every file and name of this process, until the kernel gives up: the device is not opened again before, so that a TPM that hangs never holds two.
 */
const stuck = new Map<string, number>()

/** What the driver's error numbers mean for whoever stands before the machine. */
const meaning: Readonly<Record<string, string>> = {
  ENOENT: 'it is not there: is the driver loaded, and on a Raspberry Pi the overlay (dtoverlay=tpm-slb9670) enabled?',
  EACCES: 'no permission: run as a member of the group tss',
  EPERM: 'no permission: run as a member of the group tss',
  EBUSY: 'another process has it open: use /dev/tpmrm0, which programs can share',
  ENODEV: 'the driver has lost the TPM',
  ENXIO: 'the driver has lost the TPM',
  EPIPE: 'the driver was unloaded or has lost the TPM',
  ETIME: 'the TPM did not finish within the time that the kernel allows it',
  EIO: 'the bus failed: look at the wiring, the SPI or I2C clock, and dmesg',
  EFAULT: 'the TPM was reset behind the resource manager of the kernel',
}

const codeOf = (thrown: unknown): string => (thrown instanceof Error && 'code' in thrown && typeof thrown.code === 'string' ? thrown.code : '')

const failure = (path: string, thrown: unknown): TpmTransportError => {
  if (thrown instanceof TpmTransportError) return thrown
  const said = thrown instanceof Error ? thrown.message : String(thrown)
  const plain = meaning[codeOf(thrown)]
  return new TpmTransportError(`TPM device ${path}: ${said}${plain === undefined ? '' : ` (${plain})`}`, { cause: thrown })
}

/** Whether the kernel's resource manager stands behind this path, links followed. */
const isManaged = async (path: string): Promise<boolean> => basename(await realpath(path).catch(() => path)).startsWith('tpmrm')

/**
 * The kernel's character device: a write carries the command out, a read fetches the response. Both block, in libuv's pool and never on the event loop. Neither
 * O_NONBLOCK nor epoll does better: the driver's read and poll take the lock that the running command holds (drivers/char/tpm/tpm-dev-common.c), so that the
 * event loop would stand still while it asked whether the answer is there.
 */
export const openDevice = async (path: string, patience: number): Promise<Transport> => {
  const since = stuck.get(path)
  if (since !== undefined) {
    const seconds = Math.round((performance.now() - since) / 1000)
    throw new TpmTransportError(`TPM device ${path}: it hangs: the kernel still waits for a command that was given up ${seconds} s ago`)
  }
  const file = await open(path, 'r+').catch((thrown: unknown) => Promise.reject(failure(path, thrown)))
  const managed = await isManaged(path)
  let broken: TpmTransportError | undefined
  let busy = false

  /** The caller goes on; the thread is not given back before the kernel lets go of it. */
  const giveUp = (running: Promise<unknown>): TpmTransportError => {
    stuck.set(path, performance.now())
    const release = async (): Promise<void> => {
      await file.close().catch(() => undefined)
      stuck.delete(path)
    }
    void running.then(release, release)
    return (broken = new TpmTransportError(`TPM device ${path}: no response within ${patience / 1000} s`))
  }

  return {
    managed,
    async send(command) {
      if (broken !== undefined) throw broken
      if (busy) throw new TpmTransportError('two commands at a time')
      busy = true
      const running = exchange(file, command)
      try {
        const response = await Promise.race([running, after(patience, running)])
        if (response === timeOut) throw giveUp(running)
        return response
      } catch (thrown) {
        const full = managed && codeOf(thrown) === 'ENOMEM' ? noRoom(command) : undefined
        if (full !== undefined) return full
        throw (broken ??= failure(path, thrown))
      } finally {
        busy = false
      }
    },
    async close() {
      if (broken === undefined || !stuck.has(path)) await file.close()
      broken ??= new TpmTransportError(`TPM device ${path}: closed`)
    },
  }
}

const timeOut = Symbol('no response in time')

const after = async (milliseconds: number, unless: Promise<unknown>): Promise<typeof timeOut> =>
  await new Promise((resolve) => {
    const timer = setTimeout(() => resolve(timeOut), milliseconds)
    const cancel = (): void => clearTimeout(timer)
    unless.then(cancel, cancel)
  })

/** The driver gives the whole response to one read; what gives it in pieces (a serial line) is asked again. */
const exchange = async (file: FileHandle, command: Uint8Array): Promise<Uint8Array> => {
  const { bytesWritten } = await file.write(command)
  if (bytesWritten !== command.length) throw new TpmTransportError(`TPM device: ${bytesWritten} of ${command.length} bytes were taken`)
  const buffer = Buffer.alloc(maxResponse)
  for (let got = 0; ;) {
    const { bytesRead } = await file.read(buffer, got, buffer.length - got, null)
    if (bytesRead === 0) throw new TpmTransportError(`TPM device: a response that ends after ${got} bytes`)
    got += bytesRead
    const length = got < 6 ? undefined : buffer.readUInt32BE(2)
    if (length !== undefined && (length < 10 || length > maxResponse)) throw new TpmTransportError(`TPM device: a response of ${length} bytes`)
    if (length !== undefined && got >= length) return new Uint8Array(buffer.subarray(0, got))
  }
}

/** The resource manager has slots for three objects and three sessions, and says ENOMEM where a TPM would say that it is full. */
const noRoom = (command: Uint8Array): Uint8Array => {
  const starting = Buffer.from(command.buffer, command.byteOffset, command.length).readUInt32BE(6) === code.startAuthSession
  return concat(u16(tag.noSessions), u32(10), u32(starting ? rc.sessionMemory : rc.objectMemory))
}
