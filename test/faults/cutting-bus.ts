import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { isFrame } from '@fleetkey/protocol/chunks.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import type { EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'

/** Messages of each direction, by their type. */
export const kinds = {
  up: ['hello', 'answer', 'report', 'acknowledge', 'evidence', 'renew'],
  down: ['challenge', 'identity', 'welcome', 'approvals', 'delivery', 'activate', 'retire', 'labels', 'broadcast', 'attest'],
} as const
/** `before`: what carries the message breaks under it; `after`: it has arrived, and what would say so has not. */
export const moments = ['before', 'after'] as const

/** Where a connection may break: direction, message and moment. */
export const cutPoints: readonly string[] = Object.entries(kinds).flatMap(([direction, names]) =>
  names.flatMap((name) => moments.map((moment) => `${direction} ${name} ${moment}`)),
)

const kindOf = (bytes: Uint8Array): string => (isFrame(bytes) ? 'frame' : readMessage(bytes, { max: 1 << 22 }).envelope.body.type)

export interface CuttingBus {
  readonly wrap: (bus: EmbeddedBus) => EmbeddedBus
  /** Points that were come to: every TCP connection was cut there, once for each. */
  readonly cut: ReadonlySet<string>
}

/**
 * A relay of TCP connections before a broker, which cuts all of them at these points (`point`, or `point#N`: its Nth time), each once. Devices find the relay where they look for the
 * broker.
 */
export const cuttingBus = (points: readonly string[]): CuttingBus => {
  const left = new Map(points.map((point) => [point, Number(point.split('#')[1] ?? 1)]))
  const cut = new Set<string>()
  const sockets = new Set<Socket>()

  /** Whether the connections were cut here. */
  const at = (place: string): boolean => {
    let isCut = false
    for (const [point, times] of left) {
      if (point.split('#')[0] !== place) continue
      left.set(point, times - 1)
      if (times > 1) continue
      left.delete(point)
      cut.add(point)
      isCut = true
    }
    if (isCut) for (const socket of sockets) socket.destroy()
    return isCut
  }

  return {
    cut,
    wrap(bus) {
      const joined = (one: Socket, other: Socket): void => {
        sockets.add(one)
        one.setNoDelay(true)
        one.on('error', () => undefined)
        one.once('close', () => {
          sockets.delete(one)
          other.destroy()
        })
        one.pipe(other)
      }
      const relay = createServer((device) => {
        const broker = connect(bus.port, '127.0.0.1')
        joined(device, broker)
        joined(broker, device)
      })
      const sending = async <R>(bytes: Uint8Array, lost: R, send: () => Promise<R>): Promise<R> => {
        const kind = kindOf(bytes)
        if (at(`down ${kind} before`)) return lost
        const sent = await send()
        at(`down ${kind} after`)
        return sent
      }
      return {
        get port() {
          return (relay.address() as AddressInfo).port
        },
        async start(handler) {
          await bus.start(async (from, bytes) => {
            const kind = kindOf(bytes)
            if (at(`up ${kind} before`)) throw new Error('the connection was cut')
            await handler(from, bytes)
            at(`up ${kind} after`)
          })
          await new Promise<void>((resolve) => relay.listen(0, '127.0.0.1', resolve))
        },
        send: async (client, bytes) => await sending(bytes, 'offline' as const, async () => await bus.send(client, bytes)),
        publish: async (topic, bytes) => await sending(bytes, undefined, async () => await bus.publish(topic, bytes)),
        assign: bus.assign,
        kick: bus.kick,
        online: bus.online,
        onPresence: bus.onPresence,
        health: bus.health,
        renew: bus.renew,
        forgetTickets: bus.forgetTickets,
        async stop() {
          for (const socket of sockets) socket.destroy()
          await new Promise((resolve) => relay.close(resolve))
          await bus.stop()
        },
      }
    },
  }
}
