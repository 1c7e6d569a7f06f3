import { randomBytes } from 'node:crypto'
import { createServer, type AddressInfo, type Socket } from 'node:net'
import { createServer as createTlsServer, type SecureContextOptions, type TLSSocket } from 'node:tls'
import { Aedes } from 'aedes'
import type { Admitted, Connect } from '../../flows/connect.ts'
import type { Bus, DeviceRef } from '../../flows/context.ts'
import { addressPrefix } from '../address.ts'
import { arrivals } from './arrivals.ts'
import { departures } from './departures.ts'
import { judgeConnect, judgeForward, judgePublish, judgeSubscribe, limitPackets, topicsOf, type Client } from './guard.ts'
import { brokerLimits, type BrokerLimits } from './limits.ts'
import { quietLines } from './lines.ts'
import { certificateOf, exporterOf, turns, type Peer } from './peer.ts'
import { noEmitter, noStorage } from './unkept.ts'

export interface EmbeddedBusOptions {
  readonly host: string
  /** 0 for any free port. */
  readonly port: number
  /** PEM. */
  readonly tls: { readonly key: string; readonly cert: string }
  /** Decides on one CONNECT from what the peer said and proved. Group topics that it may subscribe to beside its own come with the answer. */
  readonly admit: (
    connect: Connect,
  ) => Promise<(Pick<Admitted, 'device'> & Partial<Admitted> & { readonly topics?: readonly string[] }) | { readonly refused: string }>
  readonly now: () => number
  readonly log: (line: string) => void
  readonly limits?: Partial<BrokerLimits>
}

export interface EmbeddedBus extends Bus {
  /** Where it listens, once started. */
  readonly port: number
  /** New connections see this certificate; tickets given under the one before are not taken any more. */
  renew(tls: { readonly key: string; readonly cert: string }): void
  /** No ticket that was given before is taken any more: whoever offers one proves its key anew. */
  forgetTickets(): void
}

const minute = 60_000
const alpnProtocols = ['mqtt', 'x-amzn-mqtt-ca'] as const

/** Tells one open socket of this listener from every other. */
const endpointOf = (socket: Socket): string => `${socket.remoteAddress ?? ''} ${socket.remotePort ?? 0} ${socket.localPort ?? 0}`

/** CONNACK return code for a public refusal (MQTT 3.1.1 §3.2.2.3). */
export const returnCodeFor = (refused: string): 2 | 3 | 4 | 5 => {
  if (refused === 'malformed') return 2
  if (refused === 'unavailable' || refused === 'rate-limited' || refused === 'internal') return 3
  // 4 tells a device that its credentials are what is wrong: it proves itself anew at once.
  return refused === 'unauthenticated' || refused === 'expired' ? 4 : 5
}

const refusal = (returnCode: 2 | 3 | 4 | 5, why: string): Error & { returnCode: number } => Object.assign(new Error(why), { returnCode })

/**
 * MQTT broker in this process: TLS 1.3 only, every device on one listener. The peer's certificate is asked for and not judged by TLS; `admit` decides on every
 * CONNECT, also before an older connection of the same id is taken over, and alike whether TLS resumed a session or not: the ticket holds the certificate whose key
 * was proven when the session began. PUBACK leaves when the handler's promise has resolved, so it means durable;
 * when the handler rejects the connection is closed without it. Limits: `limits.ts`.
 */
