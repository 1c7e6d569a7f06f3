// The thread that keeps what was revoked and puts lists together (`list-maker.ts`). One request after the other.
import { parentPort } from 'node:worker_threads'
import { makeLists, RevocationList } from '../ca/revocation-list.ts'
import type { Request, Result } from './list-maker.ts'

const lists = new Map<string, RevocationList>()
const listOf = (authority: string): RevocationList => {
  const list = lists.get(authority) ?? new RevocationList()
  lists.set(authority, list)
  return list
}

const answer = (id: number, result: Result, moved: ArrayBuffer[] = []): void => parentPort?.postMessage({ id, result }, moved)

parentPort?.on('message', (request: Request) => {
  switch (request.op) {
    case 'put': {
      const list = listOf(request.authority)
      for (const certificate of request.certificates) list.put(certificate, request.at)
      return
    }
    case 'standing': {
      const list = listOf(request.authority)
      return answer(request.id, { entries: list.size, changed: list.changed().length > 0 })
    }
    case 'make': {
      const made = makeLists(listOf(request.order.authority), request.order)
      // Moved, not copied.
      return answer(
        request.id,
        made,
        made.map(({ room }) => room.buffer as ArrayBuffer),
      )
    }
  }
})
