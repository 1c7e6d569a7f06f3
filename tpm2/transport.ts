import { open, type FileHandle } from 'node:fs/promises'
import { connect, type NetConnectOpts, type Socket } from 'node:net'
import { TpmTransportError } from './errors.ts'

/** Carries one command at a time; whoever shares a transport must take turns (tpm.ts does). A simulator in this process is one too. */
export interface Transport {
  /** One command, its whole response. Throws TpmTransportError. */
  send(command: Uint8Array): Promise<Uint8Array>
  close(): Promise<void>
}

/** Longest response that is believed; a TPM's buffers are 4 KiB. */
const maxResponse = 16 << 10
/** Milliseconds: an RSA key on a slow chip takes tens of seconds. */
const patience = 120_000

/** `device:/dev/tpmrm0`, `tcp:HOST:PORT` or `unix:PATH` (swtpm's raw command protocol). Throws TpmTransportError for anything else. */
export const openTransport = async (spec: string): Promise<Transport> => {
  const [kind, rest] = [spec.slice(0, spec.indexOf(':')), spec.slice(spec.indexOf(':') + 1)]
  if (kind === 'device' && rest !== '') return await deviceTransport(rest)
  if (kind === 'unix' && rest !== '') return await socketTransport({ path: rest }, spec)
  const colon = rest.lastIndexOf(':')
  const port = Number(rest.slice(colon + 1))
  if (kind === 'tcp' && colon > 0 && Number.isInteger(port) && port > 0 && port < 65_536)
    return await socketTransport({ host: rest.slice(0, colon), port }, spec)
  throw new TpmTransportError(`TPM "${spec}": expected device:PATH, tcp:HOST:PORT or unix:PATH`)
}

/** The kernel's resource-managed device: a write is a command, the next read its response. Both run off the event loop. */
const deviceTransport = async (path: string): Promise<Transport> => {
  let file: FileHandle
  try {
    file = await open(path, 'r+')
  } catch (cause) {
    throw new TpmTransportError(`TPM device ${path}: ${cause instanceof Error ? cause.message : 'cannot be opened'}`, { cause })
  }
  return {
    async send(command) {
      try {
        await file.write(command)
        const buffer = new Uint8Array(maxResponse)
        const { bytesRead } = await file.read(buffer, 0, buffer.length, null)
        return buffer.slice(0, bytesRead)
      } catch (cause) {
        throw new TpmTransportError(`TPM device ${path}: ${cause instanceof Error ? cause.message : 'failed'}`, { cause })
      }
    },
    close: async () => await file.close(),
  }
}

const socketTransport = async (to: NetConnectOpts, name: string): Promise<Transport> => {
  const socket = await connected(to, name)
  let received = Buffer.alloc(0)
  let waiting: { resolve(response: Uint8Array): void; reject(error: Error): void } | undefined
  let broken: Error | undefined
  const fail = (why: string): void => {
    broken ??= new TpmTransportError(`TPM ${name}: ${why}`)
    waiting?.reject(broken)
    waiting = undefined
    socket.destroy()
  }
  socket.on('data', (chunk: Buffer) => {
    received = Buffer.concat([received, chunk])
    if (received.length < 6) return
    const length = received.readUInt32BE(2)
    if (length < 10 || length > maxResponse) return fail(`a response of ${length} bytes`)
    if (received.length < length) return
    const response = new Uint8Array(received.subarray(0, length))
    received = received.subarray(length)
    if (waiting === undefined || received.length > 0) return fail('a response that nobody asked for')
    waiting.resolve(response)
    waiting = undefined
  })
  socket.on('error', (error) => fail(error.message))
  socket.on('close', () => fail('closed the connection'))
  return {
    async send(command) {
      if (broken !== undefined) throw broken
      if (waiting !== undefined) throw new TpmTransportError('two commands at a time')
      const { promise, resolve, reject } = Promise.withResolvers<Uint8Array>()
      waiting = { resolve, reject }
      const timer = setTimeout(() => fail(`no response within ${patience / 1000} s`), patience)
      socket.write(command)
      try {
        return await promise
      } finally {
        clearTimeout(timer)
      }
    },
    async close() {
      broken ??= new TpmTransportError(`TPM ${name}: closed`)
      socket.removeAllListeners('close')
      socket.destroy()
    },
  }
}

const connected = async (to: NetConnectOpts, name: string): Promise<Socket> => {
  const { promise, resolve, reject } = Promise.withResolvers<Socket>()
  const socket = connect(to)
  socket.setNoDelay(true)
  const failed = (error: Error): void => reject(new TpmTransportError(`TPM ${name}: ${error.message}`, { cause: error }))
  socket.once('error', failed)
  socket.once('connect', () => {
    socket.removeListener('error', failed)
    resolve(socket)
  })
  return await promise
}
