import type { KeyObject } from 'node:crypto'
import { isIP } from 'node:net'
import type { Duplex } from 'node:stream'
import { connect, createSecureContext, type SecureContext, type TLSSocket } from 'node:tls'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { Trust } from './trust.ts'

/** TLS client authentication of a device. */
export interface ClientCertificate {
  readonly key: KeyObject
  /** DER, leaf first. */
  readonly certificates: readonly Uint8Array[]
}

export interface TlsOptions {
  readonly server: { readonly host: string; readonly port: number }
  readonly trust: Trust
  readonly credentials: ClientCertificate | null
  /** A connection to the server, which may still be on its way; TCP of this machine unless told. */
  readonly dial?: ((to: TlsOptions['server']) => Duplex) | undefined
  /** What earlier connections have left behind. */
  readonly memory?: TlsMemory | undefined
}

export interface Tls {
  readonly socket: TLSSocket
  /** The server's certificates (DER), its own first; those of the full handshake when this session resumes it. Nobody has judged them yet. */
  readonly shown: readonly Uint8Array[]
  /** A ticket was offered, whether the server took it or not. */
  readonly offered: boolean
  /** The server was judged and has let this device in: the tickets that it gave, and gives later in this connection, are for the next ones. */
  remember(): void
}

interface Ticket {
  readonly session: Buffer
  readonly shown: readonly Uint8Array[]
  readonly of: TlsOptions
}

/**
 * What TLS remembers for the next connections of one device, in memory only. A ticket (RFC 8446 §4.6.1) is offered once (appendix C.4), to the same server, under
 * the same certificate and the same trust: when one of these changes, the next handshake is a full one.
 */
export interface TlsMemory {
  context(credentials: ClientCertificate | null): SecureContext
  take(of: TlsOptions): Ticket | undefined
  keep(ticket: Ticket): void
  /** The next handshake is a full one. */
  forgetTickets(): void
}

/** OpenSSL gives two with a full handshake, and need not give another with a resumed one. */
const keptTickets = 2

/** As long as a server that many want to reach at once lets a socket wait for its turn. */
const handshakeDeadline = 60_000

const contextOf = (credentials: ClientCertificate | null): SecureContext =>
  createSecureContext({
    minVersion: 'TLSv1.3',
    ...(credentials === null
      ? {}
      : {
          key: credentials.key.export({ format: 'pem', type: 'pkcs8' }) as string,
          cert: credentials.certificates.map((der) => toPem('CERTIFICATE', der)).join(''),
        }),
  })

const isSame = (one: ClientCertificate | null, other: ClientCertificate | null): boolean => {
  if (one === null || other === null) return one === other
  if (one.key !== other.key || one.certificates.length !== other.certificates.length) return false
  return one.certificates.every((der, at) => Buffer.compare(der, other.certificates[at] ?? new Uint8Array(0)) === 0)
}

/** An empty memory. */
export const openTlsMemory = (): TlsMemory => {
  let made: { readonly credentials: ClientCertificate | null; readonly context: SecureContext } | undefined
  let tickets: readonly Ticket[] = []
  return {
    context(credentials) {
      if (made === undefined || !isSame(made.credentials, credentials)) made = { credentials, context: contextOf(credentials) }
      return made.context
    },
    take({ server, trust, credentials }) {
      const { host, port } = server
      tickets = tickets.filter(({ of }) => of.server.host === host && of.server.port === port && of.trust === trust && isSame(of.credentials, credentials))
      const newest = tickets.at(-1)
      tickets = tickets.slice(0, -1)
      return newest
    },
    keep(ticket) {
      tickets = [...tickets, ticket].slice(-keptTickets)
    },
    forgetTickets() {
      tickets = []
    },
  }
}

/** What the server has sent: its certificate first, then the others in its order, which need not be a chain. */
const shownBy = (socket: TLSSocket): readonly Uint8Array[] => {
  const found = new Map<string, Uint8Array>()
  for (let one = socket.getPeerX509Certificate(); one !== undefined && !found.has(one.fingerprint256); one = one.issuerCertificate)
    found.set(one.fingerprint256, Uint8Array.from(one.raw))
  return [...found.values()]
}

/** Opens TLS 1.3; the server is still to be judged. Rejects with what TLS or the network said. */
export const openTls = async (of: TlsOptions, abort: AbortSignal | undefined): Promise<Tls> => {
  const { credentials, server, memory } = of
  const ticket = memory?.take(of)
  return await new Promise((resolve, reject) => {
    const socket = connect({
      ...(of.dial === undefined ? { host: server.host, port: server.port } : { socket: of.dial(server) }),
      ...(isIP(server.host) === 0 ? { servername: server.host } : {}),
      // Judged by the caller: OpenSSL would ask the system's clock, which may show 1970 or 2106.
      rejectUnauthorized: false,
      ALPNProtocols: ['mqtt'],
      secureContext: memory?.context(credentials) ?? contextOf(credentials),
      ...(ticket === undefined ? {} : { session: ticket.session }),
    })
    /** Given before the server was judged. */
    const early: Buffer[] = []
    let keep = (session: Buffer): void => void early.push(session)
    // Who enrols has nothing to resume.
    if (memory !== undefined && credentials !== null) socket.on('session', (session) => keep(session))
    const timer = setTimeout(() => fail(new Error(`no TLS session with ${server.host}:${server.port} within ${handshakeDeadline / 1000} s`)), handshakeDeadline)
    const settled = (): void => {
      clearTimeout(timer)
      abort?.removeEventListener('abort', aborted)
      socket.off('error', fail)
      socket.off('close', closed)
    }
    const fail = (error: Error): void => {
      settled()
      // Whatever it says afterwards is of no interest.
      socket.on('error', () => undefined)
      socket.destroy()
      reject(error)
    }
    const closed = (): void => fail(new Error('the server closed the connection during the handshake'))
    const aborted = (): void => fail(new Error('aborted'))
    socket.once('error', fail)
    socket.once('close', closed)
    abort?.addEventListener('abort', aborted)
    if (abort?.aborted === true) return aborted()
    socket.once('secureConnect', () => {
      settled()
      // Nagle's algorithm and delayed acknowledgements together cost 40 ms a message.
      socket.setNoDelay(true)
      // A resumed session shows no certificate: who owns the ticket's secret has shown these.
      const shown = ticket !== undefined && socket.isSessionReused() ? ticket.shown : shownBy(socket)
      resolve({
        socket,
        shown,
        offered: ticket !== undefined,
        remember() {
          keep = (session) => memory?.keep({ session, shown, of })
          early.forEach(keep)
        },
      })
    })
  })
}
