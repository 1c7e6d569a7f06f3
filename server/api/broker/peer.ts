import type { TLSSocket } from 'node:tls'
import { exporterLabel } from '@fleetkey/protocol/transcript.ts'
import type { DeviceRef } from '../../flows/context.ts'
import type { BrokerLimits } from './limits.ts'

/** One TLS connection: what it has said, what it may do, and what it has used up. */
export interface Peer {
  readonly socket: TLSSocket
  readonly connection: number
  /** Address prefix. */
  readonly from: string
  /** Its socket among the arriving ones. */
  readonly endpoint: string
  /** Resolves when the socket is closed. */
  readonly closed: Promise<void>
  /** Runs between CONNACK and its first message, while it counts as arriving. */
  settling: NodeJS.Timeout | undefined
  /** As claimed in CONNECT; proven once `ref` is set. */
  client: string | undefined
  /** A CONNECT that is refused whatever its credentials say. */
  refusal: { readonly returnCode: 2 | 5; readonly why: string } | undefined
  /** Set when CONNECT was accepted. */
  ref: DeviceRef | undefined
  up: string
  down: string
  /** Group topics that this peer may subscribe to. */
  groups: ReadonlySet<string>
  /** Subscribed topics; the peer is present while `down` is among them. */
  readonly subscribed: Set<string>
  filters: number
  readonly turns: Turns
}

/** DER of the certificate whose key the peer has proven in this handshake; null without one. Chain and dates are not judged here. */
export const certificateOf = (socket: TLSSocket): Uint8Array | null => {
  const certificate = socket.getPeerX509Certificate()
  return certificate === undefined ? null : new Uint8Array(certificate.raw)
}

/** TLS exporter of this connection, 32 bytes (RFC 8446 §7.5), with the empty context that the device gives as well. */
export const exporterOf = (socket: TLSSocket): Uint8Array => new Uint8Array(socket.exportKeyingMaterial(32, exporterLabel, Buffer.alloc(0)))

/** Paces one connection's messages. */
export interface Turns {
  /** Runs `work` when rate and concurrency allow. False: too many wait already; the connection is to be closed. */
  take(work: () => Promise<void>): boolean
}

/** Token bucket and semaphore in one: the broker library calls its hook for every message of one read at once, 9,362 of them in 64 KB. */
export const turns = (limits: BrokerLimits['messages'], now: () => number): Turns => {
  const waiting: (() => Promise<void>)[] = []
  let running = 0
  let tokens = limits.burst
  let since = now()
  let timer: NodeJS.Timeout | undefined
  const refill = (): void => {
    const at = now()
    tokens = Math.min(limits.burst, tokens + (Math.max(0, at - since) * limits.perSecond) / 1000)
    since = at
  }
  const next = (): void => {
    refill()
    while (waiting.length > 0 && running < limits.concurrent && tokens >= 1) {
      const work = waiting.shift()
      if (work === undefined) return
      tokens--
      running++
      void work().finally(() => {
        running--
        next()
      })
    }
    if (waiting.length > 0 && tokens < 1 && timer === undefined)
      timer = setTimeout(() => {
        timer = undefined
        next()
      }, 1000 / limits.perSecond)
  }
  return {
    take(work) {
      if (waiting.length >= limits.waiting) return false
      waiting.push(work)
      next()
      return true
    },
  }
}
