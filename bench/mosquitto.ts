import { spawn, spawnSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { connect, type TLSSocket } from 'node:tls'
import { cpuOf } from './cpu.ts'
import { freePort } from '../test/ports.ts'

interface Credentials {
  readonly key: string
  readonly cert: string
}

/** What mosquitto needs to carry the same messages to as many devices: CPU milliseconds for each connection, and for one message to each. */
export interface BrokerFloor {
  readonly connect: number
  readonly message: number
  /** Messages delivered and acknowledged a second. */
  readonly rate: number
}

const text = (value: string): Buffer => Buffer.concat([Buffer.from([value.length >> 8, value.length & 255]), Buffer.from(value)])

/** One MQTT 3.1.1 packet. */
const packet = (head: number, ...parts: readonly Buffer[]): Buffer => {
  const body = Buffer.concat(parts)
  const length = body.length < 128 ? [body.length] : [(body.length & 127) | 128, body.length >> 7]
  return Buffer.concat([Buffer.from([head, ...length]), body])
}

/** Calls `take` for each packet of a stream: its first byte and what follows its length. */
const packets = (take: (head: number, body: Buffer) => void): ((chunk: Buffer) => void) => {
  let rest: Buffer = Buffer.alloc(0)
  return (chunk) => {
    rest = rest.length === 0 ? chunk : Buffer.concat([rest, chunk])
    for (;;) {
      const long = ((rest[1] ?? 0) & 128) !== 0
      const start = long ? 3 : 2
      const length = long ? ((rest[1] ?? 0) & 127) + ((rest[2] ?? 0) << 7) : (rest[1] ?? 0)
      if (rest.length < start || rest.length < start + length) return
      take(rest[0] ?? 0, rest.subarray(start, start + length))
      rest = rest.subarray(start + length)
    }
  }
}

interface Subscriber {
  readonly socket: TLSSocket
  /** Publishes with QoS 1; resolves with the PUBACK. */
  publish(topic: string, payload: Buffer): Promise<void>
}

const subscribe = async (port: number, tls: Credentials, client: string, heard: () => void): Promise<Subscriber> =>
  await new Promise((resolve, reject) => {
    const socket = connect({ port, host: '127.0.0.1', rejectUnauthorized: false, minVersion: 'TLSv1.3', ...tls })
    const acknowledged: (() => void)[] = []
    const subscriber: Subscriber = {
      socket,
      publish: async (topic, payload) =>
        await new Promise((done) => {
          acknowledged.push(done)
          socket.write(packet(0x32, text(topic), Buffer.from([0, 1]), payload))
        }),
    }
    socket.once('error', reject)
    socket.setNoDelay(true)
    socket.once('secureConnect', () => void socket.write(packet(0x10, text('MQTT'), Buffer.from([4, 2, 4, 176]), text(client))))
    socket.on(
      'data',
      packets((head, body) => {
        if (head >> 4 === 2) socket.write(packet(0x82, Buffer.from([0, 1]), text(`fk/1/${client}/down`), Buffer.from([1])))
        if (head >> 4 === 9) resolve(subscriber)
        if (head >> 4 === 4) acknowledged.shift()?.()
        if (head >> 4 !== 3) return
        const at = 2 + body.readUInt16BE(0)
        socket.write(packet(0x40, body.subarray(at, at + 2)))
        heard()
      }),
    )
  })

/** Undefined where mosquitto is not installed. `bytes`: of one message. */
export const measureMosquitto = async (
  folder: string,
  tls: { readonly server: Credentials; readonly device: Credentials },
  of: { readonly devices: number; readonly bytes: number },
): Promise<BrokerFloor | undefined> => {
  const program = ['mosquitto', '/usr/sbin/mosquitto'].find((name) => spawnSync(name, ['-h']).error === undefined)
  if (program === undefined) return undefined
  const port = await freePort()
  const file = (name: string, content: string): string => {
    const path = join(folder, name)
    writeFileSync(path, content, { mode: 0o600 })
    return path
  }
  const [key, cert, ca] = [file('mosquitto.key', tls.server.key), file('mosquitto.crt', tls.server.cert), file('mosquitto-ca.crt', tls.device.cert)]
  const lines = [`listener ${port} 127.0.0.1`, `keyfile ${key}`, `certfile ${cert}`, `cafile ${ca}`, 'require_certificate true', 'allow_anonymous true']
  const more = ['user root', 'set_tcp_nodelay true', 'max_queued_messages 0', 'log_type none', 'tls_version tlsv1.3']
  const child = spawn(program, ['-c', file('mosquitto.conf', `${[...lines, ...more].join('\n')}\n`)], { stdio: 'ignore' })
  const { pid } = child
  if (pid === undefined) throw new Error('mosquitto did not start')
  const sockets: TLSSocket[] = []
  try {
    let heard = 0
    let all = Promise.withResolvers<void>()
    const hear = (): void => void (++heard === of.devices && all.resolve())
    let publisher: Subscriber | undefined
    for (let tries = 0; publisher === undefined; tries++) {
      await new Promise((resolve) => void setTimeout(resolve, 100))
      publisher = await subscribe(port, tls.device, 'server', () => undefined).catch((error: unknown) => {
        if (tries > 50) throw error
        return undefined
      })
    }
    sockets.push(publisher.socket)
    const before = cpuOf(pid)
    for (let done = 0; done < of.devices; done += 32)
      await Promise.all(
        Array.from({ length: Math.min(32, of.devices - done) }, async (_, at) => {
          sockets.push((await subscribe(port, tls.device, `d-${done + at}`, hear)).socket)
        }),
      )
    const connected = cpuOf(pid)
    const payload = Buffer.alloc(of.bytes, 1)
    const started = performance.now()
    for (let done = 0; done < of.devices; done += 64)
      await Promise.all(Array.from({ length: Math.min(64, of.devices - done) }, async (_, at) => await publisher.publish(`fk/1/d-${done + at}/down`, payload)))
    await all.promise
    all = Promise.withResolvers()
    const wall = performance.now() - started
    return { connect: (connected - before) / of.devices, message: (cpuOf(pid) - connected) / of.devices, rate: (of.devices / wall) * 1_000 }
  } finally {
    for (const socket of sockets) {
      socket.on('error', () => undefined)
      socket.destroy()
    }
    child.kill()
  }
}
