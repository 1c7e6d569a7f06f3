import { createHash } from 'node:crypto'
import type { EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'
import type { DeviceRef } from '@fleetkey/server/flows/context.ts'

/** What happens to one message. */
const treatments = ['pass', 'pass', 'pass', 'pass', 'pass', 'drop', 'repeat', 'delay', 'swap', 'flip', 'truncate', 'replay'] as const
type Treatment = (typeof treatments)[number]

/** Numbers that depend on the seed and a name only: the same schedule does the same to the same message. */
const die = (seed: string) => {
  const counts = new Map<string, number>()
  return (name: string): { roll(sides: number): number } => {
    const count = (counts.get(name) ?? 0) + 1
    counts.set(name, count)
    const bytes = createHash('sha256').update(`${seed}/${name}/${count}`).digest()
    let at = 0
    return {
      roll: (sides) => {
        at = (at + 4) % 28
        return bytes.readUInt32BE(at) % sides
      },
    }
  }
}

export interface HostileBus {
  readonly wrap: (bus: EmbeddedBus) => EmbeddedBus
  /** From now on everything is treated. */
  attack(): void
  /** From now on everything passes, held messages included. */
  calm(): void
  readonly done: Readonly<Record<Treatment, number>>
}

/** A broker between agent and server that drops, repeats, holds back, swaps recipients, flips bits, cuts off and replays what it saw before. */
export const hostileBus = (seed: string): HostileBus => {
  const throwDice = die(seed)
  const seen: { readonly direction: 'up' | 'down'; readonly bytes: Uint8Array }[] = []
  const refs = new Map<string, DeviceRef>()
  const done = Object.fromEntries(treatments.map((name) => [name, 0])) as Record<Treatment, number>
  let hostile = false

  const flipped = (bytes: Uint8Array, at: number): Uint8Array => bytes.map((byte, index) => (index === at % bytes.length ? byte ^ (1 << (at % 8)) : byte))
  const cut = (bytes: Uint8Array, at: number): Uint8Array => bytes.subarray(0, at % bytes.length)

  /** Puts `deliver` through the schedule; `others` are the clients that it may be swapped with. */
  const treat = async (
    of: { readonly direction: 'up' | 'down'; readonly client: string; readonly bytes: Uint8Array },
    deliver: (client: string, bytes: Uint8Array) => Promise<unknown>,
  ): Promise<void> => {
    const { direction, client, bytes } = of
    seen.push({ direction, bytes })
    if (!hostile) return void (await deliver(client, bytes))
    const dice = throwDice(`${direction} ${client.startsWith('e-') ? 'enrolment' : client}`)
    const treatment = treatments[dice.roll(treatments.length)] ?? 'pass'
    done[treatment]++
    switch (treatment) {
      case 'pass':
        return void (await deliver(client, bytes))
      case 'drop':
        return
      case 'repeat':
        await deliver(client, bytes)
        return void (await deliver(client, bytes))
      case 'delay':
        return void setTimeout(() => void deliver(client, bytes).catch(() => undefined), dice.roll(300))
      case 'swap': {
        const others = [...refs.keys()].filter((other) => other !== client)
        return void (await deliver(others[dice.roll(Math.max(1, others.length))] ?? client, bytes))
      }
      case 'flip':
        return void (await deliver(client, flipped(bytes, dice.roll(1 << 30))))
      case 'truncate':
        return void (await deliver(client, cut(bytes, dice.roll(1 << 30))))
      case 'replay': {
        const old = seen.filter((one) => one.direction === direction)
        await deliver(client, bytes)
        return void (await deliver(client, old[dice.roll(old.length)]?.bytes ?? bytes))
      }
    }
  }

  return {
    done,
    attack() {
      hostile = true
    },
    calm() {
      hostile = false
    },
    wrap: (bus) => ({
      get port() {
        return bus.port
      },
      start: async (handler) => {
        bus.onPresence((from, present) => {
          if (present) refs.set(from.client, from)
          else refs.delete(from.client)
        })
        await bus.start(async (from, bytes) => {
          refs.set(from.client, from)
          await treat({ direction: 'up', client: from.client, bytes }, async (client, message) => await handler(refs.get(client) ?? from, message))
        })
      },
      async send(client, bytes) {
        let outcome: 'accepted' | 'offline' = 'accepted'
        await treat({ direction: 'down', client, bytes }, async (to, message) => {
          outcome = await bus.send(to, message)
        })
        return outcome
      },
      publish: async (topic, bytes) =>
        await treat({ direction: 'down', client: topic, bytes }, async (to, message) =>
          to === topic ? await bus.publish(topic, message) : await bus.send(to, message),
        ),
      assign: bus.assign,
      kick: bus.kick,
      online: bus.online,
      onPresence: bus.onPresence,
      health: bus.health,
      stop: bus.stop,
      renew: bus.renew,
      forgetTickets: bus.forgetTickets,
    }),
  }
}
