import { Worker } from 'node:worker_threads'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Listed, MadeList, RoundOrder } from '../ca/revocation-list.ts'
import type { ListMaker } from '../flows/status-lists.ts'

/** What the thread is asked. It answers with the id of the request, and says nothing to a `put`. */
export type Request =
  | { readonly op: 'put'; readonly authority: string; readonly certificates: readonly Listed[]; readonly at: number }
  | { readonly op: 'standing'; readonly id: number; readonly authority: string }
  | { readonly op: 'make'; readonly id: number; readonly order: RoundOrder }
export type Result = Awaited<ReturnType<ListMaker['standing']>> | readonly MadeList[]

const ended = (cause?: unknown): Problem => new Problem('unavailable', 'the thread that makes revocation lists has ended', { reason: 'crl.thread', cause })

/** Keeps and makes the lists in a thread of their own: those of a large fleet take longer than devices may wait. It holds no key. */
export const listMaker = (): ListMaker => {
  const worker = new Worker(new URL('./list-worker.ts', import.meta.url))
  // Nothing waits for it at the end of the process, but for what it was asked.
  worker.unref()
  const waiting = new Map<number, { readonly resolve: (result: Result) => void; readonly reject: (problem: Problem) => void }>()
  let isGone = false
  let last = 0
  const end = (cause?: unknown): void => {
    isGone = true
    for (const { reject } of waiting.values()) reject(ended(cause))
    waiting.clear()
  }
  worker.on('message', ({ id, result }: { readonly id: number; readonly result: Result }) => {
    waiting.get(id)?.resolve(result)
    waiting.delete(id)
    if (waiting.size === 0) worker.unref()
  })
  worker.on('error', end)
  worker.on('exit', () => end())
  const ask = async <R extends Result>(of: (id: number) => Request): Promise<R> =>
    await new Promise<Result>((resolve, reject) => {
      if (isGone) return reject(ended())
      waiting.set(++last, { resolve, reject })
      worker.ref()
      worker.postMessage(of(last))
    }).then((result) => result as R)
  return {
    put(authority, certificates, at) {
      // What is lost with it is read again from the store.
      if (!isGone) worker.postMessage({ op: 'put', authority, certificates, at } satisfies Request)
    },
    standing: async (authority) => await ask((id) => ({ op: 'standing', id, authority })),
    make: async (order) => await ask((id) => ({ op: 'make', id, order })),
    gone: () => isGone,
    async close() {
      await worker.terminate()
    },
  }
}