export const embeddedBus = async (options: EmbeddedBusOptions): Promise<EmbeddedBus> => {
  const limits: BrokerLimits = { ...brokerLimits, ...options.limits }
  const { now } = options
  const line = quietLines(options.log, now)
  const listeners: ((from: DeviceRef, present: boolean) => void)[] = []
  const peers = new Map<TLSSocket, Peer>()
  /** Every connection that claims an id, proven or not: a kick must also reach one that is just being admitted. */
  const claims = new Map<string, Set<Peer>>()
  const members = new Map<string, Set<Peer>>()
  const clients = new WeakMap<Peer, Client>()
  const takeovers = new Map<string, number[]>()
  const sockets = new Set<Socket>()
  const leaving = departures(limits.leaving)
  const arriving = arrivals(limits, () => limits.connections - sockets.size)
  const unidentified = { all: 0, prefixes: new Map<string, number>() }
  let listening = false
  let handler: ((from: DeviceRef, bytes: Uint8Array) => Promise<void>) | undefined

  const peerOf = (client: Client | null): Peer | undefined => (client === null ? undefined : peers.get(client.conn as TLSSocket))

  const isThere = ({ socket }: Peer): boolean => !socket.destroyed && !socket.readableEnded

  const presentIn = (client: string): Peer | undefined => {
    for (const peer of claims.get(client) ?? []) if (peer.ref !== undefined && isThere(peer) && peer.subscribed.has(peer.down)) return peer
    return undefined
  }

  const announce = (peer: Peer, present: boolean): void => {
    if (peer.ref === undefined) return
    for (const listener of listeners) listener(peer.ref, present)
  }

  const subscribed = (peer: Peer, topic: string): void => {
    if (peer.subscribed.has(topic) || peer.socket.destroyed) return
    peer.subscribed.add(topic)
    if (topic === peer.down) return announce(peer, true)
    const group = members.get(topic) ?? new Set()
    members.set(topic, group)
    group.add(peer)
  }

  const unsubscribed = (peer: Peer, topic: string): void => {
    if (!peer.subscribed.delete(topic)) return
    if (topic === peer.down) return announce(peer, false)
    const group = members.get(topic)
    group?.delete(peer)
    if (group?.size === 0) members.delete(topic)
  }

  const close = (peer: Peer, why: string): void => {
    if (peer.socket.destroyed) return
    line(peer.ref === undefined ? peer.from : peer.ref.client, why)
    peer.socket.destroy()
  }

  /**
   * A peer that has said its last: the library would close there and then, in the turn in which all others that go at the same moment do. It is closed in its turn instead,
   * with what TLS and TCP say at the end; whoever does not read that is cut.
   */
  const closeInTurn = (peer: Peer, ours: readonly unknown[]): void => {
    const { socket } = peer
    socket.allowHalfOpen = true
    for (const listener of socket.listeners('end')) if (!ours.includes(listener)) socket.off('end', listener as () => void)
    socket.once('end', () =>
      leaving.add(() => {
        if (socket.writableLength > 0) socket.destroy()
        else socket.end()
      }),
    )
  }

  /** Others may arrive in its place. */
  const settled = (peer: Peer): void => {
    if (peer.settling === undefined) return
    clearTimeout(peer.settling)
    peer.settling = undefined
    arriving.done(peer.from, peer.endpoint)
  }

  const gone = (peer: Peer): void => {
    settled(peer)
    peers.delete(peer.socket)
    for (const topic of peer.subscribed) unsubscribed(peer, topic)
    if (peer.client === undefined) return
    const claim = claims.get(peer.client)
    claim?.delete(peer)
    if (claim?.size === 0) claims.delete(peer.client)
    if (peer.ref === undefined || peer.ref.device !== null) return
    unidentified.all--
    const left = (unidentified.prefixes.get(peer.from) ?? 1) - 1
    if (left === 0) unidentified.prefixes.delete(peer.from)
    else unidentified.prefixes.set(peer.from, left)
  }

  /** True when this id is taken over too often: the sign of two devices with one key. */
  const contested = (client: string): boolean => {
    const recent = (takeovers.get(client) ?? []).filter((at) => now() - at < minute)
    if (recent.length < limits.takeovers) {
      if (takeovers.size > limits.connections) takeovers.clear()
      takeovers.set(client, [...recent, now()])
      return false
    }
    line(client, `ALARM: ${recent.length} takeovers in a minute; its key may be in use twice`)
    return true
  }

  const admitPeer = async (peer: Peer, username: string | undefined, password: Uint8Array | undefined): Promise<void> => {
    const { client } = peer
    if (peer.refusal !== undefined) throw refusal(peer.refusal.returnCode, peer.refusal.why)
    const topics = client === undefined ? undefined : topicsOf(client)
    if (client === undefined || topics === undefined) throw refusal(2, 'client id')
    const exporter = exporterOf(peer.socket)
    const asked: Connect = { clientId: client, username, password, certificate: certificateOf(peer.socket), exporter, from: peer.from }
    const timer = Promise.withResolvers<{ readonly refused: string }>()
    const timeout = setTimeout(() => timer.resolve({ refused: 'unavailable' }), limits.authenticate)
    const verdict = await Promise.race([options.admit(asked), timer.promise]).finally(() => clearTimeout(timeout))
    if ('refused' in verdict) throw refusal(returnCodeFor(verdict.refused), verdict.refused)
    if (peer.socket.destroyed) throw refusal(3, 'closed meanwhile')
    const others = [...(claims.get(client) ?? [])].filter((other) => other !== peer && other.ref !== undefined && isThere(other))
    if (verdict.device === null) {
      if (others.length > 0) throw refusal(2, 'an enrolment with the id of another')
      const inPrefix = unidentified.prefixes.get(peer.from) ?? 0
      if (unidentified.all >= limits.unidentified.all || inPrefix >= limits.unidentified.prefix) throw refusal(3, 'too many connections without identity')
      unidentified.all++
      unidentified.prefixes.set(peer.from, inPrefix + 1)
      const life = setTimeout(() => close(peer, 'an enrolment that took too long'), limits.enrolment)
      void peer.closed.then(() => clearTimeout(life))
    } else if (others.length > 0 && contested(client)) throw refusal(3, 'taken over too often')
    peer.up = topics.up
    peer.down = topics.down
    peer.groups = new Set(verdict.topics)
    const certificate = verdict.certificate ?? undefined
    peer.ref = { client, device: verdict.device, from: peer.from, exporter, connection: peer.connection, ...(certificate === undefined ? {} : { certificate }) }
  }

  // A throw inside a hook would end the process: whatever it is, it becomes a refusal.
  const failed = (peer: Peer | undefined, thrown: unknown): Error => {
    const error = thrown instanceof Error ? thrown : new Error(String(thrown))
    line(peer?.ref?.client ?? peer?.from ?? 'unknown', error.message.slice(0, 200))
    return error
  }

  const broker = await Aedes.createBroker({
    persistence: noStorage(),
    mq: noEmitter(),
    concurrency: 0,
    drainTimeout: limits.drain,
    connectTimeout: limits.connect,
    maxTopicLevels: 8,
    queueLimit: 8,
    maxInflightInbound: 1,
    preConnect(client, packet, done) {
      try {
        const peer = peerOf(client)
        if (peer === undefined || peer.client !== undefined) return done(new Error('no connection of ours'), false)
        peer.refusal = judgeConnect(packet, limits)
        peer.client = packet.clientId
        const claim = claims.get(packet.clientId) ?? new Set()
        claims.set(packet.clientId, claim)
        claim.add(peer)
        done(null, true)
      } catch (thrown) {
        done(failed(undefined, thrown), false)
      }
    },
    authenticate(client, username, password, done) {
      const peer = peerOf(client)
      if (peer === undefined) return done(refusal(3, 'closed meanwhile'), null)
      admitPeer(peer, username, password === undefined ? undefined : new Uint8Array(password)).then(
        () => done(null, true),
        (thrown: unknown) => {
          const error = failed(peer, thrown)
          done('returnCode' in error ? (error as Error & { returnCode: number }) : refusal(3, 'unavailable'), null)
        },
      )
    },
    authorizePublish(client, packet, done) {
      const peer = peerOf(client)
      if (peer?.ref === undefined) return done(new Error('not a message of a connected peer'))
      const { ref } = peer
      const why = judgePublish(peer, packet)
      if (why !== undefined) return done(failed(peer, new Error(why)))
      const bytes = typeof packet.payload === 'string' ? new TextEncoder().encode(packet.payload) : new Uint8Array(packet.payload)
      const taken = peer.turns.take(async () => {
        try {
          if (handler === undefined || peer.socket.destroyed) throw new Error('closed meanwhile')
          await handler(ref, bytes)
          done(null)
          settled(peer)
        } catch (thrown) {
          done(failed(peer, thrown))
        }
      })
      if (!taken) done(failed(peer, new Error('too many messages')))
    },
    authorizeSubscribe(client, subscription, done) {
      const peer = peerOf(client)
      if (peer === undefined) return done(new Error('not a connected peer'))
      peer.filters++
      if (peer.filters > limits.filters) {
        close(peer, 'too many topic filters')
        return done(new Error('too many topic filters'))
      }
      const granted = judgeSubscribe(peer, subscription.topic)
      if (!granted) line(peer.ref?.client ?? peer.from, 'a topic filter that is not its own')
      done(null, granted && subscription.qos < 2 ? subscription : null)
    },
    authorizeForward(client, packet) {
      const peer = peerOf(client)
      return peer !== undefined && judgeForward(peer, packet.topic) ? packet : null
    },
  })
  broker.on('error' as 'closed', ((error: unknown) => line('broker', String(error).slice(0, 200))) as () => void)
  broker.on('connectionError', (client, error) => line(peerOf(client)?.from ?? 'unknown', error.message.slice(0, 100)))
  broker.on('clientError', (client, error) => line(peerOf(client)?.ref?.client ?? 'unknown', error.message.slice(0, 100)))
  broker.on('subscribe', (subscriptions, client) => {
    const peer = peerOf(client)
    // Granted filters only: the library has put 128 in the place of a refused one's QoS.
    if (peer !== undefined) for (const { topic, qos } of subscriptions) if ((qos as number) < 2 && judgeSubscribe(peer, topic)) subscribed(peer, topic)
  })
  broker.on('unsubscribe', (topics, client) => {
    const peer = peerOf(client)
    if (peer !== undefined) for (const topic of topics) unsubscribed(peer, topic)
  })
  broker.on('connackSent', (packet, client) => {
    const peer = peerOf(client)
    // It goes on to its first message, which is as dear as what came before it; one that has nothing to say keeps nobody out.
    if (peer !== undefined && packet.returnCode === 0) peer.settling = setTimeout(() => settled(peer), limits.settled)
  })

  const context = (tls: { readonly key: string; readonly cert: string }): SecureContextOptions => ({
    key: tls.key,
    cert: tls.cert,
    minVersion: 'TLSv1.3',
    ecdhCurve: 'X25519MLKEM768:X25519:P-256',
    // Tickets are encrypted under keys that this context makes and nobody writes down: with another context, or another process, they are worth nothing.
    sessionTimeout: limits.tickets,
    sessionIdContext: 'devices',
  })
  const forgetTickets = (): void => tlsServer.setTicketKeys(randomBytes(48))
  const tlsServer = createTlsServer({
    ...context(options.tls),
    requestCert: true,
    rejectUnauthorized: false,
    handshakeTimeout: limits.handshake,
    // A list would be copied for each connection, and each copy keep a slab of the buffer pool in memory.
    ALPNCallback: ({ protocols: offered }) => alpnProtocols.find((one) => offered.includes(one)),
  })
  const oldTickets = setInterval(forgetTickets, limits.tickets * 1_000)
  oldTickets.unref()
  let connection = 0
  tlsServer.on('secureConnection', (socket) => {
    const from = addressPrefix(socket.remoteAddress ?? '')
    const closed = Promise.withResolvers<void>()
    const peer: Peer = {
      socket,
      connection: ++connection,
      from,
      endpoint: endpointOf(socket),
      closed: closed.promise,
      settling: undefined,
      client: undefined,
      refusal: undefined,
      ref: undefined,
      up: '',
      down: '',
      groups: new Set(),
      subscribed: new Set(),
      filters: 0,
      turns: turns(limits.messages, now),
    }
    peers.set(socket, peer)
    socket.once('close', () => {
      gone(peer)
      closed.resolve()
    })
    const before = socket.listeners('end')
    const client = broker.handle(socket)
    closeInTurn(peer, before)
    clients.set(peer, client)
    limitPackets(client, () => (peer.ref === undefined ? limits.packet.before : limits.packet.after))
  })
  tlsServer.on('tlsClientError', (error, socket) => {
    line(addressPrefix(socket.remoteAddress ?? ''), `TLS: ${('code' in error && String(error.code)) || error.message}`.slice(0, 100))
    // A handshake that ran out of time is told here and left open.
    socket.destroy()
  })

  /**
   * Begins TLS once the peer has said something. Node reads what is encrypted into a buffer that it keeps as long as the connection lasts: one of 64 kB, unless
   * something was read before; then of that size.
   */
  const begin = (socket: Socket): void => {
    socket.setTimeout(limits.handshake, () => {
      line(addressPrefix(socket.remoteAddress ?? ''), 'TLS: nothing was said')
      socket.destroy()
    })
    socket.once('readable', () => {
      socket.setTimeout(0)
      if (socket.readableLength === 0) socket.destroy()
      else tlsServer.emit('connection', socket)
    })
  }

  const listener = createServer({ noDelay: true, pauseOnConnect: true }, (socket) => {
    const from = addressPrefix(socket.remoteAddress ?? '')
    const endpoint = endpointOf(socket)
    sockets.add(socket)
    socket.on('error', () => undefined)
    socket.once('close', () => {
      sockets.delete(socket)
      arriving.done(from, endpoint)
    })
    arriving.add(from, { endpoint, go: () => begin(socket), giveUp: () => void socket.destroy() })
  })
  listener.maxConnections = limits.connections

  const write = async (peer: Peer, topic: string, bytes: Uint8Array): Promise<'accepted' | 'offline'> => {
    const client = clients.get(peer)
    if (client === undefined || peer.socket.destroyed) return 'offline'
    if (peer.socket.writableLength + bytes.length > limits.unsent && peer.socket.writableLength > 0) {
      close(peer, 'it does not read')
      return 'offline'
    }
    return await new Promise((resolve) => {
      // Straight to this connection: through the library's emitter one peer that does not read would hold up everybody.
      client.publish({ cmd: 'publish', topic, payload: Buffer.from(bytes), qos: 1, dup: false, retain: false }, () =>
        resolve(peer.socket.destroyed ? 'offline' : 'accepted'),
      )
    })
  }

  return {
    get port() {
      const address = listener.address()
      if (address === null) throw new Error('the broker does not listen yet')
      return (address as AddressInfo).port
    },
    async start(take) {
      handler = take
      await new Promise<void>((resolve, reject) => {
        listener.once('error', reject)
        listener.listen(options.port, options.host, () => {
          listener.off('error', reject)
          listener.on('error', (error) => line('listener', error.message))
          listening = true
          resolve()
        })
      })
    },
    async send(client, bytes) {
      const peer = presentIn(client)
      return peer === undefined ? 'offline' : await write(peer, peer.down, bytes)
    },
    async publish(topic, bytes) {
      await Promise.all([...(members.get(topic) ?? [])].map(async (peer) => await write(peer, topic, bytes)))
    },
    assign(client, topics) {
      const allowed = new Set(topics)
      for (const peer of claims.get(client) ?? []) {
        if (peer.ref === undefined) continue
        peer.groups = allowed
        for (const topic of peer.subscribed) if (topic !== peer.down && !allowed.has(topic)) unsubscribed(peer, topic)
      }
    },
    async kick(client, reason) {
      await Promise.all(
        [...(claims.get(client) ?? [])].map(async (peer) => {
          close(peer, `closed: ${reason}`)
          await peer.closed
        }),
      )
    },
    online: (client) => presentIn(client) !== undefined,
    onPresence: (hear) => void listeners.push(hear),
    health: () => ({ listening, connections: sockets.size }),
    renew: (tls) => tlsServer.setSecureContext(context(tls)),
    forgetTickets,
    async stop() {
      listening = false
      clearInterval(oldTickets)
      const ended = new Promise<void>((resolve) => listener.close(() => resolve()))
      for (const socket of sockets) socket.destroy()
      await Promise.all([...peers.values()].map(async (peer) => await peer.closed))
      await ended
      await new Promise<void>((resolve) => broker.close(() => resolve()))
    },
  }
}
