import { connect as connectTls, type ConnectionOptions, type TLSSocket } from 'node:tls'

/** A packet as it came: type, flags and what follows the length. */
export interface Packet {
  readonly type: number
  readonly flags: number
  readonly body: Buffer
}

export const packetType = {
  connect: 1,
  connack: 2,
  publish: 3,
  puback: 4,
  subscribe: 8,
  suback: 9,
  unsubscribe: 10,
  unsuback: 11,
  pingreq: 12,
  pingresp: 13,
  disconnect: 14,
} as const

const text = (value: string | Uint8Array): Buffer => {
  const bytes = Buffer.from(value)
  return Buffer.concat([Buffer.from([bytes.length >> 8, bytes.length & 0xff]), bytes])
}

export const remaining = (length: number): Buffer => {
  const bytes: number[] = []
  do {
    bytes.push((length & 0x7f) | (length > 0x7f ? 0x80 : 0))
    length >>>= 7
  } while (length > 0)
  return Buffer.from(bytes)
}

export const frame = (type: number, flags: number, body: Uint8Array): Buffer =>
  Buffer.concat([Buffer.from([(type << 4) | flags]), remaining(body.length), body])

export interface ConnectWords {
  readonly id: string
  readonly clean?: boolean
  readonly keepAlive?: number
  readonly username?: string
  readonly password?: string | Uint8Array
  readonly will?: { readonly topic: string; readonly payload: string; readonly retain?: boolean; readonly qos?: number }
  readonly level?: number
  readonly protocol?: string
}

/** CONNECT (MQTT 3.1.1 §3.1). */
export const connectPacket = (of: ConnectWords): Buffer => {
  const { will } = of
  const flags =
    ((of.clean ?? true) ? 2 : 0) |
    (will === undefined ? 0 : 4 | ((will.qos ?? 0) << 3) | (will.retain === true ? 32 : 0)) |
    (of.password === undefined ? 0 : 64) |
    (of.username === undefined ? 0 : 128)
  const keepAlive = of.keepAlive ?? 60
  return frame(
    packetType.connect,
    0,
    Buffer.concat([
      text(of.protocol ?? 'MQTT'),
      Buffer.from([of.level ?? 4, flags, keepAlive >> 8, keepAlive & 0xff]),
      text(of.id),
      ...(will === undefined ? [] : [text(will.topic), text(will.payload)]),
      ...(of.username === undefined ? [] : [text(of.username)]),
      ...(of.password === undefined ? [] : [text(of.password)]),
    ]),
  )
}

export const subscribePacket = (filters: readonly string[], qos = 1, id = 1): Buffer =>
  frame(packetType.subscribe, 2, Buffer.concat([Buffer.from([id >> 8, id & 0xff]), ...filters.flatMap((filter) => [text(filter), Buffer.from([qos])])]))

export const unsubscribePacket = (filters: readonly string[], id = 1): Buffer =>
  frame(packetType.unsubscribe, 2, Buffer.concat([Buffer.from([id >> 8, id & 0xff]), ...filters.map((filter) => text(filter))]))

export const publishPacket = (topic: string, payload: string | Uint8Array, of: { qos?: number; retain?: boolean; id?: number } = {}): Buffer => {
  const { qos = 1, id = 1 } = of
  return frame(
    packetType.publish,
    (qos << 1) | (of.retain === true ? 1 : 0),
    Buffer.concat([text(topic), ...(qos === 0 ? [] : [Buffer.from([id >> 8, id & 0xff])]), Buffer.from(payload)]),
  )
}

/** An MQTT client that says exactly what it is told to, right or wrong. */
export interface Wire {
  readonly socket: TLSSocket
  write(bytes: Uint8Array): void
  /** The next packet; `closed` when there will be none. Throws after `patience` milliseconds. */
  next(patience?: number): Promise<Packet | 'closed'>
  /** CONNECT; the return code of CONNACK, or `closed`. */
  connect(of: ConnectWords): Promise<number | 'closed'>
  /** SUBSCRIBE; what was granted for each filter. */
  subscribe(...filters: string[]): Promise<readonly number[] | 'closed'>
  /** PUBLISH with QoS 1; true when PUBACK came. */
  publish(topic: string, payload: string | Uint8Array, of?: { qos?: number; retain?: boolean; id?: number }): Promise<boolean>
  readonly closed: Promise<void>
  close(): Promise<void>
}

/** Opens TLS to a broker on loopback. */
export const dial = async (port: number, options: ConnectionOptions = {}): Promise<Wire> => {
  const socket = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, ...options })
  socket.on('error', () => undefined)
  const closed = new Promise<void>((resolve) => void socket.once('close', () => resolve()))
  const failed = closed.then(() => Promise.reject(new Error('closed during the handshake')))
  failed.catch(() => undefined)
  await Promise.race([new Promise<void>((resolve) => void socket.once('secureConnect', () => resolve())), failed])
  socket.setNoDelay(true)
  let buffer = Buffer.alloc(0)
  const arrived: Packet[] = []
  const waiting: ((packet: Packet | 'closed') => void)[] = []
  socket.on('data', (chunk: Buffer) => {
    buffer = Buffer.concat([buffer, chunk])
    for (;;) {
      let [length, at] = [0, 1]
      for (; at < buffer.length; at++) {
        length |= ((buffer[at] ?? 0) & 0x7f) << (7 * (at - 1))
        if (((buffer[at] ?? 0) & 0x80) === 0) break
      }
      if (at >= buffer.length || buffer.length < at + 1 + length) return
      const packet: Packet = { type: (buffer[0] ?? 0) >> 4, flags: (buffer[0] ?? 0) & 0xf, body: buffer.subarray(at + 1, at + 1 + length) }
      buffer = buffer.subarray(at + 1 + length)
      const first = waiting.shift()
      if (first === undefined) arrived.push(packet)
      else first(packet)
    }
  })
  let over = false
  void closed.then(() => {
    over = true
    for (const resolve of waiting.splice(0)) resolve('closed')
  })
  const next = async (patience = 5_000): Promise<Packet | 'closed'> => {
    const first = arrived.shift()
    if (first !== undefined) return first
    if (over) return 'closed'
    return await new Promise((resolve, reject) => {
      const timer = setTimeout(() => reject(new Error('no packet came')), patience)
      waiting.push((packet) => {
        clearTimeout(timer)
        resolve(packet)
      })
    })
  }
  const write = (bytes: Uint8Array): void => void socket.write(bytes)
  return {
    socket,
    write,
    next,
    closed,
    async connect(of) {
      write(connectPacket(of))
      const packet = await next()
      return packet === 'closed' ? 'closed' : (packet.body[1] ?? 255)
    },
    async subscribe(...filters) {
      write(subscribePacket(filters))
      for (;;) {
        const packet = await next()
        if (packet === 'closed') return 'closed'
        if (packet.type === packetType.suback) return [...packet.body.subarray(2)]
      }
    },
    async publish(topic, payload, of = {}) {
      write(publishPacket(topic, payload, of))
      for (;;) {
        const packet = await next()
        if (packet === 'closed') return false
        if (packet.type === packetType.puback) return true
      }
    },
    async close() {
      socket.destroy()
      await closed
    },
  }
}
