import { randomBytes, randomFillSync } from 'node:crypto'

/** Bytes that are drawn ahead, and up to how many of them one call takes from there: serials, ids and nonces, no keys, which are in no memory before they are made. */
const ahead = 4096
const small = 16

/**
 * Bytes from the system's generator, by way of OpenSSL's. Small amounts are cut from a larger one: a call for each serial or nonce takes ten times as long. What was
 * given out is nowhere else any more.
 */
export const systemRandom = (): ((length: number) => Uint8Array) => {
  const drawn = new Uint8Array(ahead)
  let at = ahead
  return (length) => {
    if (length > small) return new Uint8Array(randomBytes(length))
    if (at + length > ahead) {
      randomFillSync(drawn)
      at = 0
    }
    const bytes = new Uint8Array(length)
    for (let index = 0; index < length; index++) {
      bytes[index] = drawn[at] as number
      drawn[at++] = 0
    }
    return bytes
  }
}
