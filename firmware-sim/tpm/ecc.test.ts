import { createHash, generateKeyPairSync, randomBytes, sign, verify } from 'node:crypto'
import { curve } from '@fleetkey/tpm2/constants.ts'
import { describe, expect, it } from 'vitest'
import { big, bytesOf, multiply, publicPoint, scalarOf, signEcdsa, verifyEcdsa, type Coordinates } from './ecc.ts'
import { Refusal } from './refusal.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const orders = {
  p256: BigInt('0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551'),
  p384: BigInt('0xffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973'),
}

describe.each([
  { name: 'P-256', id: curve.p256, order: orders.p256, size: 32, namedCurve: 'prime256v1', hash: 'sha256' },
  { name: 'P-384', id: curve.p384, order: orders.p384, size: 48, namedCurve: 'secp384r1', hash: 'sha384' },
])('$name', ({ id, order, size, namedCurve, hash }) => {
  const scalar = (): bigint => big(scalarOf(id, random(size + 16)))
  const point = (k: bigint): Coordinates => publicPoint(id, bytesOf(k, size))
  const hashed = (data: Uint8Array): Uint8Array => createHash(hash).update(data).digest()

  /** k·(d·G) is (kd)·G, whose both coordinates OpenSSL gives. */
  it('multiplies points', () => {
    const edges = [1n, 2n, 3n, order - 3n, order - 2n, order - 1n]
    const cases = [
      ...edges.flatMap((k) => [1n, 2n, order - 1n, scalar()].map((d) => [k, d] as const)),
      ...Array.from({ length: 50 }, () => [scalar(), scalar()] as const),
    ]
    for (const [k, d] of cases) expect(multiply(id, bytesOf(k, size), point(d)), `${k} × ${d}`).toEqual(point((k * d) % order))
  })

  it('refuses a point off the curve', () => {
    const { x, y } = point(scalar())
    expect(() => multiply(id, bytesOf(2n, size), { x, y: y.map((byte, at) => (at === 5 ? byte ^ 1 : byte)) })).toThrow(Refusal)
  })

  it('signs what OpenSSL verifies, and verifies what OpenSSL signs', () => {
    for (let round = 0; round < 20; round++) {
      const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve })
      const { x = '', y = '', d = '' } = privateKey.export({ format: 'jwk' })
      const [key, secret] = [{ x: Buffer.from(x, 'base64url'), y: Buffer.from(y, 'base64url') }, Buffer.from(d, 'base64url')]
      const data = random(40)
      const ours = signEcdsa(id, secret, hashed(data), random)
      expect(verify(hash, data, { key: publicKey, dsaEncoding: 'ieee-p1363' }, Buffer.concat([ours.r, ours.s]))).toBe(true)
      const theirs = sign(hash, data, { key: privateKey, dsaEncoding: 'ieee-p1363' })
      const signature = { r: theirs.subarray(0, size), s: theirs.subarray(size) }
      expect(verifyEcdsa(id, key, hashed(data), signature)).toBe(true)
      expect(verifyEcdsa(id, key, hashed(random(40)), signature)).toBe(false)
      expect(verifyEcdsa(id, key, hashed(data), { r: signature.s, s: signature.r })).toBe(false)
    }
  })

  /** Where both summands are one point, are opposite, or one is missing. */
  it('verifies where the sum of points is a special case', () => {
    const d = scalar()
    const key = point(d)
    const digestOf = (z: bigint): Uint8Array => bytesOf(z, size)
    // s such that u·G + v·(d·G) = k·G, for a chosen z.
    const signed = (k: bigint, z: bigint): { r: Uint8Array; s: Uint8Array } => {
      const r = big(point(k).x) % order
      let inverse = 1n
      for (let [base, exponent] = [k, order - 2n]; exponent > 0n; base = (base * base) % order, exponent >>= 1n)
        if (exponent & 1n) inverse = (inverse * base) % order
      return { r: bytesOf(r, size), s: bytesOf((inverse * (z + r * d)) % order, size) }
    }
    const k = scalar()
    const r = big(point(k).x) % order
    for (const z of [0n, (r * d) % order]) expect(verifyEcdsa(id, key, digestOf(z), signed(k, z))).toBe(true)
    // u·G = -v·(d·G): the sum is the point at infinity, whatever s.
    expect(verifyEcdsa(id, key, digestOf(order - ((r * d) % order)), { r: bytesOf(r, size), s: bytesOf(scalar(), size) })).toBe(false)
    for (const wrong of [0n, order]) {
      expect(verifyEcdsa(id, key, digestOf(1n), { r: bytesOf(wrong, size), s: bytesOf(1n, size) })).toBe(false)
      expect(verifyEcdsa(id, key, digestOf(1n), { r: bytesOf(1n, size), s: bytesOf(wrong, size) })).toBe(false)
    }
  })
})
