import { createECDH, createPrivateKey, sign, type KeyObject } from 'node:crypto'
import { marshalSignature } from '@fleetkey/tpm2/attest.ts'
import { concat, empty, Reader, sameBytes, sized, TpmFormatError, u16 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, curve } from '@fleetkey/tpm2/constants.ts'
import { outerWrap } from '@fleetkey/tpm2/credential.ts'
import { cfbDecrypt, digest, hashName, hmac, kdfA, kdfE } from '@fleetkey/tpm2/kdf.ts'
import { nameOf, qualifiedName } from '@fleetkey/tpm2/names.ts'
import { sameMac } from '@fleetkey/tpm2/session.ts'
import { keyObjectOf, marshalPublic, type EccPublic, type Public } from '@fleetkey/tpm2/structures.ts'
import { parameter, rc, Refusal } from './refusal.ts'

/** What an object keeps to itself (TPMT_SENSITIVE): private scalar, HMAC key or sealed data; `seed` obfuscates, or protects children. */
export interface Sensitive {
  readonly auth: Uint8Array
  readonly seed: Uint8Array
  readonly secret: Uint8Array
}

/** A loaded object; `sensitive` null when only its public area was loaded. */
export interface TpmObject {
  readonly kind: 'object'
  readonly public: Public
  readonly bytes: Uint8Array
  readonly name: Uint8Array
  readonly qualifiedName: Uint8Array
  readonly hierarchy: number
  readonly sensitive: Sensitive | null
}

/** An HMAC under way. */
export interface Sequence {
  readonly kind: 'sequence'
  readonly auth: Uint8Array
  readonly key: Uint8Array
  readonly parts: Uint8Array[]
}

const field = (bytes: Uint8Array): Uint8Array => concat(new Uint8Array(32 - bytes.length), bytes)
const order = BigInt('0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551')

/** Scalar in [1, n-1] from wide key material (FIPS 186-5 A.2.1). */
const scalarOf = (wide: Uint8Array): Uint8Array =>
  new Uint8Array(Buffer.from(((BigInt(`0x${Buffer.from(wide).toString('hex')}`) % (order - 1n)) + 1n).toString(16).padStart(64, '0'), 'hex'))

const publicPoint = (scalar: Uint8Array): { x: Uint8Array; y: Uint8Array } => {
  const pair = createECDH('prime256v1')
  pair.setPrivateKey(scalar)
  const point = new Uint8Array(pair.getPublicKey())
  return { x: point.slice(1, 33), y: point.slice(33) }
}

export const has = (object: { readonly public: Public }, bit: number): boolean => (object.public.attributes & bit) !== 0
export const isParent = (object: TpmObject): boolean =>
  has(object, attribute.restricted) && has(object, attribute.decrypt) && object.public.type === alg.ecc && object.sensitive !== null

/** Attributes that contradict each other or the template (Part 1 §27). */
const checkTemplate = (template: Public, hasData: boolean): void => {
  const bit = (one: number): boolean => (template.attributes & one) !== 0
  if (template.nameAlg !== alg.sha256) throw parameter(2, rc.hash)
  if (bit(attribute.restricted) && bit(attribute.sign) === bit(attribute.decrypt)) throw parameter(2, rc.attributes)
  if (bit(attribute.fixedTPM) && !bit(attribute.fixedParent)) throw parameter(2, rc.attributes)
  if (template.type === alg.keyedhash) {
    if (bit(attribute.sensitiveDataOrigin) === hasData) throw parameter(2, rc.attributes)
    if (!hasData && template.scheme === null) throw parameter(2, rc.attributes)
    return
  }
  if (!bit(attribute.sensitiveDataOrigin) || hasData) throw parameter(2, rc.attributes)
  if (template.type !== alg.ecc) throw parameter(2, rc.asymmetric)
  if (template.curve !== curve.p256) throw parameter(2, rc.value)
  const storage = bit(attribute.restricted) && bit(attribute.decrypt)
  if (storage !== (template.symmetric !== null)) throw parameter(2, rc.symmetric)
}

/** Makes an object from its template; `wide` gives as much key material as asked, deterministic for primaries, random for children. */
export const makeObject = (
  template: Public,
  auth: Uint8Array,
  data: Uint8Array,
  wide: (label: string, length: number) => Uint8Array,
): { public: Public; sensitive: Sensitive } => {
  checkTemplate(template, data.length > 0)
  const seed = wide('SEED', 32)
  if (template.type === alg.keyedhash) {
    if (data.length > 128) throw parameter(1, rc.size)
    const secret = data.length > 0 ? data.slice() : wide('KEY', 32)
    return { public: { ...template, unique: digest(alg.sha256, seed, secret) }, sensitive: { auth, seed, secret } }
  }
  const secret = scalarOf(wide('SCALAR', 48))
  const key = template as EccPublic
  // Only a parent's seed is used; other asymmetric keys have none.
  const parent = (template.attributes & attribute.restricted) !== 0 && (template.attributes & attribute.decrypt) !== 0
  return { public: { ...key, ...publicPoint(secret) }, sensitive: { auth, seed: parent ? seed : empty, secret } }
}

