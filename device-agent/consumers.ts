import { Problem } from '@fleetkey/protocol/problem.ts'

/** A local application that has to be ready for an epoch before its use is proven to the server. */
export interface Consumer {
  readonly key: string
  readonly name: string
}

/** A consumer that is there, for as long as its connection. */
export interface Registration {
  /** It has taken this epoch (and every lower one). */
  ready(epoch: number): void
  /** It cannot take this epoch: nobody waits for it any longer. */
  refuse(epoch: number): void
  leave(): void
}

export interface Consumers {
  /** `tell` is called with each epoch that the consumer is to take. */
  register(consumer: Consumer, tell: (epoch: number) => void): Registration
  /**
   * Tells every consumer of the key and waits until each is ready. Rejects with Problem('unavailable') when one is not within its time, refuses, goes away, or is required and not
   * there; the reason names it: `consumer.not-ready: NAME`, `consumer.refused: NAME`, `consumer.gone: NAME`, `consumer.absent: NAME`.
   */
  take(key: string, epoch: number, abort: AbortSignal): Promise<void>
}

interface Present extends Consumer {
  readonly tell: (epoch: number) => void
  ready: number
  /** What it was asked for last. */
  asked: number
  /** Ends the wait for it. */
  settle: ((outcome: { readonly why: string } | undefined) => void) | undefined
}

const failure = (what: string, { key, name }: Consumer, epoch: number, words: string): Problem =>
  new Problem('unavailable', `${name} ${words} ${key}/${epoch}`, { reason: `consumer.${what}: ${name}` })

/** `required`: consumers that must be there; `within`: milliseconds that each has. */
export const openConsumers = (of: { readonly required: readonly Consumer[]; readonly within: number }): Consumers => {
  const present = new Set<Present>()

  const readiness = async (one: Present, epoch: number, abort: AbortSignal): Promise<void> => {
    if (one.ready >= epoch) return
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    const words: Readonly<Record<string, string>> = {
      'not-ready': `is not ready within ${of.within / 1000} s for`,
      refused: 'refuses',
      gone: 'went away before it had',
    }
    const fail = (what: string): void => reject(failure(what, one, epoch, words[what] ?? what))
    const timer = setTimeout(() => fail('not-ready'), of.within)
    const stop = (): void => reject(new Problem('unavailable', 'the agent stops', { reason: 'agent.stops' }))
    abort.addEventListener('abort', stop, { once: true })
    one.settle = (outcome) => (outcome === undefined ? resolve() : fail(outcome.why))
    one.asked = epoch
    one.tell(epoch)
    try {
      await promise
    } finally {
      clearTimeout(timer)
      abort.removeEventListener('abort', stop)
      one.settle = undefined
    }
  }

  return {
    register({ key, name }, tell) {
      const one: Present = { key, name, tell, ready: 0, asked: 0, settle: undefined }
      present.add(one)
      return {
        ready(epoch) {
          one.ready = Math.max(one.ready, epoch)
          if (one.ready >= one.asked) one.settle?.(undefined)
        },
        refuse(epoch) {
          if (epoch >= one.asked) one.settle?.({ why: 'refused' })
        },
        leave() {
          present.delete(one)
          one.settle?.({ why: 'gone' })
        },
      }
    },
    async take(key, epoch, abort) {
      const mine = [...present].filter((one) => one.key === key)
      const absent = of.required.find((one) => one.key === key && !mine.some(({ name }) => name === one.name))
      if (absent !== undefined) throw failure('absent', absent, epoch, 'is not connected, and is to take')
      const outcomes = await Promise.allSettled(mine.map(async (one) => await readiness(one, epoch, abort)))
      const failed = outcomes.find((outcome) => outcome.status === 'rejected')
      if (failed !== undefined) throw failed.reason
    },
  }
}
