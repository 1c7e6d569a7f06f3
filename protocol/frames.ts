import { decode, encode, encodePieces } from './cbor.ts'
import { Problem } from './problem.ts'

/** One value on a byte stream: its length in 4 bytes, big-endian, then deterministic CBOR. */
export const frame = (value: unknown): Uint8Array => {
  const body = encode(value)
  const bytes = Buffer.allocUnsafe(4 + body.length)
  bytes.writeUInt32BE(body.length)
  bytes.set(body, 4)
  return bytes
}

/** The same as pieces that follow each other: long byte strings are not copied (`encodePieces`). */
export const framePieces = (value: unknown): readonly Uint8Array[] => {
  const pieces = encodePieces(value)
  const length = Buffer.allocUnsafe(4)
  length.writeUInt32BE(pieces.reduce((sum, piece) => sum + piece.length, 0))
  return pieces.length === 1 ? [Buffer.concat([length, ...pieces])] : [length, ...pieces]
}

/** Cuts a byte stream into the values of its frames. A frame longer than `max` is refused before its body is kept. */
export class FrameReader {
  /** Bytes of one frame's body; may be raised once the other side is known. */
  max: number
  #chunks: Uint8Array[] = []
  #length = 0

  constructor(max: number) {
    this.max = max
  }

  /** The values that are complete now, oldest first. Throws Problem('malformed'); the stream is useless then. */
  *push(chunk: Uint8Array): Generator<unknown> {
    this.#chunks.push(chunk)
    this.#length += chunk.length
    while (this.#length >= 4) {
      const size = this.#peek(4).readUInt32BE()
      if (size > this.max) throw new Problem('malformed', `a frame of ${size} bytes`, { reason: 'frame.size' })
      if (this.#length < 4 + size) return
      const bytes = this.#peek(4 + size)
      this.#take(4 + size)
      yield decode(bytes.subarray(4, 4 + size))
    }
  }

  /** At least so many bytes from the front, in one piece. Joined only when they are all there, so that a long frame is copied once. */
  #peek(count: number): Buffer {
    const [first] = this.#chunks
    if (first !== undefined && first.length >= count) return Buffer.from(first.buffer, first.byteOffset, first.length)
    const joined = Buffer.concat(this.#chunks)
    this.#chunks = [joined]
    return joined
  }

  #take(count: number): void {
    const [first] = this.#chunks
    if (first === undefined) return
    this.#chunks[0] = first.subarray(count)
    this.#length -= count
  }
}
