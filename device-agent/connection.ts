import { checkServerIdentity, type TLSSocket } from 'node:tls'
import { connectProof, exporterLabel } from '@fleetkey/protocol/transcript.ts'
import type { Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { MqttClient } from 'mqtt'
import { judgedAt, type Belief } from './device-clock.ts'
import { openTls, type ClientCertificate, type Tls, type TlsOptions } from './tls.ts'
import { parseOnce } from './trust.ts'

/** Proof of a device with an identity: its TLS key and certificate, and the LDevID key in the TPM. */
export interface Credentials extends ClientCertificate {
  /** LDevID signature, raw r‖s. */
  sign(data: Uint8Array): Promise<Uint8Array>
}

export interface ConnectionOptions extends TlsOptions {
  readonly time: Belief
  readonly tenant: string
  /** Client id. */
  readonly client: string
  readonly credentials: Credentials | null
  /** `groups`: topics of groups, beside its own. A server that refuses one of them has its reasons: the connection goes on without it. */
  readonly topics: { readonly up: string; readonly down: string; readonly groups?: readonly string[] }
  readonly keepAliveSeconds?: number
  onMessage(bytes: Uint8Array): void
  /** Called once, after the connection was open. */
  onClose(why: string): void
}

export interface Connection {
  readonly client: string
  /** 32 bytes of the TLS exporter of this very connection. */
  readonly exporter: Uint8Array
  /** Life of the server's certificate, milliseconds since 1970: to be held against the first time that the server signs (`checkServerTime`). */
  readonly server: { readonly notBefore: number; readonly notAfter: number }
  /** Also hears what is published on this topic of a group; resolves whether the server grants it or not. */
  subscribe(topic: string): Promise<void>
  /** QoS 1; resolves with the PUBACK. */
  send(bytes: Uint8Array): Promise<void>
  /** DISCONNECT, then close. */
  close(): Promise<void>
  /** Drops the connection, as a pulled cable. */
  destroy(): void
}

/** The server, or TLS, refused this device's credentials. Anything else that goes wrong is an ordinary Error. */
export class ConnectionRefused extends Error {
  override readonly name = 'ConnectionRefused'
  /** The credentials are over, or none of the server's: no use to show them again (CONNACK 4). */
  readonly isOver: boolean

  constructor(message: string, { isOver = false, cause }: { readonly isOver?: boolean; readonly cause?: unknown } = {}) {
    super(message, { cause })
    this.isOver = isOver
  }
}

/** A TPM may be busy with other work when the proof is to be signed. */
const connackDeadline = 30_000

/** DECRYPT_ERROR: the issuer has the name the server knows, and another key (a CA that was made anew). */
const credentialAlert = /ALERT_(CERTIFICATE|BAD_CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED|UNSUPPORTED_CERTIFICATE|DECRYPT_ERROR)/

/** Hosts that a certificate was found to name: this is asked at every connection of every device in this process. */
const named = new WeakMap<Certificate, string>()

const checkName = (leaf: Certificate, host: string, socket: TLSSocket): void => {
  if (named.get(leaf) === host) return
  const wrongName = checkServerIdentity(host, socket.getPeerCertificate())
  if (wrongName !== undefined) throw wrongName
  named.set(leaf, host)
}

/**
 * Life of the certificate that the server of this session has proven to own. Throws unless it is a server certificate for that host which leads to a root of
 * ours (RFC 5280 by our own validator), and is not over by signed time.
 */
const serverOf = (of: ConnectionOptions, { socket, shown }: Tls): Connection['server'] => {
  const [leaf, ...issuers] = shown
  if (leaf === undefined) throw new Error('the server showed no certificate')
  const life = parseOnce(leaf)
  checkName(life, of.server.host, socket)
  const at = judgedAt(life, of.time, null)
  // Time that an earlier connection signed may be long ago, or may have been wrong: what this one signs decides.
  const provisional = at === undefined ? undefined : Math.min(Math.max(at, life.notBefore), life.notAfter)
  if (provisional === undefined) throw new Error('the certificate of the server was over before the time that the server signed last')
  of.trust.check(leaf, issuers, provisional, oids.serverAuth)
  return { notBefore: life.notBefore, notAfter: life.notAfter }
}

/** Throws unless the certificate of this TLS session is good at a time that the server has signed in it. */
export const checkServerTime = ({ server }: Pick<Connection, 'server'>, stated: number): void => {
  if (stated < server.notBefore || stated > server.notAfter) throw new Error('the certificate of the server is not good at the time that it signs')
}

/** Password of CONNECT: the LDevID key's signature over this connection, so that a stolen TLS key is of no use. */
export const passwordOf = async (of: Pick<ConnectionOptions, 'tenant' | 'client'>, credentials: Credentials, exporter: Uint8Array): Promise<string> => {
  const proof = connectProof(of.tenant, of.client, credentials.certificates[0] ?? new Uint8Array(0), exporter)
  return Buffer.from(await credentials.sign(proof)).toString('base64url')
}

/**
 * Opens TLS 1.3, signs the connection proof over its exporter, connects MQTT 3.1.1 with a clean session, subscribes to the one topic.
 * One client object per connection; it never reconnects by itself. Rejects with ConnectionRefused when the credentials were refused.
 */
export const openConnection = async (of: ConnectionOptions, abort?: AbortSignal): Promise<Connection> => {
  const tls = await openTls(of, abort).catch((error: unknown) => {
    const code = typeof error === 'object' && error !== null && 'code' in error ? String(error.code) : ''
    throw credentialAlert.test(code) ? new ConnectionRefused(`TLS: ${code}`, { cause: error }) : error
  })
  const { socket, offered } = tls
  // Until MQTT.js listens; an error without a listener would end the process.
  socket.on('error', () => undefined)
  try {
    const exporter = new Uint8Array(socket.exportKeyingMaterial(32, exporterLabel, Buffer.alloc(0)))
    const server = serverOf(of, tls)
    const { credentials } = of
    const login = credentials === null ? {} : { username: of.client, password: await passwordOf(of, credentials, exporter) }
    if (socket.destroyed) throw new Error('the server closed the connection')
    const connection = await openMqtt(of, socket, { exporter, server, login, abort })
    tls.remember()
    return connection
  } catch (error) {
    socket.destroy()
    if (!(offered && error instanceof ConnectionRefused)) throw error
    // The server may have forgotten what it knew of the session: the credentials are refused only when they were shown anew.
    of.memory?.forgetTickets()
    return await openConnection(of, abort)
  }
}

const openMqtt = async (
  of: ConnectionOptions,
  socket: TLSSocket,
  with_: {
    readonly exporter: Uint8Array
    readonly server: Connection['server']
    readonly login: { username?: string; password?: string }
    readonly abort: AbortSignal | undefined
  },
): Promise<Connection> => {
  const mqtt = new MqttClient(() => socket, {
    protocolVersion: 4,
    clientId: of.client,
    ...with_.login,
    clean: true,
    keepalive: of.keepAliveSeconds ?? 60,
    reconnectPeriod: 0,
    connectTimeout: connackDeadline,
    resubscribe: false,
    queueQoSZero: false,
  })
  let open = false
  let why = 'the connection was closed'
  let ended = false
  const opening = Promise.withResolvers<void>()
  const end = (): void => {
    if (ended) return
    ended = true
    with_.abort?.removeEventListener('abort', aborted)
    socket.destroy()
    mqtt.end(true)
    if (open) of.onClose(why)
    else opening.reject(new Error(why))
  }
  const aborted = (): void => {
    why = 'aborted'
    end()
  }
  with_.abort?.addEventListener('abort', aborted)
  if (with_.abort?.aborted === true) aborted()
  mqtt.on('error', (error) => {
    const code = 'code' in error ? error.code : undefined
    const text = typeof code === 'string' ? code : ''
    why = error.message
    // 2: identifier rejected, 4 and 5: not authorised (MQTT 3.1.1 §3.2.2.3). TLS 1.3 tells of a refused certificate only after the handshake.
    if (code === 2 || code === 4 || code === 5 || credentialAlert.test(text)) opening.reject(new ConnectionRefused(why, { isOver: code === 4, cause: error }))
    end()
  })
  mqtt.on('close', end)
  const groups = new Set(of.topics.groups)
  // A message may come before SUBACK: the embedded broker writes to the connection directly.
  mqtt.on('message', (topic, payload) => {
    if ((topic === of.topics.down || groups.has(topic)) && !ended) of.onMessage(new Uint8Array(payload))
  })
  mqtt.on('connect', () => {
    // Each by itself: the library takes one refusal for a failure of all, and a device that left a group while it was away is refused that group's topic.
    // Its own last: whoever hears of its presence can reach it on the others by then.
    for (const topic of groups) mqtt.subscribe(topic, { qos: 1 }, () => undefined)
    mqtt.subscribe(of.topics.down, { qos: 1 }, (error, granted) => {
      if (error === null || error === undefined) {
        if (granted?.every(({ qos }) => qos !== 128) !== false) return opening.resolve()
        why = `the server refused the subscription to ${of.topics.down}`
      } else why = error.message
      end()
    })
  })
  await opening.promise
  open = true
  return {
    client: of.client,
    exporter: with_.exporter,
    server: with_.server,
    subscribe: async (topic) => {
      if (ended) return
      // Again also when it was granted before: the server ends what a device hears of a group that it leaves.
      groups.add(topic)
      await new Promise<void>((resolve) => mqtt.subscribe(topic, { qos: 1 }, () => resolve()))
    },
    send: async (bytes) =>
      await new Promise((resolve, reject) => {
        if (ended) return reject(new Error(why))
        mqtt.publish(of.topics.up, Buffer.from(bytes), { qos: 1 }, (error) => (error === undefined || error === null ? resolve() : reject(error)))
      }),
    async close() {
      if (ended) return
      why = 'closed by the agent'
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, 2_000)
        mqtt.end(false, {}, () => {
          clearTimeout(timer)
          resolve()
        })
      })
      end()
    },
    destroy() {
      if (ended) return
      why = 'dropped by the agent'
      end()
    },
  }
}
