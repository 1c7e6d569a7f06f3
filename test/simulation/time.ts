import { syncBuiltinESMExports } from 'node:module'
import { install } from '@sinonjs/fake-timers'

/** Time of a simulated world: stands still while anything runs, then leaps to whatever is due next. */
export interface VirtualTime {
  /** Milliseconds since 1970. */
  now(): number
  /** Waits in virtual time. */
  pass(milliseconds: number): Promise<void>
  /** Runs what is due until `milliseconds` have passed, or `done` holds; whether it did. `done` is asked after every moment in which something happened. */
  run(milliseconds: number, done?: () => Promise<boolean> | boolean): Promise<boolean>
  /** Real time again. */
  end(): void
}

const hour = 3_600_000

/**
 * Takes the place of every timer of this process, and of the clocks that it asks, until `end`. Nothing in a simulated world waits for anything real: when the
 * microtasks are done, nothing happens any more before the next timer.
 */
export const virtualTime = (start: number): VirtualTime => {
  const idle = globalThis.setImmediate
  const clock = install({
    now: start,
    toFake: ['setTimeout', 'clearTimeout', 'setInterval', 'clearInterval', 'Date', 'performance'],
    shouldClearNativeTimers: true,
    ignoreMissingTimers: true,
  })
  // What was imported by name from node:timers/promises is looked up anew.
  syncBuiltinESMExports()
  const settled = async (): Promise<void> => await new Promise((resolve) => void idle(resolve))
  return {
    now: () => clock.now,
    pass: async (milliseconds) => await new Promise((resolve) => void setTimeout(resolve, milliseconds)),
    async run(milliseconds, done = () => false) {
      const end = clock.now + milliseconds
      // One that does nothing: the world's time goes on to its end even when nothing is due.
      const last = setTimeout(() => undefined, milliseconds)
      try {
        await settled()
        for (let moments = 0; clock.now < end; moments++) {
          if (moments > 2_000_000) throw new Error(`more than ${moments} moments in ${milliseconds / hour} hours: something spins`)
          if (await done()) return true
          clock.next()
          await settled()
        }
        return await done()
      } finally {
        clearTimeout(last)
      }
    },
    end() {
      clock.uninstall()
      syncBuiltinESMExports()
    },
  }
}
