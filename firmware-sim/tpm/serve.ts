import { createServer, type Server, type Socket } from 'node:net'
import { concat, u32 } from '@fleetkey/tpm2/bytes.ts'
import type { SoftwareTpm } from './software-tpm.ts'

/** Where a simulated TPM listens: a UNIX socket (its control channel beside it, `<path>.ctrl`) or a TCP port (control on the next one), as swtpm does. */
export type Where = { readonly path: string } | { readonly host: string; readonly port: number }

const maxCommand = 4096
/** swtpm's control commands (tpm_ioctl.h). */
const control = { getCapability: 1, init: 2, shutdown: 3, setLocality: 5 } as const
const badOrdinal = 10

const frames = (socket: Socket, sizeOf: (bytes: Buffer) => number | undefined, take: (frame: Buffer) => Uint8Array): void => {
  let received = Buffer.alloc(0)
  socket.on('error', () => socket.destroy())
  socket.on('data', (chunk: Buffer) => {
    received = Buffer.concat([received, chunk])
    for (;;) {
      const size = sizeOf(received)
      if (size === undefined || size > received.length) break
      if (size > maxCommand || size < 4) return void socket.destroy()
      const frame = received.subarray(0, size)
      received = received.subarray(size)
      socket.write(take(frame))
    }
    if (received.length > maxCommand) socket.destroy()
  })
}

const controlSize = (bytes: Buffer): number | undefined => {
  if (bytes.length < 4) return undefined
  const command = bytes.readUInt32BE(0)
  return command === control.init ? 8 : command === control.setLocality ? 5 : 4
}

const takeControl = (tpm: SoftwareTpm, frame: Buffer): Uint8Array => {
  switch (frame.readUInt32BE(0)) {
    case control.getCapability:
      // INIT, SHUTDOWN, SET_LOCALITY.
      return concat(u32(0), u32(0x01 | 0x02 | 0x20))
    case control.init:
      // As with swtpm: what the client has not shut down was not shut down, and the client starts the TPM.
      tpm.powerCycle({ shutdown: 'none', startup: 'none' })
      return u32(0)
    case control.setLocality:
      tpm.setLocality(Math.min(4, frame[4] ?? 0))
      return u32(0)
    case control.shutdown:
      return u32(0)
    default:
      return u32(badOrdinal)
  }
}

const listen = async (server: Server, where: Where): Promise<void> => {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  server.once('error', reject)
  server.listen('path' in where ? { path: where.path } : { host: where.host, port: where.port }, () => resolve())
  await promise
}

/** Serves a simulated TPM on swtpm's raw protocol: what tpm2-tools' `swtpm` TCTI and `openTransport` speak. */
export const serveSoftwareTpm = async (tpm: SoftwareTpm, where: Where): Promise<{ stop(): Promise<void> }> => {
  const sockets = new Set<Socket>()
  const keep = (socket: Socket): void => {
    sockets.add(socket)
    socket.on('close', () => sockets.delete(socket))
  }
  const data = createServer((socket) => {
    keep(socket)
    socket.setNoDelay(true)
    frames(
      socket,
      (bytes) => (bytes.length < 6 ? undefined : Math.max(10, bytes.readUInt32BE(2))),
      (frame) => tpm.execute(new Uint8Array(frame)),
    )
  })
  const side = createServer((socket) => {
    keep(socket)
    frames(socket, controlSize, (frame) => takeControl(tpm, frame))
  })
  await listen(data, where)
  await listen(side, 'path' in where ? { path: `${where.path}.ctrl` } : { host: where.host, port: where.port + 1 })
  return {
    async stop() {
      for (const socket of sockets) socket.destroy()
      await Promise.all([data, side].map(async (server) => await new Promise<void>((resolve) => void server.close(() => resolve()))))
    },
  }
}
