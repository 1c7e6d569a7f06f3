interface Curve {
  readonly p: bigint
  readonly b: bigint
  /** Order of the group. */
  readonly n: bigint
  /** Bytes of a coordinate. */
  readonly size: number
}

/** y² = x³ − 3x + b over the field of p elements (SP 800-186 §3.2.1). */
const curves = {
  p256: {
    p: 0xffffffff00000001000000000000000000000000ffffffffffffffffffffffffn,
    b: 0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604bn,
    n: 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551n,
    size: 32,
  },
  p384: {
    p: 0xfffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000ffffffffn,
    b: 0xb3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aefn,
    n: 0xffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973n,
    size: 48,
  },
} as const satisfies Readonly<Record<string, Curve>>

export type CurveName = keyof typeof curves

/** Orders as bytes, big-endian, without a leading zero. */
const orders: Readonly<Record<CurveName, Uint8Array>> = {
  p256: Buffer.from(curves.p256.n.toString(16), 'hex'),
  p384: Buffer.from(curves.p384.n.toString(16), 'hex'),
}

/** Bytes of one coordinate. */
export const coordinateSize = (curve: CurveName): number => curves[curve].size

const numberOf = (bytes: Uint8Array): bigint => {
  if (bytes.length % 8 !== 0) return BigInt(`0x${Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('hex')}`)
  // Coordinates have whole words: half the price of going through text.
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  let value = 0n
  for (let at = 0; at < bytes.length; at += 8) value = (value << 64n) | view.getBigUint64(at)
  return value
}

/** Whether the point lies on the curve; both curves have cofactor 1, so that it is then in the right group (SP 800-56A §5.6.2.3.3). */
export const isPoint = (curve: CurveName, point: { readonly x: Uint8Array; readonly y: Uint8Array }): boolean => {
  const { p, b } = curves[curve]
  const [x, y] = [numberOf(point.x), numberOf(point.y)]
  return x < p && y < p && (y * y - (x * x - 3n) * x - b) % p === 0n
}

/** Whether r or s (big-endian) may stand in an ECDSA signature: from 1 to below the group's order (FIPS 186-5 §6.4.2). */
export const isScalar = (curve: CurveName, bytes: Uint8Array): boolean => {
  const { size } = curves[curve]
  let start = 0
  while (start < bytes.length && bytes[start] === 0) start++
  const length = bytes.length - start
  if (length === 0 || length > size) return false
  if (length < size) return true
  const order = orders[curve]
  for (let at = 0; at < size; at++) {
    const byte = bytes[start + at] as number
    const limit = order[at] as number
    if (byte !== limit) return byte < limit
  }
  return false
}
