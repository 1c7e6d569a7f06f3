import { connect, type NetConnectOpts, type Socket } from 'node:net'
import { maxResponse, openDevice } from './device-transport.ts'
import { TpmTransportError } from './errors.ts'

/** Carries one command at a time; whoever shares a transport must take turns (tpm.ts does). A simulator in this process is one too. */
export interface Transport {
  /** One command, its whole response. Throws TpmTransportError. */
  send(command: Uint8Array): Promise<Uint8Array>
  close(): Promise<void>
  /** A resource manager stands between: other programs use the TPM at the same time, and what is loaded here goes when this is closed. */
  readonly managed?: boolean
  /** It has failed for good; another one has to be opened. */
  readonly isBroken?: boolean
}

/** Milliseconds: an RSA key on a slow chip takes tens of seconds, and whoever shares the chip may be making one. */
const usualPatience = 120_000
/** Milliseconds for the connection itself. */
const connectPatience = 10_000

/**
 * `device:/dev/tpmrm0`, `tcp:HOST:PORT` or `unix:PATH` (swtpm's raw command protocol). `patience`: milliseconds a command may take, 120,000 unless said. Throws
 * TpmTransportError.
 */
export const openTransport = async (spec: string, { patience = usualPatience }: { readonly patience?: number } = {}): Promise<Transport> => {
  const [kind, rest] = [spec.slice(0, spec.indexOf(':')), spec.slice(spec.indexOf(':') + 1)]
  if (kind === 'device' && rest !== '') return await openDevice(rest, patience)
  if (kind === 'unix' && rest !== '') return await socketTransport({ path: rest }, spec, patience)
  const colon = rest.lastIndexOf(':')
  const port = Number(rest.slice(colon + 1))
  if (kind === 'tcp' && colon > 0 && Number.isInteger(port) && port > 0 && port < 65_536)
    return await socketTransport({ host: rest.slice(0, colon), port }, spec, patience)
  throw new TpmTransportError(`TPM "${spec}": expected device:PATH, tcp:HOST:PORT or unix:PATH`)
}

const socketTransport = async (to: NetConnectOpts, name: string, patience: number): Promise<Transport> => {
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
    get isBroken() {
      return broken !== undefined
    },
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
      fail('closed')
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
  const timer = setTimeout(() => socket.destroy(new Error(`no connection within ${connectPatience / 1000} s`)), connectPatience)
  try {
    return await promise
  } finally {
    clearTimeout(timer)
  }
}
