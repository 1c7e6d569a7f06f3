import { ConnectionRefused, passwordOf, type Connection, type ConnectionOptions } from '@fleetkey/device-agent/connection.ts'
import { returnCodeFor } from '@fleetkey/server/api/broker/embedded.ts'
import type { Connect } from '@fleetkey/server/flows/connect.ts'
import type { Bus, DeviceRef } from '@fleetkey/server/flows/context.ts'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Dice } from './dice.ts'
import type { VirtualTime } from './time.ts'

type Verdict = { readonly device: DeviceId | null; readonly topics?: readonly string[] } | { readonly refused: string }

/** What the network may do to one message once it is hostile. */
const treatments = ['pass', 'pass', 'pass', 'pass', 'pass', 'drop', 'repeat', 'late', 'swap', 'flip', 'cut', 'replay'] as const

/** One connection, seen from both ends. */
interface Line {
  readonly ref: DeviceRef
  readonly options: ConnectionOptions
  groups: ReadonlySet<string>
  /** The agent's end counts as open: it is told when the line breaks. */
  isOpen: boolean
  isBroken: boolean
  /** When the last message of each direction arrives: they do not overtake each other. */
  up: number
  down: number
  readonly waiting: Set<(why: Error) => void>
}

/** A network with a broker in it and nothing real below: delays, broken lines, and a hostile mood. */
export interface Network {
  /** The broker of a server that starts. `admit` decides on CONNECT. */
  attach(admit: (connect: Connect) => Promise<Verdict>): Bus
  /** The server is gone at once: every line breaks, and nobody answers. */
  crash(): void
  /** Stands in for the agent's `openConnection`. */
  readonly connect: (options: ConnectionOptions, abort?: AbortSignal) => Promise<Connection>
  /** Breaks the line of this client, if it has one. */
  sever(client: string): void
  /** Breaks the line that carries the message after this many more, before it arrives. */
  severAfter(messages: number): void
  /** Messages are lost, repeated, delayed, damaged, given to others, played again. */
  hostile(is: boolean): void
  /** What was done to how many messages. */
  readonly done: Readonly<Record<string, number>>
}

const isAborted = (abort: AbortSignal | undefined): boolean => abort?.aborted === true

