import { connect } from 'node:net'
import { FrameReader, framePieces } from '@fleetkey/protocol/frames.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { limits, readAnswer, writeTogether } from './wire.ts'

/** The KMS process has gone before it answered. What was asked may have been done. */
export class Lost extends Error {
  override readonly name = 'Lost'
}

/** One connection to the KMS process. */
export interface Connection {
  /** The result; throws its Problem, or Lost when the connection ended first. */
  ask(op: string, argument: unknown): Promise<unknown>
  readonly waiting: number
  close(): void
}

/** Longer than the slowest token needs for a batch; then the caller is told, and the answer is dropped when it comes. */
const deadline = 30_000

/** What happens on a connection besides answers. */
export interface ConnectionEvents {
  /** The process says that the keys were opened. */
  readonly onOpen: () => void
  /** What keeps the keys from being used for now; null when nothing does any more. */
  readonly onNotice: (problem: Problem | null) => void
  readonly onClose: () => void
}

/** Connects and says the secret of this start; `state`: what the process answers to that. Throws Lost, or the Problem that the process answers. */
export const openConnection = async (
  path: string,
  secret: Uint8Array,
  { onOpen, onNotice, onClose }: ConnectionEvents,
): Promise<Connection & { readonly state: unknown }> => {
  const socket = connect(path)
  const reader = new FrameReader(limits.frame)
  const waiting = new Map<number, { readonly resolve: (result: unknown) => void; readonly reject: (error: Error) => void; readonly timer: NodeJS.Timeout }>()
  let last = 0
  let gone = false
  const settle = (id: number): (typeof waiting extends Map<number, infer W> ? W : never) | undefined => {
    const one = waiting.get(id)
    waiting.delete(id)
    clearTimeout(one?.timer)
    return one
  }
  socket.on('data', (chunk: Buffer) => {
    try {
      for (const value of reader.push(chunk)) {
        const answer = readAnswer(value)
        if (answer.id === 0) {
          if ('problem' in answer) onNotice(answer.problem)
          else if (answer.result === true) onOpen()
          else onNotice(null)
          continue
        }
        const one = settle(answer.id)
        if ('problem' in answer) one?.reject(answer.problem)
        else one?.resolve(answer.result)
      }
    } catch {
      socket.destroy()
    }
  })
  socket.on('error', () => socket.destroy())
  socket.on('close', () => {
    gone = true
    for (const id of waiting.keys()) settle(id)?.reject(new Lost('the KMS process has gone'))
    onClose()
  })
  const ask = async (op: string, argument: unknown): Promise<unknown> =>
    await new Promise((resolve, reject) => {
      if (gone) return reject(new Lost('the KMS process has gone'))
      const id = ++last
      const timer = setTimeout(
        () => settle(id)?.reject(new Problem('unavailable', `the KMS has not answered within ${deadline / 1000} s`, { reason: 'kms.slow' })),
        deadline,
      )
      waiting.set(id, { resolve, reject, timer })
      // A revocation list of a large fleet leaves as it is: copying it would take longer than devices may wait.
      writeTogether(socket, ...framePieces([id, op, argument]))
    })
  const state = await ask('hello', secret)
  return {
    ask,
    state,
    get waiting() {
      return waiting.size
    },
    close: () => socket.destroy(),
  }
}