export const loaded = (key: Public, sensitive: Sensitive | null, above: Uint8Array | number, hierarchy: number): TpmObject => {
  const bytes = marshalPublic(key)
  const name = nameOf(bytes)
  return { kind: 'object', public: key, bytes, name, qualifiedName: qualifiedName(above, name), hierarchy, sensitive }
}

/** TPMT_SENSITIVE bytes. */
const marshalSensitive = (type: number, of: Sensitive): Uint8Array => concat(u16(type), sized(of.auth), sized(of.seed), sized(of.secret))

/** Reads a sensitive area and checks that it belongs to this public area (Part 1 §27.5). */
const readSensitive = (bytes: Uint8Array, key: Public): Sensitive => {
  const reader = new Reader(bytes)
  if (reader.u16() !== key.type) throw new Refusal(rc.sensitive)
  const sensitive = { auth: reader.sized(64).slice(), seed: reader.sized(64).slice(), secret: reader.sized(256).slice() }
  reader.end()
  if (key.type === alg.keyedhash && !sameBytes(key.unique, digest(alg.sha256, sensitive.seed, sensitive.secret))) throw parameter(2, rc.binding)
  if (key.type === alg.ecc) {
    const { x, y } = publicPoint(sensitive.secret)
    if (!sameBytes(x, field(key.x)) || !sameBytes(y, field(key.y))) throw parameter(2, rc.binding)
  }
  return sensitive
}

/** TPM2B_PRIVATE content of an object below `parent` (Part 1 §23.4). */
export const wrapPrivate = (parent: TpmObject, key: Public, sensitive: Sensitive): Uint8Array =>
  outerWrap(parent.bytes, parent.sensitive?.seed ?? empty, nameOf(marshalPublic(key)), sized(marshalSensitive(key.type, sensitive)))

/** The inverse of `outerWrap`; `fault` when the integrity value does not verify. */
export const outerUnwrap = (parent: Public, seed: Uint8Array, name: Uint8Array, wrapped: Uint8Array, fault: Refusal): Uint8Array => {
  const reader = new Reader(wrapped)
  const mac = reader.sized(64)
  const encrypted = reader.rest()
  const macKey = kdfA(parent.nameAlg, seed, 'INTEGRITY', empty, empty, hashName(parent.nameAlg).size * 8)
  if (!sameMac(mac, hmac(parent.nameAlg, macKey, encrypted, name))) throw fault
  return cfbDecrypt(kdfA(parent.nameAlg, seed, 'STORAGE', name, empty, 128), encrypted)
}

export const unwrapPrivate = (parent: TpmObject, key: Public, wrapped: Uint8Array): Sensitive => {
  const plain = new Reader(outerUnwrap(parent.public, parent.sensitive?.seed ?? empty, nameOf(marshalPublic(key)), wrapped, parameter(1, rc.integrity)))
  return readSensitive(plain.sized(1024), key)
}

/** Seed that another shared with this key (Part 1 Annex C.6.3). */
export const receiveSeed = (object: TpmObject, secret: Uint8Array, label: string, fault: Refusal): Uint8Array => {
  const point = new Reader(secret)
  const [x, y] = [point.sized(32), point.sized(32)]
  point.end()
  const key = object.public
  if (key.type !== alg.ecc || object.sensitive === null) throw fault
  return kdfE(key.nameAlg, multiply(object, x, y, fault).x, label, field(x), field(key.x), 256)
}

/** Private key times point. */
export const multiply = (object: TpmObject, x: Uint8Array, y: Uint8Array, fault: Refusal): { x: Uint8Array; y: Uint8Array } => {
  if (object.sensitive === null) throw fault
  const pair = createECDH('prime256v1')
  pair.setPrivateKey(object.sensitive.secret)
  try {
    return { x: new Uint8Array(pair.computeSecret(concat(Uint8Array.of(4), field(x), field(y)))), y: new Uint8Array(32) }
  } catch {
    throw fault
  }
}

/** Opens a duplicate with its inner and outer wrapper (Part 1 §23.3.2). */
export const openDuplicate = (parent: TpmObject, of: { key: Public; duplicate: Uint8Array; seed: Uint8Array; innerKey: Uint8Array | null }): Sensitive => {
  const name = nameOf(marshalPublic(of.key))
  const inner =
    of.seed.length === 0
      ? of.duplicate
      : outerUnwrap(parent.public, receiveSeed(parent, of.seed, 'DUPLICATE', parameter(4, rc.eccPoint)), name, of.duplicate, parameter(3, rc.integrity))
  try {
    if (of.innerKey === null) return readSensitive(new Reader(inner).sized(1024), of.key)
    const plain = new Reader(cfbDecrypt(of.innerKey, inner))
    const integrity = plain.sized(64)
    const rest = plain.rest()
    if (!sameBytes(integrity, digest(of.key.nameAlg, rest, name))) throw parameter(3, rc.integrity)
    return readSensitive(new Reader(rest).sized(1024), of.key)
  } catch (error) {
    if (error instanceof TpmFormatError) throw parameter(3, rc.size)
    throw error
  }
}

