import { curve } from '@fleetkey/tpm2/constants.ts'
import type { EccPublic } from '@fleetkey/tpm2/structures.ts'

interface Curve {
  readonly p: bigint
  readonly b: bigint
}

/** y² = x³ − 3x + b over the field of p elements (FIPS 186-4 §D.1.2). */
const curves: ReadonlyMap<number, Curve> = new Map([
  [
    curve.p256,
    {
      p: 0xffffffff00000001000000000000000000000000ffffffffffffffffffffffffn,
      b: 0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604bn,
    },
  ],
  [
    curve.p384,
    {
      p: 0xfffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffeffffffff0000000000000000ffffffffn,
      b: 0xb3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aefn,
    },
  ],
])

const numberOf = (bytes: Uint8Array): bigint => BigInt(`0x${Buffer.from(bytes).toString('hex') || '0'}`)

/** Whether the point of a P-256 or P-384 key lies on its curve; both have cofactor 1, so that it is then in the right group (SP 800-56A §5.6.2.3.3). */
export const isOnCurve = (key: Pick<EccPublic, 'curve' | 'x' | 'y'>): boolean => {
  const of = curves.get(key.curve)
  if (of === undefined) return false
  const [x, y] = [numberOf(key.x), numberOf(key.y)]
  return x < of.p && y < of.p && (y * y - (x * x - 3n) * x - of.b) % of.p === 0n
}
