import { createHash } from 'node:crypto'
import { decode, encode } from './cbor.ts'
import type { BodyOf } from './messages.ts'
import { Problem } from './problem.ts'

/**
 * Messages too large for one MQTT payload go as frames under a signed manifest (messages.ts): the manifest fixes hash, length and count, so the
 * frames themselves need no signature. Frame = CBOR array [transfer (16 bytes), index, data].
 */
const dataMax = 48 << 10
/** Bytes that one payload may have: a frame's data and what is around it; larger messages must be split. */
export const chunkFrameMax = dataMax + 64

const arrayOfThree = 0x83

/** Signed messages start with COSE's tag, frames with an array of three. */
export const isFrame = (bytes: Uint8Array): boolean => bytes[0] === arrayOfThree

/** Manifest and frames of one signed message. `transfer`: 16 fresh random bytes. */
export const split = (bytes: Uint8Array, transfer: Uint8Array): { readonly manifest: BodyOf<'manifest'>; readonly frames: readonly Uint8Array[] } => {
  const count = Math.ceil(bytes.length / dataMax)
  const frames = Array.from({ length: count }, (_, index) => encode([transfer, index, bytes.subarray(index * dataMax, (index + 1) * dataMax)]))
  return { manifest: { type: 'manifest', transfer, hash: sha256(bytes), length: bytes.length, count }, frames }
}

const sha256 = (bytes: Uint8Array): Uint8Array => new Uint8Array(createHash('sha256').update(bytes).digest())

export interface Reassembler {
  /** Starts a transfer; one that was under way is dropped. Throws Problem('malformed') when it announces more than `max` bytes. */
  begin(manifest: BodyOf<'manifest'>): void
  /** The whole message with its last frame, undefined before. Frames come in order. Throws Problem('malformed') and drops the transfer. */
  add(frame: Uint8Array): Uint8Array | undefined
  /** Bytes held. */
  readonly pending: number
  reset(): void
}

/** Puts the frames of one transfer at a time together; never holds more than the manifest announced, nor that above `max` bytes. */
export const reassembler = (limits: { readonly max: number }): Reassembler => {
  let current: { readonly manifest: BodyOf<'manifest'>; readonly parts: Uint8Array[]; length: number } | undefined
  const fail = (detail: string, reason: string): never => {
    current = undefined
    throw new Problem('malformed', detail, { reason })
  }
  return {
    begin(manifest) {
      if (manifest.length > limits.max) fail(`a transfer of ${manifest.length} bytes`, 'transfer.size')
      if (manifest.count !== Math.ceil(manifest.length / dataMax)) fail(`${manifest.count} frames for ${manifest.length} bytes`, 'transfer.count')
      current = { manifest, parts: [], length: 0 }
    },
    add(bytes) {
      if (bytes.length > chunkFrameMax) fail(`a frame of ${bytes.length} bytes`, 'transfer.frame-size')
      if (current === undefined) return fail('a frame without a manifest', 'transfer.no-manifest')
      let frame: unknown
      try {
        frame = decode(bytes)
      } catch (thrown) {
        current = undefined
        throw thrown
      }
      const [transfer, index, data] = (Array.isArray(frame) ? frame : []) as readonly unknown[]
      const { manifest, parts } = current
      if (!(transfer instanceof Uint8Array) || !(data instanceof Uint8Array) || Buffer.compare(transfer, manifest.transfer) !== 0)
        return fail('a frame of another transfer', 'transfer.other')
      const last = parts.length === manifest.count - 1
      if (index !== parts.length || data.length !== (last ? manifest.length - current.length : dataMax)) return fail('a frame out of place', 'transfer.order')
      // A copy: the payload may be a view into a larger network buffer.
      parts.push(Uint8Array.from(data))
      current.length += data.length
      if (!last) return undefined
      const whole = Buffer.concat(parts)
      current = undefined
      return Buffer.compare(sha256(whole), manifest.hash) === 0 ? whole : fail('the frames do not have the announced hash', 'transfer.hash')
    },
    get pending() {
      return current?.length ?? 0
    },
    reset() {
      current = undefined
    },
  }
}