const privateKeys = new WeakMap<TpmObject, KeyObject>()

const privateKeyOf = (object: TpmObject): KeyObject => {
  const known = privateKeys.get(object)
  if (known !== undefined) return known
  const key = object.public
  if (key.type !== alg.ecc || object.sensitive === null) throw new Refusal(rc.key)
  const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64url')
  const made = createPrivateKey({
    key: { kty: 'EC', crv: 'P-256', x: text(field(key.x)), y: text(field(key.y)), d: text(object.sensitive.secret) },
    format: 'jwk',
  })
  privateKeys.set(object, made)
  return made
}

/** TPMT_SIGNATURE with ECDSA and SHA-256 over what node hashes itself. */
export const signData = (object: TpmObject, data: Uint8Array): Uint8Array => {
  const raw = new Uint8Array(sign('sha256', data, { key: privateKeyOf(object), dsaEncoding: 'ieee-p1363' }))
  return marshalSignature({ scheme: alg.ecdsa, hash: alg.sha256, r: raw.subarray(0, 32), s: raw.subarray(32) })
}

/** The same over a digest that was made elsewhere: ECDSA by hand, since node hashes what it signs. `random`: for the per-signature scalar. */
export const signDigest = (object: TpmObject, digestBytes: Uint8Array, random: (length: number) => Uint8Array): Uint8Array => {
  if (object.sensitive === null) throw new Refusal(rc.key)
  const bytes = (value: bigint): Uint8Array => new Uint8Array(Buffer.from(value.toString(16).padStart(64, '0'), 'hex'))
  for (;;) {
    const k = scalarOf(random(48))
    const r = big(publicPoint(k).x) % order
    const s = (inverse(big(k), order) * (big(digestBytes.subarray(0, 32)) + r * big(object.sensitive.secret))) % order
    if (r !== 0n && s !== 0n) return marshalSignature({ scheme: alg.ecdsa, hash: alg.sha256, r: bytes(r), s: bytes(s) })
  }
}

const big = (bytes: Uint8Array): bigint => BigInt(`0x${Buffer.from(bytes).toString('hex')}`)
const modulo = (value: bigint, of: bigint): bigint => ((value % of) + of) % of

/** Modular inverse by the extended Euclidean algorithm. A simulator: not in constant time. */
const inverse = (value: bigint, of: bigint): bigint => {
  let [a, b, x, y] = [modulo(value, of), of, 1n, 0n]
  while (a > 1n) {
    const quotient = b / a
    ;[a, b, x, y] = [b - quotient * a, a, y - quotient * x, x]
  }
  return modulo(x, of)
}

const prime = BigInt('0xffffffff00000001000000000000000000000000ffffffffffffffffffffffff')
type Point = { readonly x: bigint; readonly y: bigint } | null

/** Affine addition on P-256; null is the point at infinity. */
const add = (p: Point, q: Point): Point => {
  if (p === null) return q
  if (q === null) return p
  if (p.x === q.x && (p.y + q.y) % prime === 0n) return null
  const slope = p.x === q.x ? (3n * p.x * p.x - 3n) * inverse(2n * p.y, prime) : (q.y - p.y) * inverse(q.x - p.x, prime)
  const x = modulo(slope * slope - p.x - q.x, prime)
  return { x, y: modulo(slope * (p.x - x) - p.y, prime) }
}

const times = (scalar: bigint, point: Point): Point => {
  let sum: Point = null
  for (let left = scalar, power = point; left > 0n; left >>= 1n, power = add(power, power)) if ((left & 1n) === 1n) sum = add(sum, power)
  return sum
}

const pointOfBytes = ({ x, y }: { x: Uint8Array; y: Uint8Array }): Point => ({ x: big(x), y: big(y) })

/** ECDSA over a digest that was made elsewhere (FIPS 186-5 §6.4.2): node hashes what it verifies. */
export const verifyDigest = (object: TpmObject, digestBytes: Uint8Array, raw: Uint8Array): boolean => {
  const key = object.public
  if (key.type !== alg.ecc) return false
  // Throws for a point that is not on the curve.
  keyObjectOf(key)
  const [r, s] = [big(raw.subarray(0, 32)), big(raw.subarray(32))]
  if (r === 0n || s === 0n || r >= order || s >= order) return false
  const w = inverse(s, order)
  const generator = pointOfBytes(publicPoint(Uint8Array.from([...new Uint8Array(31), 1])))
  const sum = add(times((big(digestBytes) * w) % order, generator), times((r * w) % order, pointOfBytes(key)))
  return sum !== null && sum.x % order === r
}