export const openNetwork = (of: { readonly time: VirtualTime; readonly dice: Dice }): Network => {
  const { time, dice } = of
  let server:
    | {
        readonly admit: (connect: Connect) => Promise<Verdict>
        readonly gone: Promise<never>
        readonly end: (why: Error) => void
        handler?: (from: DeviceRef, bytes: Uint8Array) => Promise<void>
        readonly listeners: ((from: DeviceRef, present: boolean) => void)[]
      }
    | undefined
  const lines = new Map<string, Line>()
  const seen: { readonly way: 'up' | 'down'; readonly bytes: Uint8Array }[] = []
  const done: Record<string, number> = {}
  let isHostile = false
  let messagesLeft = Number.POSITIVE_INFINITY
  let connections = 0

  const travel = async (): Promise<void> => await time.pass(dice.between(1, 40))

  const sever = (line: Line, why: string): void => {
    if (line.isBroken) return
    line.isBroken = true
    if (lines.get(line.ref.client) === line) lines.delete(line.ref.client)
    for (const reject of line.waiting) reject(new Error(why))
    for (const listener of server?.listeners ?? []) listener(line.ref, false)
    if (line.isOpen) line.options.onClose(why)
  }

  const damaged = (bytes: Uint8Array): Uint8Array => {
    const at = dice.roll(bytes.length)
    return bytes.map((byte, index) => (index === at ? byte ^ (1 << dice.roll(8)) : byte))
  }

  /** Puts one message through what the network does to it. `deliver`: to this line, or to another one. */
  const treat = async (way: 'up' | 'down', line: Line, bytes: Uint8Array, deliver: (to: Line, bytes: Uint8Array) => Promise<void> | void): Promise<void> => {
    seen.push({ way, bytes })
    if (--messagesLeft < 0) {
      messagesLeft = Number.POSITIVE_INFINITY
      return sever(line, 'the line broke under a message')
    }
    if (seen.length > 500) seen.shift()
    if (!isHostile) return await deliver(line, bytes)
    const treatment = dice.pick(treatments)
    done[treatment] = (done[treatment] ?? 0) + 1
    switch (treatment) {
      case 'pass':
        return await deliver(line, bytes)
      case 'drop':
        return
      case 'repeat':
        await deliver(line, bytes)
        return await deliver(line, bytes)
      case 'late':
        return void setTimeout(() => void Promise.resolve(deliver(line, bytes)).catch(() => undefined), dice.between(100, 20_000))
      case 'swap':
        return await deliver(dice.pick([...lines.values(), line]), bytes)
      case 'flip':
        return await deliver(line, damaged(bytes))
      case 'cut':
        return await deliver(line, bytes.subarray(0, dice.roll(bytes.length)))
      case 'replay':
        await deliver(line, bytes)
        return await deliver(line, dice.pick(seen.filter((one) => one.way === way)).bytes)
    }
  }

  const toDevice = (line: Line, bytes: Uint8Array): void => {
    line.down = Math.max(line.down, time.now() + dice.between(1, 40))
    setTimeout(() => {
      if (line.isBroken) return
      void treat('down', line, bytes, (to, message) => {
        if (!to.isBroken) to.options.onMessage(message)
      })
    }, line.down - time.now())
  }

  /** Resolves with the PUBACK, which leaves when the server's promise has resolved. */
  const toServer = async (line: Line, bytes: Uint8Array): Promise<void> => {
    if (line.isBroken) throw new Error('the line is broken')
    const arrival = Promise.withResolvers<void>()
    line.waiting.add(arrival.reject)
    line.up = Math.max(line.up, time.now() + dice.between(1, 40))
    setTimeout(() => {
      const handler = server?.handler
      if (line.isBroken || handler === undefined) return
      treat('up', line, bytes, async (as, message) => await handler(as.ref, message)).then(
        () => void setTimeout(arrival.resolve, dice.between(1, 40)),
        () => sever(line, 'the server gave no acknowledgement'),
      )
    }, line.up - time.now())
    await arrival.promise.finally(() => line.waiting.delete(arrival.reject))
  }

  const connect = async (options: ConnectionOptions, abort?: AbortSignal): Promise<Connection> => {
    await travel()
    const to = server
    if (isAborted(abort)) throw new Error('aborted')
    if (to?.handler === undefined) throw new Error('connection refused')
    const { client, credentials } = options
    const exporter = dice.bytes(32)
    const login = credentials === null ? {} : { username: client, password: Buffer.from(await passwordOf(options, credentials, exporter)) }
    await travel()
    const certificate = credentials?.certificates[0] ?? null
    const verdict = await Promise.race([
      to.admit({ clientId: client, username: undefined, password: undefined, ...login, certificate, exporter, from: '192.0.2.0/24' }),
      to.gone,
    ])
    if ('refused' in verdict) {
      const code = returnCodeFor(verdict.refused)
      if (code === 3) throw new Error(`CONNACK 3: ${verdict.refused}`)
      throw new ConnectionRefused(`CONNACK ${code}`, { isOver: code === 4 })
    }
    const before = lines.get(client)
    if (before !== undefined) sever(before, 'taken over')
    const line: Line = {
      ref: { client, device: verdict.device, from: '192.0.2.0/24', exporter, connection: ++connections },
      options,
      groups: new Set(verdict.topics),
      isOpen: false,
      isBroken: false,
      up: 0,
      down: 0,
      waiting: new Set(),
    }
    lines.set(client, line)
    // What the server says now may come before the agent knows that it is connected.
    for (const listener of to.listeners) listener(line.ref, true)
    await travel()
    if (isAborted(abort)) sever(line, 'aborted')
    if (lines.get(client) !== line) throw new Error('the line broke while it was opened')
    line.isOpen = true
    return {
      client,
      exporter,
      // TLS is not simulated: its own tests have the real one.
      server: { notBefore: 0, notAfter: Number.MAX_SAFE_INTEGER },
      // The server alone decides what a line hears.
      subscribe: async () => undefined,
      send: async (bytes) => await toServer(line, bytes),
      close: async () => sever(line, 'closed by the agent'),
      destroy: () => sever(line, 'dropped by the agent'),
    }
  }

  return {
    connect,
    done,
    sever(client) {
      const line = lines.get(client)
      if (line !== undefined) sever(line, 'the line broke')
    },
    severAfter(messages) {
      messagesLeft = messages
    },
    hostile(is) {
      isHostile = is
    },
    crash() {
      const last = server
      server = undefined
      last?.end(new Error('the server is gone'))
      for (const line of lines.values()) sever(line, 'the server is gone')
    },
    attach(admit) {
      const { promise: gone, reject: end } = Promise.withResolvers<never>()
      gone.catch(() => undefined)
      const mine: NonNullable<typeof server> = { admit, gone, end, listeners: [] }
      server = mine
      const isUp = (): boolean => server === mine
      return {
        start: async (handler) => void (mine.handler = handler),
        async send(client, bytes) {
          const line = isUp() ? lines.get(client) : undefined
          if (line === undefined) return 'offline'
          toDevice(line, bytes)
          return 'accepted'
        },
        async publish(topic, bytes) {
          if (isUp()) for (const line of lines.values()) if (line.groups.has(topic)) toDevice(line, bytes)
        },
        assign(client, topics) {
          const line = isUp() ? lines.get(client) : undefined
          if (line !== undefined) line.groups = new Set(topics)
        },
        async kick(client) {
          const line = isUp() ? lines.get(client) : undefined
          if (line !== undefined) sever(line, 'kicked')
        },
        online: (client) => isUp() && lines.has(client),
        onPresence: (listener) => void mine.listeners.push(listener),
        health: () => ({ listening: isUp(), connections: isUp() ? lines.size : 0 }),
        stop: async () => undefined,
      }
    },
  }
}
