/** What one connection, one address prefix and the whole listener may take. A test shortens the deadlines; a deployment does not need to. */
export interface BrokerLimits {
  /** TLS handshake, milliseconds. */
  readonly handshake: number
  /** Seconds for which a session may be resumed, and after which tickets are encrypted under another key: none is ever taken for longer. */
  readonly tickets: number
  /** From the handshake to CONNECT; a TPM may be busy before it can sign the proof. */
  readonly connect: number
  /** The server's own decision on CONNECT. */
  readonly authenticate: number
  /** Life of a connection without identity. */
  readonly enrolment: number
  /** Open sockets of the listener. */
  readonly connections: number
  /** Sockets of one address prefix (IPv4 /24, IPv6 /48) before their first message; more wait, unread, for at most `patience`, as many as the listener has room left; more are closed. */
  readonly arriving: number
  /** Of all prefixes together, however busy the server is. */
  readonly atLeast: number
  /** Milliseconds after CONNACK until a connection counts as one that has said something. */
  readonly settled: number
  /** Milliseconds that a socket waits for its turn: as long as agents do, for one that gave up has waited in vain and comes again. */
  readonly patience: number
  /** Nobody is let on after a turn of the event loop that took longer, milliseconds; but for one after `longest`. */
  readonly turn: number
  readonly longest: number
  /** Milliseconds of a turn of the event loop in which those are closed whose peers have gone. */
  readonly leaving: number
  /** Connections without identity: of one prefix, of all. */
  readonly unidentified: { readonly prefix: number; readonly all: number }
  /** MQTT packet, by its declared length, before and after CONNACK, bytes. */
  readonly packet: { readonly before: number; readonly after: number }
  /** Longest keep-alive, seconds; none at all is refused. */
  readonly keepAlive: number
  /** Topic filters of one connection, granted or refused, over its life. */
  readonly filters: number
  /** Messages of one connection: sustained a second, at once, in the handler at the same time, waiting for their turn. */
  readonly messages: { readonly perSecond: number; readonly burst: number; readonly concurrent: number; readonly waiting: number }
  /** Bytes that a peer which does not read may leave unsent. */
  readonly unsent: number
  /** Milliseconds until a peer that does not read is closed. */
  readonly drain: number
  /** Takeovers of one client id a minute; then new connections of this id wait a minute. More points to a cloned key. */
  readonly takeovers: number
}

export const brokerLimits: BrokerLimits = {
  handshake: 10_000,
  tickets: 3_600,
  connect: 30_000,
  authenticate: 5_000,
  enrolment: 300_000,
  connections: 20_000,
  arriving: 256,
  atLeast: 16,
  settled: 2_000,
  patience: 60_000,
  turn: 5,
  longest: 100,
  leaving: 2,
  unidentified: { prefix: 2_048, all: 8_192 },
  packet: { before: 4 << 10, after: 64 << 10 },
  keepAlive: 1_200,
  filters: 32,
  messages: { perSecond: 10, burst: 100, concurrent: 16, waiting: 256 },
  unsent: 256 << 10,
  drain: 3_000,
  takeovers: 5,
}
