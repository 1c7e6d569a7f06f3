import { createServer, type Socket } from 'node:net'

/** How a TPM behaves: `delay` first, then the answer, or what is sent in its place. */
export interface Behaviour {
  /** Milliseconds a command takes. */
  readonly delay?: (code: number) => number
  /** What is written for an answer; null: nothing, it hangs. `close`: the connection ends afterwards. */
  readonly answer?: (response: Uint8Array) => Uint8Array | null
  readonly close?: boolean
}

export interface TpmPeer {
  /** For `openTransport`: `unix:PATH`. */
  readonly spec: string
  behave(as: Behaviour): void
  /** Command codes that came. */
  readonly codes: readonly number[]
  /** Every byte that came: what a listener on the bus sees. */
  readonly seen: () => Buffer
  stop(): Promise<void>
}

const pause = async (milliseconds: number): Promise<void> => await new Promise((resolve) => void setTimeout(resolve, milliseconds))

/** A TPM on a UNIX socket whose manners can be changed: slow, hung, or talking nonsense. `execute` is the TPM behind it. */
export const startPeer = async (path: string, execute: (command: Uint8Array) => Uint8Array | Promise<Uint8Array>): Promise<TpmPeer> => {
  let manners: Behaviour = {}
  const codes: number[] = []
  const seen: Buffer[] = []
  const sockets = new Set<Socket>()
  const take = async (socket: Socket, command: Buffer): Promise<void> => {
    const code = command.readUInt32BE(6)
    codes.push(code)
    seen.push(command)
    const { delay, answer, close } = manners
    await pause(delay?.(code) ?? 0)
    const response = await execute(new Uint8Array(command))
    const said = answer === undefined ? response : answer(response)
    if (said !== null && !socket.destroyed) socket.write(said)
    if (close === true) socket.end()
  }
  const server = createServer((socket) => {
    sockets.add(socket)
    let received = Buffer.alloc(0)
    let turn = Promise.resolve()
    socket.on('close', () => sockets.delete(socket))
    socket.on('error', () => socket.destroy())
    socket.on('data', (chunk: Buffer) => {
      received = Buffer.concat([received, chunk])
      while (received.length >= 10 && received.length >= received.readUInt32BE(2)) {
        const command = Buffer.from(received.subarray(0, received.readUInt32BE(2)))
        received = received.subarray(command.length)
        turn = turn.then(async () => await take(socket, command))
      }
    })
  })
  await new Promise<void>((resolve) => void server.listen(path, () => resolve()))
  return {
    spec: `unix:${path}`,
    behave(as) {
      manners = as
    },
    codes,
    seen: () => Buffer.concat(seen),
    async stop() {
      for (const socket of sockets) socket.destroy()
      await new Promise<void>((resolve) => void server.close(() => resolve()))
    },
  }
}
