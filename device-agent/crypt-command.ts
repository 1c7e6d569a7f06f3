import { createReadStream } from 'node:fs'
import { open, rename, rm } from 'node:fs/promises'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import type { Readable, Writable } from 'node:stream'
import { encode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { AgentClient } from './client.ts'

/**
 * Data of any length under a managed key. What fits one message is one COSE_Encrypt0 (docs/protocol.md, "Application data"). Longer data is `FKC1`, 16 random bytes, then pieces: length in
 * 4 bytes, big-endian, and a COSE_Encrypt0 whose external_aad is `["fleetkey/1/pieces", these 16 bytes, number of the piece, whether it is the last, aad]`: none can be left out, doubled,
 * swapped, moved to other data, and no end is missing.
 */
const magic = Buffer.from('FKC1')
const idLength = 16
const pieceLength = 48 << 10
const maxPiece = (64 << 10) + 256

const fail = (detail: string): never => {
  throw new Problem('malformed', detail, { reason: 'pieces.layout' })
}

/** Reads exactly so many bytes, or fewer at the end. */
const reader = (input: Readable): { take(length: number): Promise<Buffer> } => {
  const chunks = input[Symbol.asyncIterator]() as AsyncIterator<Buffer>
  let waiting = Buffer.alloc(0)
  return {
    async take(length) {
      while (waiting.length < length) {
        const { value, done } = await chunks.next()
        if (done === true) break
        waiting = Buffer.concat([waiting, value])
      }
      const taken = waiting.subarray(0, length)
      waiting = waiting.subarray(taken.length)
      return taken
    },
  }
}

const aadOf = (id: Uint8Array, at: number, last: boolean, aad: Uint8Array): Uint8Array => encode(['fleetkey/1/pieces', id, at, last, aad])

async function* encrypted(agent: AgentClient, key: string, input: Readable, aad: Uint8Array): AsyncGenerator<Uint8Array> {
  const source = reader(input)
  let piece = await source.take(pieceLength)
  let following = await source.take(pieceLength)
  if (following.length === 0) return yield await agent.encrypt(key, piece, aad)
  const id = randomBytes(idLength)
  yield Buffer.concat([magic, id])
  for (let at = 0; ; at++) {
    const last = following.length === 0
    const ciphertext = await agent.encrypt(key, piece, aadOf(id, at, last, aad))
    const length = Buffer.alloc(4)
    length.writeUInt32BE(ciphertext.length)
    yield Buffer.concat([length, ciphertext])
    if (last) return
    piece = following
    following = await source.take(pieceLength)
  }
}

async function* decrypted(agent: AgentClient, key: string, input: Readable, aad: Uint8Array): AsyncGenerator<Uint8Array> {
  const source = reader(input)
  const start = await source.take(magic.length)
  if (!start.equals(magic)) {
    const rest = await source.take(maxPiece)
    if ((await source.take(1)).length > 0) return fail('neither a COSE_Encrypt0 nor pieces of one')
    return yield (await agent.decrypt(key, Buffer.concat([start, rest]), { aad })).plaintext
  }
  const id = await source.take(idLength)
  let head = await source.take(4)
  for (let at = 0; ; at++) {
    const length = head.length === 4 ? head.readUInt32BE() : fail('it ends before its last piece')
    if (length > maxPiece) return fail('a piece is too long')
    const ciphertext = await source.take(length)
    if (ciphertext.length < length) return fail('it ends within a piece')
    // What follows says whether this claims to be the last: the claim is authenticated.
    head = await source.take(4)
    const last = head.length === 0
    yield (await agent.decrypt(key, ciphertext, { aad: aadOf(id, at, last, aad) })).plaintext
    if (last) return
  }
}

const pour = async (pieces: AsyncIterable<Uint8Array>, output: Writable): Promise<void> => {
  for await (const piece of pieces) if (!output.write(piece)) await once(output, 'drain')
}

/**
 * `crypt encrypt` and `crypt decrypt`. To a file: whole or not at all. To stdout, pieces as they are authenticated: only the exit code says that the end was reached. Throws Problem.
 */
export const crypt = async (of: {
  readonly what: 'encrypt' | 'decrypt'
  readonly agent: AgentClient
  readonly key: string
  readonly aad: Uint8Array
  readonly input: string | undefined
  readonly output: string | undefined
}): Promise<void> => {
  const input = of.input === undefined ? process.stdin : createReadStream(of.input)
  const pieces = (of.what === 'encrypt' ? encrypted : decrypted)(of.agent, of.key, input, of.aad)
  if (of.output === undefined) return await pour(pieces, process.stdout)
  const part = `${of.output}.part`
  const file = await open(part, 'w', 0o600)
  try {
    for await (const piece of pieces) await file.writeFile(piece)
    await file.sync()
    await file.close()
    // A crash here: the part is left beside what was there before.
    await rename(part, of.output)
  } catch (error) {
    await file.close().catch(() => undefined)
    await rm(part, { force: true })
    throw error
  }
}
