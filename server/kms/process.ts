import { chmodSync, readSync, rmSync, writeSync } from 'node:fs'
import { createServer, type Socket } from 'node:net'
import { dirname } from 'node:path'
import { FrameReader, frame } from '@fleetkey/protocol/frames.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms, KmsKeyPurpose } from '../flows/context.ts'
import { openSafe, type Safe } from './safe.ts'
import { lockKeys } from './lock.ts'
import { openKms } from './open.ts'
import { isOrders, type Orders } from './orders.ts'
import { keyParts, limits, problemParts, readRequest, sealParts, writeTogether, type KeyRequest, type Request, type SealRequest } from './wire.ts'

/**
 * The process that alone holds the private keys. The server starts it (`supervisor.ts`), tells it on standard input where they are, and reaches it over
 * a UNIX socket; it ends when that input ends, however the server died. One frame on standard output: ready, sealed or not (`safe.ts`), or the Problem
 * that keeps it from being so.
 */
const maxConnections = 16
/** Requests of one connection that are under way; more wait unread. */
const maxPending = 64
const strangerPatience = 10_000

/**
 * A fault run ends the server at a named step: the server is told, and nothing here goes on before it has answered, so that both stop at the same point.
 * Descriptor 3 is not a stream, reading it blocks.
 */
const askedAtEachStep = (name: string): void => {
  writeSync(3, `${name}\n`)
  if (readSync(3, Buffer.alloc(1)) === 0) process.exit(0)
}

const carryOut = async (kms: Kms, request: KeyRequest): Promise<unknown> => {
  switch (request.op) {
    case 'create':
      // The back end checks the purpose as it checks the name.
      return keyParts(await kms.create(request.name, request.purpose as KmsKeyPurpose))
    case 'describe': {
      const key = await kms.describe(request.name)
      return key === undefined ? null : keyParts(key)
    }
    case 'list':
      return (await kms.list()).map(keyParts)
    case 'sign':
      return await kms.sign(request.batch)
    case 'wrap': {
      const wrapped = await kms.wrap(request.batch)
      for (const { plaintext } of request.batch) plaintext.destroy()
      return wrapped
    }
    case 'unwrap':
      return (await kms.unwrap(request.batch)).map((secret) => secret.bytes())
    case 'destroy':
      await kms.destroy(request.name)
      return null
  }
}

const carryOutSeal = async (safe: Safe, request: SealRequest): Promise<unknown> => {
  switch (request.op) {
    case 'seal.status':
      return sealParts(await safe.status())
    case 'seal.unseal': {
      const { status, set, index, fresh } = await safe.unseal(request.share, request.reset)
      return [sealParts(status), set, index, fresh]
    }
    case 'seal.split': {
      const { set, shares } = await safe.split(request.order, request.recipient)
      return [set, shares]
    }
    case 'seal.confirm':
      return sealParts(await safe.confirm(request.set))
  }
}

/** Serves one connection: strangers may only say the secret of this start, once, in time. `known`: who is told when the keys are opened, or cannot be used for a while. */
const serve = (socket: Socket, of: { readonly safe: Safe; readonly secret: Secret; readonly known: Set<Socket> }): void => {
  const reader = new FrameReader(limits.strangerFrame)
  let known = false
  let pending = 0
  const stranger = setTimeout(() => socket.destroy(), strangerPatience)
  const flow = (): void => {
    if (pending >= maxPending || socket.writableNeedDrain) socket.pause()
    else socket.resume()
  }
  const answer = (id: number, problem: Problem | null, result: unknown): void => {
    if (!socket.destroyed) writeTogether(socket, frame([id, problem === null ? null : problemParts(problem), result]))
  }
  const handle = async (request: Request): Promise<unknown> => {
    if (request.op === 'hello') {
      if (known || request.secret.length !== of.secret.length || !request.secret.equals(of.secret)) throw new Problem('unauthenticated', 'wrong secret')
      known = true
      of.known.add(socket)
      clearTimeout(stranger)
      reader.max = limits.frame
      return sealParts(await of.safe.status())
    }
    if (!known) throw new Problem('unauthenticated', 'say hello first')
    if (request.op === 'close') {
      await of.safe.close()
      return null
    }
    return 'seal' in request ? await carryOutSeal(of.safe, request) : await carryOut(of.safe.kms(), request)
  }
  socket.on('data', (chunk: Buffer) => {
    try {
      for (const value of reader.push(chunk)) {
        const { id, request } = readRequest(value)
        pending++
        handle(request)
          .then(
            (result) => answer(id, null, result),
            (thrown: unknown) => {
              answer(id, toProblem(thrown), null)
              if (!known) socket.end()
            },
          )
          .finally(() => {
            pending--
            flow()
          })
      }
      flow()
    } catch {
      // Whoever does not speak this language has no business here; its requests under way come to nothing.
      socket.destroy()
    }
  })
  socket.on('drain', flow)
  socket.on('error', () => socket.destroy())
  socket.on('close', () => {
    clearTimeout(stranger)
    of.known.delete(socket)
  })
}

const run = async (orders: Orders): Promise<void> => {
  lockKeys(orders.folder)
  const step = orders.steps ? askedAtEachStep : (): void => undefined
  const known = new Set<Socket>()
  const notice = (problem: Problem | null): void => {
    for (const socket of known) socket.write(frame([0, problem === null ? null : problemParts(problem), null]))
  }
  const safe = await openSafe({
    folder: orders.folder,
    open: async (master) => await openKms({ folder: orders.folder, step, master, notice }, orders.backend),
    step,
    onOpen: () => {
      for (const socket of known) socket.write(frame([0, null, true]))
    },
  })
  const secret = new Secret(orders.secret)
  orders.secret.fill(0)
  const server = createServer((socket) => serve(socket, { safe, secret, known }))
  server.maxConnections = maxConnections
  rmSync(orders.socket, { force: true })
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject)
    server.listen(orders.socket, resolve)
  })
  chmodSync(orders.socket, 0o600)
}

const end = (): void => {
  // The server has gone, in order (its keys are closed by then) or not.
  if (socket !== undefined) rmSync(dirname(socket), { recursive: true, force: true })
  process.exit(0)
}

const say = (value: unknown): void => {
  try {
    writeSync(1, frame(value))
  } catch {
    // It went while this process started.
    end()
  }
}

// Ctrl-C reaches the whole group: the server decides when its keys are no longer needed.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => undefined)
const input = new FrameReader(limits.strangerFrame)
let socket: string | undefined
process.stdin.on('data', (chunk: Buffer) => {
  for (const orders of input.push(chunk)) {
    if (socket !== undefined || !isOrders(orders)) process.exit(1)
    ;({ socket } = orders)
    run(orders).then(
      () => say([true, null]),
      (thrown: unknown) => {
        say([false, problemParts(toProblem(thrown))])
        process.exit(5)
      },
    )
  }
})
process.stdin.on('end', end)
