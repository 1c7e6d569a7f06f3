import { createPublicKey, type KeyObject } from 'node:crypto'
import { Problem } from '../problem.ts'
import { checkDer, inside, oid, readBits, tags, whole, type Element } from './der.ts'
import { oids } from './oids.ts'

const ecPublicKey = oid(oids.ecPublicKey)
const p256Prefix = Buffer.from('3059301306072a8648ce3d020106082a8648ce3d03010703420004', 'hex')

/** Whether this is the one canonical SubjectPublicKeyInfo of a P-256 key: named curve, uncompressed point (RFC 5480 §2). */
export const isCanonicalP256 = (spki: Uint8Array): boolean => spki.length === 91 && p256Prefix.equals(spki.subarray(0, 27))

/**
 * Refuses a SubjectPublicKeyInfo of an elliptic curve that describes its curve instead of naming it (RFC 5480 §2.1.1: namedCurve only). OpenSSL imports one and
 * writes it out under the name of the curve it resembles, so that nothing later would tell; whoever chooses the generator chooses a private key for any
 * point (CVE-2020-0601). Throws Problem('malformed').
 */
export const refuseExplicitCurve = (spki: Element): void => {
  const algorithm = inside(spki).enter(tags.sequence)
  if (Buffer.compare(algorithm.next(tags.oid).bytes, ecPublicKey) === 0 && algorithm.peek() !== tags.oid)
    throw new Problem('malformed', 'an EC key that does not name its curve', { reason: 'key.explicit-curve' })
}

const checkForm = (spki: Uint8Array): void => {
  checkDer(spki, 8)
  const element = whole(spki, tags.sequence)
  const fields = inside(element)
  const algorithm = fields.enter(tags.sequence)
  algorithm.next(tags.oid)
  if (!algorithm.done) algorithm.next()
  algorithm.end()
  readBits(fields.next(tags.bitString))
  fields.end()
  refuseExplicitCurve(element)
}

/** Imports a SubjectPublicKeyInfo that somebody else made; strict DER, of which OpenSSL asks less, and `refuseExplicitCurve` holds. Throws Problem('malformed'). */
export const importSpki = (spki: Uint8Array): KeyObject => {
  if (!isCanonicalP256(spki)) checkForm(spki)
  try {
    return createPublicKey({ key: Buffer.from(spki), format: 'der', type: 'spki' })
  } catch (cause) {
    throw new Problem('malformed', 'not a SubjectPublicKeyInfo', { reason: 'key.spki', cause })
  }
}
