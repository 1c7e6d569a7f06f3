import { createECDH } from 'node:crypto'
import { concat } from '@fleetkey/tpm2/bytes.ts'
import { curve } from '@fleetkey/tpm2/constants.ts'
import { rc, Refusal } from './refusal.ts'

/** Arithmetic on the NIST curves where node:crypto only offers whole algorithms. A simulator: not in constant time. */
interface Curve {
  readonly name: string
  readonly size: number
  readonly prime: bigint
  readonly order: bigint
}

const curves: ReadonlyMap<number, Curve> = new Map([
  [
    curve.p256,
    {
      name: 'prime256v1',
      size: 32,
      prime: BigInt('0xffffffff00000001000000000000000000000000ffffffffffffffffffffffff'),
      order: BigInt('0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551'),
    },
  ],
  [
    curve.p384,
    {
      name: 'secp384r1',
      size: 48,
      prime: BigInt('0xfffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000ffffffff'),
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

/** Scalar times point, both coordinates: ECDH gives x only. Refuses with ECC_POINT a point off the curve. */
export const multiply = (id: number, scalar: Uint8Array, of: Coordinates): Coordinates => {
  const { prime, size } = curveOf(id)
  const point = affine(id, of)
  const x = shared(id, scalar, of)
  return { x, y: bytesOf(times(big(scalar), point, prime).y, size) }
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

/** Jacobian coordinates; z = 0 is the point at infinity. */
interface Jacobian {
  readonly x: bigint
  readonly y: bigint
  readonly z: bigint
}

const infinity: Jacobian = { x: 1n, y: 1n, z: 0n }
const affine = (id: number, { x, y }: Coordinates): Jacobian => {
  if (!isOnCurve(id, { x, y })) throw new Refusal(rc.eccPoint)
  return { x: big(x), y: big(y), z: 1n }
}

/** Doubling for a = -3 (dbl-2001-b). */
const double = ({ x, y, z }: Jacobian, p: bigint): Jacobian => {
  const delta = (z * z) % p
  const gamma = (y * y) % p
  const beta = (x * gamma) % p
  const alpha = (3n * (x - delta) * (x + delta)) % p
  const next = modulo(alpha * alpha - 8n * beta, p)
  return { x: next, y: modulo(alpha * (4n * beta - next) - 8n * gamma * gamma, p), z: modulo((y + z) * (y + z) - gamma - delta, p) }
}

const add = (a: Jacobian, b: Jacobian, p: bigint): Jacobian => {
  if (a.z === 0n) return b
  if (b.z === 0n) return a
  const [za, zb] = [(a.z * a.z) % p, (b.z * b.z) % p]
  const [ua, ub] = [(a.x * zb) % p, (b.x * za) % p]
  const [sa, sb] = [(a.y * b.z * zb) % p, (b.y * a.z * za) % p]
  if (ua === ub) return sa === sb ? double(a, p) : infinity
  const h = modulo(ub - ua, p)
  const r = modulo(sb - sa, p)
  const hh = (h * h) % p
  const hhh = (h * hh) % p
  const v = (ua * hh) % p
  const x = modulo(r * r - hhh - 2n * v, p)
  return { x, y: modulo(r * (v - x) - sa * hhh, p), z: (h * a.z * b.z) % p }
}

const toAffine = ({ x, y, z }: Jacobian, p: bigint): { x: bigint; y: bigint } => {
  const inverted = inverse(z, p)
  const square = (inverted * inverted) % p
  return { x: (x * square) % p, y: (y * square * inverted) % p }
}

/** u·A + v·B with one run of doublings (Shamir's trick). */
const sumOfProducts = (u: bigint, a: Jacobian, v: bigint, b: Jacobian, p: bigint): Jacobian => {
  const both = add(a, b, p)
  let sum = infinity
  for (let at = Math.max(u.toString(2).length, v.toString(2).length) - 1; at >= 0; at--) {
    sum = double(sum, p)
    const [inU, inV] = [(u >> BigInt(at)) & 1n, (v >> BigInt(at)) & 1n]
    if (inU === 1n || inV === 1n) sum = add(sum, inU === 1n && inV === 1n ? both : inU === 1n ? a : b, p)
  }
  return sum
}

const times = (scalar: bigint, point: Jacobian, p: bigint): { x: bigint; y: bigint } => toAffine(sumOfProducts(scalar, point, 0n, infinity, p), p)

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

/** Whether r, s is an ECDSA signature over this digest (FIPS 186-5 §6.4.2). */
export const verifyEcdsa = (id: number, key: Coordinates, digest: Uint8Array, signature: { r: Uint8Array; s: Uint8Array }): boolean => {
  const { order, prime, size } = curveOf(id)
  const [r, s] = [big(signature.r), big(signature.s)]
  if (r === 0n || s === 0n || r >= order || s >= order) return false
  const w = inverse(s, order)
  const generator = publicPoint(id, Uint8Array.of(1))
  const sum = sumOfProducts((truncated(digest, size) * w) % order, { x: big(generator.x), y: big(generator.y), z: 1n }, (r * w) % order, affine(id, key), prime)
  return sum.z !== 0n && toAffine(sum, prime).x % order === r
}
