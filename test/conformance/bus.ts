import { expect, test } from 'vitest'
import type { Bus, DeviceRef } from '@fleetkey/server/flows/context.ts'

/** A device as this suite sees it: connected and subscribed. */
export interface BusDevice {
  /** Resolves when the engine says that the message is taken (PUBACK); rejects when the connection is closed instead. */
  send(bytes: Uint8Array): Promise<void>
  received(): Promise<Uint8Array>
  readonly closed: Promise<void>
  close(): Promise<void>
}

export interface BusUnderTest {
  readonly bus: Bus
  /** Connects a device (or, with an `e-…` id, a peer without identity) and subscribes it; `groups` are shard topics that it may have. */
  connect(client: string, groups?: readonly string[]): Promise<BusDevice>
  stop(): Promise<void>
}

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

const until = async (holds: () => boolean): Promise<void> => {
  for (let tries = 0; !holds(); tries++) {
    if (tries > 500) throw new Error('it never came to be')
    await new Promise((resolve) => void setTimeout(resolve, 10))
  }
}

/** What every MQTT engine behind `Bus` must do. `open` gives a started one whose handler is `handle`. */
export const busConformance = (open: (handle: (from: DeviceRef, bytes: Uint8Array) => Promise<void>) => Promise<BusUnderTest>): void => {
  const run = async (
    work: (
      of: BusUnderTest & {
        readonly taken: { from: DeviceRef; bytes: Uint8Array }[]
        readonly presence: [string, boolean][]
        hold(promise: Promise<void>): void
      },
    ) => Promise<void>,
  ): Promise<void> => {
    const taken: { from: DeviceRef; bytes: Uint8Array }[] = []
    const presence: [string, boolean][] = []
    let held: Promise<void> = Promise.resolve()
    const under = await open(async (from, message) => {
      await held
      taken.push({ from, bytes: message })
    })
    under.bus.onPresence(({ client }, present) => void presence.push([client, present]))
    try {
      await work({
        ...under,
        taken,
        presence,
        hold(promise) {
          held = promise
        },
      })
    } finally {
      await under.stop()
    }
  }

  test('a message reaches the handler with who sent it', async () =>
    await run(async ({ connect, taken }) => {
      const device = await connect('sensor-1')
      await device.send(bytes('hello'))
      expect(taken).toHaveLength(1)
      expect(taken[0]?.from).toMatchObject({ client: 'sensor-1', device: 'sensor-1' })
      expect(taken[0]?.from.exporter).toHaveLength(32)
      expect(taken[0]?.bytes).toStrictEqual(bytes('hello'))
    }))

  test('it is acknowledged only when the handler is done: that means durable', async () =>
    await run(async ({ connect, hold, taken }) => {
      const gate = Promise.withResolvers<void>()
      hold(gate.promise)
      const device = await connect('sensor-1')
      let acknowledged = false
      const sending = device.send(bytes('a')).then(() => (acknowledged = true))
      await new Promise((resolve) => void setTimeout(resolve, 200))
      expect(acknowledged).toBe(false)
      gate.resolve()
      await sending
      expect(taken).toHaveLength(1)
    }))

  test('a handler that fails: no acknowledgement, the connection ends', async () =>
    await run(async ({ connect, hold }) => {
      const failing = Promise.reject(new Error('the disk is full'))
      failing.catch(() => undefined)
      hold(failing)
      const device = await connect('sensor-1')
      await expect(device.send(bytes('a'))).rejects.toThrow()
      await device.closed
    }))

  test('send reaches exactly the one, in order; whoever is away is offline', async () =>
    await run(async ({ bus, connect }) => {
      const [one, other] = [await connect('sensor-1'), await connect('sensor-2')]
      expect(await Promise.all(['1', '2', '3'].map(async (text) => await bus.send('sensor-1', bytes(text))))).toStrictEqual([
        'accepted',
        'accepted',
        'accepted',
      ])
      expect(await bus.send('sensor-2', bytes('x'))).toBe('accepted')
      expect(await bus.send('sensor-3', bytes('y'))).toBe('offline')
      for (const text of ['1', '2', '3']) expect(await one.received()).toStrictEqual(bytes(text))
      expect(await other.received()).toStrictEqual(bytes('x'))
    }))

  test('presence: once when it can be reached, once when it is gone', async () =>
    await run(async ({ bus, connect, presence }) => {
      const device = await connect('sensor-1')
      await until(() => presence.length === 1)
      expect(presence).toStrictEqual([['sensor-1', true]])
      expect(bus.online('sensor-1')).toBe(true)
      await device.close()
      await until(() => presence.length === 2)
      expect(presence[1]).toStrictEqual(['sensor-1', false])
      expect(bus.online('sensor-1')).toBe(false)
    }))

  test('kick closes the live connection before it resolves', async () =>
    await run(async ({ bus, connect }) => {
      const device = await connect('sensor-1')
      await bus.kick('sensor-1', 'revoked')
      expect(bus.online('sensor-1')).toBe(false)
      expect(await bus.send('sensor-1', bytes('x'))).toBe('offline')
      await device.closed
      await bus.kick('nobody', 'harmless')
    }))

  test('a second connection takes over from the first', async () =>
    await run(async ({ bus, connect }) => {
      const first = await connect('sensor-1')
      const second = await connect('sensor-1')
      await first.closed
      await until(() => bus.online('sensor-1'))
      expect(await bus.send('sensor-1', bytes('x'))).toBe('accepted')
      expect(await second.received()).toStrictEqual(bytes('x'))
    }))

  test('publish reaches the members of a shard and nobody else', async () =>
    await run(async ({ bus, connect }) => {
      const topic = 'fk/1/g/plant/0'
      const members = [await connect('sensor-1', [topic]), await connect('sensor-2', [topic])]
      const stranger = await connect('sensor-3')
      await bus.publish(topic, bytes('epoch'))
      for (const member of members) expect(await member.received()).toStrictEqual(bytes('epoch'))
      await bus.send('sensor-3', bytes('own'))
      expect(await stranger.received()).toStrictEqual(bytes('own'))
    }))

  test('a peer without identity has no device', async () =>
    await run(async ({ connect, taken }) => {
      const device = await connect(`e-${'0'.repeat(32)}`)
      await device.send(bytes('hello'))
      expect(taken[0]?.from.device).toBeNull()
    }))

  test('health, and an end that closes everything', async () =>
    await run(async ({ bus, connect }) => {
      const device = await connect('sensor-1')
      expect(bus.health()).toStrictEqual({ listening: true, connections: 1 })
      await bus.stop()
      await device.closed
      expect(bus.health()).toStrictEqual({ listening: false, connections: 0 })
    }))
}
