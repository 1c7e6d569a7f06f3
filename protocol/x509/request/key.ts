import { verify, type KeyObject } from 'node:crypto'
import { coordinateSize, isPoint, isScalar, type CurveName } from '../../curves.ts'
import { inside, readOid, readUnsigned, tags, whole } from '../der.ts'
import { oids } from '../oids.ts'
import { refuseRequest } from './reasons.ts'
import { refuseRsa } from './rsa.ts'
import { understood, type RequestStructure } from './structure.ts'

/** Kinds of keys that profiles may admit. */
export const keyKinds = ['p256', 'p384'] as const satisfies readonly CurveName[]
export type KeyKind = (typeof keyKinds)[number]

const curves: Readonly<Record<string, KeyKind>> = { [oids.p256]: 'p256', [oids.p384]: 'p384' }
const hashes = { p256: 'sha256', p384: 'sha384' } as const
const signatures = { p256: oids.ecdsaSha256, p384: oids.ecdsaSha384 } as const
/** ECDSA, RSA and DSA with SHA-1 or MD5. */
const oldHashes: ReadonlySet<string> = new Set(['1.2.840.10045.4.1', '1.2.840.113549.1.1.4', '1.2.840.113549.1.1.5', '1.2.840.10040.4.3'])
/** X25519, X448 (RFC 8410), ML-KEM-512, -768, -1024 (RFC 9935). */
const agreements: ReadonlySet<string> = new Set(['1.3.101.110', '1.3.101.111', '2.16.840.1.101.3.4.4.1', '2.16.840.1.101.3.4.4.2', '2.16.840.1.101.3.4.4.3'])

/** A public key of an admitted kind, its bytes in the one encoding that we take. */
export interface AdmittedKey {
  readonly spki: Uint8Array
  readonly kind: KeyKind
}

/**
 * The key of a SubjectPublicKeyInfo (DER): named curve, uncompressed point on it, of an admitted kind. Throws Problem with a reason of `requestReasons`;
 * a key that is refused for being RSA is told what else is wrong with it.
 */
export const readKey = (spki: Uint8Array, admitted: readonly KeyKind[]): AdmittedKey => {
  const { oid, curve, explicit, unused, bits } = understood(() => {
    const fields = inside(whole(spki, tags.sequence))
    const algorithm = fields.enter(tags.sequence)
    const key = fields.next(tags.bitString)
    fields.end()
    const of = readOid(algorithm.next(tags.oid))
    const parameters = algorithm.done ? undefined : algorithm.next()
    algorithm.end()
    const named = parameters?.tag === tags.oid ? readOid(parameters) : undefined
    const { content } = key
    return { oid: of, curve: named, explicit: parameters?.tag === tags.sequence, unused: content[0] ?? 0, bits: content.subarray(1) }
  }, 'csr.key.encoding')
  if (unused !== 0) refuseRequest('csr.key.bits', `${unused} unused bits`)
  if (oid === oids.rsaEncryption) return refuseRsa(bits)
  if (agreements.has(oid)) refuseRequest('csr.key.agreement', `key algorithm ${oid}`)
  if (oid !== oids.ecPublicKey) refuseRequest('csr.key.algorithm', `key algorithm ${oid}`)
  if (explicit) refuseRequest('csr.ec.explicit')
  if (curve === undefined) return refuseRequest('csr.key.encoding', 'an EC key without a named curve')
  const kind = Object.hasOwn(curves, curve) ? curves[curve] : undefined
  if (kind === undefined || !admitted.includes(kind)) return refuseRequest('csr.key.curve', `curve ${kind ?? curve}`)
  checkPoint(kind, bits)
  return { spki, kind }
}

const checkPoint = (kind: KeyKind, bits: Uint8Array): void => {
  const form = bits[0] ?? -1
  const size = coordinateSize(kind)
  if (form === 0 && bits.length === 1) refuseRequest('csr.ec.infinity')
  if (((form === 2 || form === 3) && bits.length === 1 + size) || ((form === 6 || form === 7) && bits.length === 1 + 2 * size))
    refuseRequest('csr.ec.compressed')
  if (form !== 4 || bits.length !== 1 + 2 * size) refuseRequest('csr.key.encoding', 'no point of its curve')
  if (!isPoint(kind, { x: bits.subarray(1, 1 + size), y: bits.subarray(1 + size) })) refuseRequest('csr.ec.off-curve')
}

const checkSignature = (kind: KeyKind, signature: Uint8Array): void => {
  const [r, s] = understood(() => {
    const reader = inside(whole(signature, tags.sequence))
    const numbers = [readUnsigned(reader.next(tags.integer)), readUnsigned(reader.next(tags.integer))] as const
    reader.end()
    return numbers
  }, 'csr.signature.encoding')
  if (r.length > 1 + coordinateSize(kind) || s.length > 1 + coordinateSize(kind)) refuseRequest('csr.signature.range')
  if (!isScalar(kind, r) || !isScalar(kind, s)) refuseRequest('csr.signature.range')
}

/** Proof of possession (RFC 2986 §3): the request is signed by its own key, in the algorithm of that key. `known`: that key, where it was imported already. */
export const checkPossession = (
  { info, signature, signatureAlgorithm: { oid, parameters } }: RequestStructure,
  { spki, kind }: AdmittedKey,
  known?: KeyObject,
): void => {
  if (oldHashes.has(oid)) refuseRequest('csr.signature.hash', `signature algorithm ${oid}`)
  if (oid !== signatures[kind]) refuseRequest('csr.signature.algorithm', `signature algorithm ${oid} with a key on ${kind}`)
  if (parameters) refuseRequest('csr.signature.parameters')
  checkSignature(kind, signature)
  // A key object for one verification would be garbage with a part outside of the heap.
  const key =
    known === undefined ? { key: Buffer.from(spki.buffer, spki.byteOffset, spki.length), format: 'der' as const, type: 'spki' as const } : { key: known }
  if (!verify(hashes[kind], info, { ...key, dsaEncoding: 'der' }, signature)) refuseRequest('csr.signature')
}
