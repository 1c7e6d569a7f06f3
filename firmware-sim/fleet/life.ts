import type { Fleet } from './fleet.ts'
import type { Habit } from './habits.ts'

/** Boards that live as their habits say, until `stop`. */
export interface Life {
  /** Switches them on and lets them live; resolves when all have started once. */
  begin(serials: readonly string[]): Promise<void>
  stop(): void
}

export const livingAs = (fleet: Fleet, habitFor: (serial: string) => Habit): Life => {
  const timers = new Map<string, NodeJS.Timeout>()
  let stopped = false

  const act = async (serial: string, what: 'sleep' | 'cut' | 'unplug' | 'wake'): Promise<void> => {
    if (what === 'wake') return await fleet.on([serial])
    if (what === 'sleep') return await fleet.sleep([serial])
    if (what === 'cut') return fleet.off([serial])
    fleet.unplug([serial])
  }

  /** One act after the other: what takes long puts off what follows. */
  const live = (serial: string, acts: Iterator<ReturnType<Habit['acts']> extends Iterable<infer A> ? A : never>): void => {
    const { value: next, done } = acts.next()
    if (stopped || done === true) return
    timers.set(
      serial,
      setTimeout(() => {
        timers.delete(serial)
        void act(serial, next.do).finally(() => live(serial, acts))
      }, next.after),
    )
  }

  return {
    async begin(serials) {
      await Promise.all(
        serials.map(async (serial) => {
          await fleet.on([serial])
          live(serial, habitFor(serial).acts()[Symbol.iterator]())
        }),
      )
    },
    stop() {
      stopped = true
      for (const timer of timers.values()) clearTimeout(timer)
      timers.clear()
    },
  }
}
