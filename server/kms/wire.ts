import type { Socket } from 'node:net'
import { Problem, problemStatus, type ProblemCode } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { maxShares, sealedShareMax } from '@fleetkey/protocol/share.ts'
import type { HandedIn, Kms, KmsKey, SealStatus, SplitOrder } from '../flows/context.ts'
import { isKeyName, isPurpose } from './policy.ts'
import { isBytes, isCount } from './shape.ts'

/**
 * What goes over the socket of the KMS process. A request is [id, operation, argument], an answer [id, null, result] or [id, [code, detail, reason or null,
 * seconds or null], null]; id 0 is a notice of the process that nobody asked for: the keys
 * were opened. Frames: `protocol/frames.ts`.
 */
export const limits = {
  /** Bytes of a frame: a revocation list of 300,000 entries is signed in one. */
  frame: 16 << 20,
  /** Of one that comes before its sender has proven who it is. */
  strangerFrame: 4 << 10,
  batch: 1024,
  /** Bytes that one wrap holds. */
  plaintext: 64 << 10,
  context: 4 << 10,
} as const

type SignItem = Parameters<Kms['sign']>[0][number]
type WrapItem = Parameters<Kms['wrap']>[0][number]
type UnwrapItem = Parameters<Kms['unwrap']>[0][number]

/** What needs the keys. */
export type KeyRequest =
  | { readonly op: 'create'; readonly name: string; readonly purpose: string }
  | { readonly op: 'describe' | 'destroy'; readonly name: string }
  | { readonly op: 'list' }
  | { readonly op: 'sign'; readonly batch: readonly SignItem[] }
  | { readonly op: 'wrap'; readonly batch: readonly WrapItem[] }
  | { readonly op: 'unwrap'; readonly batch: readonly UnwrapItem[] }

/** What is about opening them. */
export type SealRequest = { readonly seal: true } & (
  | { readonly op: 'seal.status' }
  | { readonly op: 'seal.unseal'; readonly share: Uint8Array; readonly reset: boolean }
  | { readonly op: 'seal.split'; readonly order: SplitOrder; readonly recipient: Uint8Array }
  | { readonly op: 'seal.confirm'; readonly set: string }
)

export type Request = { readonly op: 'hello'; readonly secret: Secret } | { readonly op: 'close' } | KeyRequest | SealRequest

const malformed = (what: string): Problem => new Problem('malformed', `KMS request: ${what}`, { reason: 'kms.wire' })

const fields = (value: unknown, count: number): readonly unknown[] => {
  if (!Array.isArray(value) || value.length !== count) throw malformed(`not an array of ${count}`)
  return value
}

const text = (value: unknown): string => {
  if (typeof value !== 'string' || value.length > 200) throw malformed('not a text')
  return value
}

const bytes = (value: unknown, most: number): Uint8Array => {
  if (!isBytes(value, most)) throw malformed(`not bytes, or more than ${most}`)
  return value
}

const flag = (value: unknown): boolean => {
  if (typeof value !== 'boolean') throw malformed('not true or false')
  return value
}

const keyName = (value: unknown): string => {
  if (!isKeyName(value)) throw malformed('not the name of a key')
  return value
}

const batch = <T>(value: unknown, item: (value: unknown) => T): readonly T[] => {
  if (!Array.isArray(value) || value.length > limits.batch) throw malformed('not a batch')
  return value.map(item)
}

/** One request with its id. Throws Problem('malformed', reason `kms.wire`). */
export const readRequest = (value: unknown): { readonly id: number; readonly request: Request } => {
  const [id, op, argument] = fields(value, 3)
  if (!isCount(id, 1, Number.MAX_SAFE_INTEGER)) throw malformed('no id')
  return { id, request: readOperation(op, argument) }
}

const readOperation = (op: unknown, argument: unknown): Request => {
  switch (op) {
    case 'hello':
      return { op, secret: new Secret(bytes(argument, 32)) }
    case 'create': {
      const [name, purpose] = fields(argument, 2)
      // A name that is none is the back end's to refuse, as it is when it is called directly.
      return { op, name: text(name), purpose: text(purpose) }
    }
    case 'describe':
    case 'destroy':
      return { op, name: text(argument) }
    case 'list':
    case 'close':
      return { op }
    case 'seal.status':
      return { seal: true, op }
    case 'seal.unseal': {
      const [share, reset] = fields(argument, 2)
      return { seal: true, op, share: bytes(share, sealedShareMax), reset: flag(reset) }
    }
    case 'seal.split': {
      const [shares, threshold, only, recipient] = fields(argument, 4)
      if (!isCount(shares, 2, maxShares) || !isCount(threshold, 2, shares)) throw malformed('not a number of shares')
      return { seal: true, op, order: { shares, threshold, only: flag(only) }, recipient: bytes(recipient, 65) }
    }
    case 'seal.confirm':
      return { seal: true, op, set: text(argument) }
    case 'sign':
      return {
        op,
        batch: batch(argument, (item) => {
          const [key, purpose, data] = fields(item, 3)
          if (!isPurpose(purpose)) throw malformed('not a purpose')
          return { key: keyName(key), purpose, data: bytes(data, limits.frame) }
        }),
      }
    case 'wrap':
      return {
        op,
        batch: batch(argument, (item) => {
          const [key, plaintext, context] = fields(item, 3)
          const clear = bytes(plaintext, limits.plaintext)
          const secret = new Secret(clear)
          clear.fill(0)
          return { key: keyName(key), plaintext: secret, context: bytes(context, limits.context) }
        }),
      }
    case 'unwrap':
      return {
        op,
        batch: batch(argument, (item) => {
          const [key, wrapped, context] = fields(item, 3)
          return { key: keyName(key), wrapped: bytes(wrapped, limits.plaintext + 64), context: bytes(context, limits.context) }
        }),
      }
    default:
      throw malformed('no such operation')
  }
}

