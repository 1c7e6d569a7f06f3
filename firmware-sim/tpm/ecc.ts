import { createECDH } from 'node:crypto'
import { concat } from '@fleetkey/tpm2/bytes.ts'
import { curve } from '@fleetkey/tpm2/constants.ts'
import { rc, Refusal } from './refusal.ts'

/** Arithmetic on the NIST curves where node:crypto only offers whole algorithms. A simulator: not in constant time. */
interface Curve {
  readonly name: string
  readonly size: number
  readonly prime: bigint
  /** y² = x³ - 3x + b. */
  readonly b: bigint
  readonly order: bigint
}

const curves: ReadonlyMap<number, Curve> = new Map([
  [
    curve.p256,
    {
      name: 'prime256v1',
      size: 32,
      prime: BigInt('0xffffffff00000001000000000000000000000000ffffffffffffffffffffffff'),
      b: BigInt('0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b'),
      order: BigInt('0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551'),
    },
  ],
  [
    curve.p384,
    {
      name: 'secp384r1',
      size: 48,
      prime: BigInt('0xfffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000ffffffff'),
      b: BigInt('0xb3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aef'),
      order: BigInt('0xffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973'),
    },
  ],
])

const curveOf = (id: number): Curve => {
  const found = curves.get(id)
  if (found === undefined) throw new Refusal(rc.curve)
  return found
}

export interface Coordinates {
  readonly x: Uint8Array
  readonly y: Uint8Array
}

export const big = (bytes: Uint8Array): bigint => (bytes.length === 0 ? 0n : BigInt(`0x${Buffer.from(bytes).toString('hex')}`))
export const bytesOf = (value: bigint, length: number): Uint8Array => new Uint8Array(Buffer.from(value.toString(16).padStart(length * 2, '0'), 'hex'))
const modulo = (value: bigint, of: bigint): bigint => ((value % of) + of) % of

/** Modular inverse by the extended Euclidean algorithm. */
export const inverse = (value: bigint, of: bigint): bigint => {
  let [a, b, x, y] = [modulo(value, of), of, 1n, 0n]
  while (a > 1n) {
    const quotient = b / a
    ;[a, b, x, y] = [b - quotient * a, a, y - quotient * x, x]
  }
  return modulo(x, of)
}

/** Bytes of a coordinate of this curve. */
export const fieldSize = (id: number): number => curveOf(id).size

const field = (bytes: Uint8Array, size: number): Uint8Array => {
  let from = 0
  while (bytes.length - from > size && bytes[from] === 0) from++
  if (bytes.length - from > size) throw new Refusal(rc.eccPoint)
  return concat(new Uint8Array(size - (bytes.length - from)), bytes.subarray(from))
}

/** Scalar in [1, n-1] from wide key material (FIPS 186-5 A.2.1): 128 bits more than the order has. */
export const scalarOf = (id: number, wide: Uint8Array): Uint8Array => {
  const { order, size } = curveOf(id)
  return bytesOf((big(wide) % (order - 1n)) + 1n, size)
}

/** The public point of a scalar. Refuses with VALUE what is none. */
export const publicPoint = (id: number, scalar: Uint8Array): Coordinates => {
  const { name, size } = curveOf(id)
  const pair = createECDH(name)
  try {
    pair.setPrivateKey(field(scalar, size))
  } catch {
    throw new Refusal(rc.value)
  }
  const point = new Uint8Array(pair.getPublicKey())
  return { x: point.slice(1, 1 + size), y: point.slice(1 + size) }
}

export const isScalar = (id: number, scalar: Uint8Array): boolean => {
  const { order, size } = curveOf(id)
  return scalar.length <= size && big(scalar) > 0n && big(scalar) < order
}

/**
 * Scalar times point, both coordinates. ECDH gives x only: y follows from the x of the next multiple (Brier and Joye, "Weierstraß Elliptic Curves and Side-Channel
 * Attacks", 2002, Proposition 3, with a = -3). Refuses with ECC_POINT a point off the curve.
 */
export const multiply = (id: number, scalar: Uint8Array, of: Coordinates): Coordinates => {
  const { prime, order, b, size } = curveOf(id)
  const product = shared(id, scalar, of)
  const [x, y, x1, k] = [big(of.x), big(of.y), big(product), big(scalar)]
  // There is no next multiple: this one is the negative of the point.
  if (k === order - 1n) return { x: product, y: bytesOf(prime - y, size) }
  const next = big(shared(id, bytesOf(k + 1n, size), of))
  const twice = 2n * b + (x * x1 - 3n) * (x + x1) - next * (x - x1) ** 2n
  return { x: product, y: bytesOf(modulo(twice * inverse(2n * y, prime), prime), size) }
}

/** x coordinate of scalar times point. */
export const shared = (id: number, scalar: Uint8Array, { x, y }: Coordinates): Uint8Array => {
  const { name, size } = curveOf(id)
  const pair = createECDH(name)
  pair.setPrivateKey(field(scalar, size))
  try {
    return new Uint8Array(pair.computeSecret(concat(Uint8Array.of(4), field(x, size), field(y, size))))
  } catch {
    throw new Refusal(rc.eccPoint)
  }
}

export const isOnCurve = (id: number, point: Coordinates): boolean => {
  try {
    shared(id, Uint8Array.of(1), point)
    return true
  } catch (error) {
    if (error instanceof Refusal) return false
    throw error
  }
}

/** The x of the sum of two points; undefined when it is the point at infinity. */
const xOfSum = (id: number, one: Coordinates, other: Coordinates): bigint | undefined => {
  const { prime } = curveOf(id)
  const [x1, y1, x2, y2] = [big(one.x), big(one.y), big(other.x), big(other.y)]
  if (x1 === x2) return y1 === y2 ? big(shared(id, Uint8Array.of(2), one)) : undefined
  const slope = ((y2 - y1) * inverse(x2 - x1, prime)) % prime
  return modulo(slope * slope - x1 - x2, prime)
}

/** A digest as ECDSA takes it: its leftmost bits, as many as the order has (FIPS 186-5 §6.4.1). */
const truncated = (digest: Uint8Array, size: number): bigint => big(digest.subarray(0, size))

/** ECDSA over a digest that was made elsewhere: node hashes what it signs. `random`: for the per-signature scalar. */
export const signEcdsa = (id: number, key: Uint8Array, digest: Uint8Array, random: (length: number) => Uint8Array): { r: Uint8Array; s: Uint8Array } => {
  const { order, size } = curveOf(id)
  for (;;) {
    const k = scalarOf(id, random(size + 16))
    const r = big(publicPoint(id, k).x) % order
    const s = (inverse(big(k), order) * (truncated(digest, size) + r * big(key))) % order
    if (r !== 0n && s !== 0n) return { r: bytesOf(r, size), s: bytesOf(s, size) }
  }
}

/** Whether r, s is an ECDSA signature over this digest (FIPS 186-5 §6.4.2). Refuses with ECC_POINT a key off the curve. */
export const verifyEcdsa = (id: number, key: Coordinates, digest: Uint8Array, signature: { r: Uint8Array; s: Uint8Array }): boolean => {
  const { order, size } = curveOf(id)
  const [r, s] = [big(signature.r), big(signature.s)]
  if (r === 0n || s === 0n || r >= order || s >= order) return false
  const w = inverse(s, order)
  const u = modulo(truncated(digest, size) * w, order)
  const multiple = multiply(id, bytesOf((r * w) % order, size), key)
  const x = u === 0n ? big(multiple.x) : xOfSum(id, publicPoint(id, bytesOf(u, size)), multiple)
  return x !== undefined && x % order === r
}
