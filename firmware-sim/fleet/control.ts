import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { KeyId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { z } from 'zod'
import { countBoards, type Counts } from './counts.ts'
import type { Fleet } from './fleet.ts'
import type { Habit } from './habits.ts'
import type { Life } from './life.ts'

const serials = z.array(z.string().min(1).max(64)).max(100_000)
const base64 = z
  .string()
  .max(1 << 20)
  .regex(/^[A-Za-z0-9+/]*={0,2}$/)
const one = { serial: z.string(), key: KeyId }

/** One line of standard input; `id` comes back with the reply. */
const Order = z.discriminatedUnion('do', [
  z.strictObject({ id: z.int(), do: z.literal('on'), serials }),
  z.strictObject({ id: z.int(), do: z.literal('off'), serials }),
  z.strictObject({ id: z.int(), do: z.literal('unplug'), serials }),
  z.strictObject({ id: z.int(), do: z.literal('live'), serials }),
  z.strictObject({ id: z.int(), do: z.literal('counts') }),
  z.strictObject({ id: z.int(), do: z.literal('status') }),
  z.strictObject({ id: z.int(), do: z.literal('stop') }),
  z.strictObject({ id: z.int(), do: z.literal('measure'), serial: z.string(), path: z.string().min(1).max(1024), data: base64 }),
  z.strictObject({ id: z.int(), do: z.literal('encrypt'), ...one, data: base64 }),
  z.strictObject({ id: z.int(), do: z.literal('decrypt'), ...one, data: base64 }),
  z.strictObject({ id: z.int(), do: z.literal('mac'), ...one, data: base64 }),
  z.strictObject({ id: z.int(), do: z.literal('verify'), ...one, epoch: z.int(), data: base64, mac: base64 }),
])
export type Order = z.infer<typeof Order>

/** What orders are carried out on. */
export interface Controlled {
  readonly fleet: Fleet
  readonly life: Life
  readonly habitFor: (serial: string) => Habit
  /** Connections that were opened so far. */
  readonly connections: () => number
}

/** Memory before there was a board, and the boards that were ever to be switched on here: those that are counted. */
interface Begun {
  readonly memory: number
  readonly boards: Set<string>
}

const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, 'base64'))
const text = (of: Uint8Array): string => Buffer.from(of).toString('base64')

/** Carries out one order on the real agents: what an application on the device would ask of its local socket. */
const carryOut = async (of: Controlled, begun: Begun, order: Order): Promise<object> => {
  const { fleet, life } = of
  switch (order.do) {
    case 'on':
      for (const serial of order.serials) begun.boards.add(serial)
      await fleet.on(order.serials)
      return {}
    case 'off':
      fleet.off(order.serials)
      return {}
    case 'unplug':
      fleet.unplug(order.serials)
      return {}
    case 'live':
      for (const serial of order.serials) begun.boards.add(serial)
      await life.begin(order.serials)
      return {}
    case 'counts': {
      const counts: Counts = {
        ...countBoards(fleet.status(begun.boards), (serial) => of.habitFor(serial).name),
        connections: of.connections(),
        memory: { now: process.memoryUsage.rss(), before: begun.memory },
      }
      return { counts }
    }
    case 'status':
      return { devices: Object.fromEntries(fleet.status()) }
    case 'stop':
      life.stop()
      await fleet.stop()
      return {}
    case 'measure':
      fleet.measureFile(order.serial, order.path, bytes(order.data))
      return {}
    case 'encrypt': {
      const { epoch, ciphertext } = await fleet.agent(order.serial).encrypt(order.key, bytes(order.data))
      return { epoch, data: text(ciphertext) }
    }
    case 'decrypt': {
      const { epoch, plaintext } = fleet.agent(order.serial).decrypt(order.key, bytes(order.data))
      return { epoch, data: text(plaintext) }
    }
    case 'mac': {
      const { epoch, mac } = await fleet.agent(order.serial).mac(order.key, bytes(order.data))
      return { epoch, mac: text(mac) }
    }
    case 'verify':
      return { valid: await fleet.agent(order.serial).verify(order.key, order.epoch, bytes(order.data), bytes(order.mac)) }
  }
}

const problemOf = (thrown: unknown): object =>
  thrown instanceof Problem
    ? { code: thrown.code, message: thrown.message }
    : { code: 'failed', message: thrown instanceof Error ? thrown.message : String(thrown) }

/** Orders as JSON lines on `input`, replies `{reply, …}` or `{reply, error}` to `say`. Resolves at `stop` or at the end of the input. */
export const serveControl = async (of: Controlled, input: Readable, say: (value: object) => void): Promise<void> => {
  const begun: Begun = { memory: process.memoryUsage.rss(), boards: new Set() }
  const lines = createInterface({ input })
  const stopped = Promise.withResolvers<void>()
  lines.on('line', (line) => {
    let order: Order
    try {
      order = Order.parse(JSON.parse(line))
    } catch (thrown) {
      return say({ reply: null, error: problemOf(thrown) })
    }
    carryOut(of, begun, order).then(
      (result) => {
        say({ reply: order.id, ...result })
        if (order.do === 'stop') stopped.resolve()
      },
      (thrown: unknown) => say({ reply: order.id, error: problemOf(thrown) }),
    )
  })
  lines.on('close', stopped.resolve)
  await stopped.promise
  lines.close()
  of.life.stop()
  await of.fleet.stop()
}