export type Answer = { readonly id: number; readonly problem: Problem } | { readonly id: number; readonly result: unknown }

const isCode = (value: unknown): value is ProblemCode => typeof value === 'string' && Object.hasOwn(problemStatus, value)

/** Throws Problem('malformed'): the other side is no KMS process. */
export const readAnswer = (value: unknown): Answer => {
  const [id, problem, result] = fields(value, 3)
  if (!isCount(id, 0, Number.MAX_SAFE_INTEGER)) throw malformed('no id')
  if (problem === null) return { id, result }
  return { id, problem: readProblem(problem) }
}

export const problemParts = (problem: Problem): readonly unknown[] => [
  problem.code,
  problem.message.slice(0, 1000),
  problem.reason ?? null,
  problem.retryAfterSeconds ?? null,
]

export const readProblem = (value: unknown): Problem => {
  const [code, detail, reason, seconds] = fields(value, 4)
  if (!isCode(code) || typeof detail !== 'string') throw malformed('not a problem')
  return new Problem(code, detail, {
    ...(typeof reason === 'string' ? { reason } : {}),
    ...(isCount(seconds, 0, 86_400) ? { retryAfterSeconds: seconds } : {}),
  })
}

export const keyParts = (key: KmsKey): readonly unknown[] => [key.name, key.purpose, key.spki, key.uses, key.place]

export const readKey = (value: unknown): KmsKey => {
  const [name, purpose, spki, uses, place] = fields(value, 5)
  if (!isKeyName(name) || !isPurpose(purpose) || !(spki === null || spki instanceof Uint8Array) || !isCount(uses, 0, Number.MAX_SAFE_INTEGER))
    throw malformed('not a key')
  return { name, purpose, spki, uses, place: text(place) }
}

/** Byte strings, as many as were asked for. */
export const readByteStrings = (value: unknown, count: number): readonly Uint8Array[] => fields(value, count).map((one) => bytes(one, limits.frame))

export const sealParts = ({ sealed, reason, ways, sets, wrong, recipient }: SealStatus): readonly unknown[] => [
  sealed,
  reason?.slice(0, 1000) ?? null,
  ways,
  sets.map(({ set, shares, threshold, confirmed, only, gathered }) => [set, shares, threshold, confirmed, only, gathered]),
  wrong,
  recipient,
]

export const readSeal = (value: unknown): SealStatus => {
  const [sealed, reason, ways, sets, wrong, recipient] = fields(value, 6)
  if (!isCount(wrong, 0, Number.MAX_SAFE_INTEGER) || !Array.isArray(ways) || !ways.every((way) => way === 'file' || way === 'passphrase'))
    throw malformed('not the state of a seal')
  return {
    sealed: flag(sealed),
    reason: typeof reason === 'string' ? reason : null,
    ways,
    sets: batch(sets, (item) => {
      const [set, shares, threshold, confirmed, only, gathered] = fields(item, 6)
      if (!isCount(shares, 2, maxShares) || !isCount(threshold, 2, shares)) throw malformed('not a number of shares')
      return {
        set: text(set),
        shares,
        threshold,
        confirmed: flag(confirmed),
        only: flag(only),
        gathered: batch(gathered, (index) => {
          if (!isCount(index, 1, shares)) throw malformed('not a share')
          return index
        }),
      }
    }),
    wrong,
    recipient: bytes(recipient, 65),
  }
}

export const readHandedIn = (value: unknown): HandedIn => {
  const [status, set, index, fresh] = fields(value, 4)
  if (!isCount(index, 1, maxShares)) throw malformed('not a share')
  return { status: readSeal(status), set: text(set), index, fresh: flag(fresh) }
}

export const readSplit = (value: unknown, count: number): { readonly set: string; readonly shares: readonly Uint8Array[] } => {
  const [set, shares] = fields(value, 2)
  return { set: text(set), shares: readByteStrings(shares, count) }
}

/** What is written in one turn of the event loop leaves in one call of the system: a storm signs for hundreds of devices at a time. */
export const writeTogether = (socket: Socket, ...pieces: readonly Uint8Array[]): void => {
  if (socket.writableCorked === 0) {
    socket.cork()
    setImmediate(() => socket.uncork())
  }
  for (const piece of pieces) socket.write(piece)
}
