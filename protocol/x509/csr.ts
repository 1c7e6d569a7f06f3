import { Problem } from '../problem.ts'
import type { KeyObject } from 'node:crypto'
import { derSignature, isCanonicalP256, p256Key, rawSignature, verifyWith } from '../signed.ts'
import { nameOf } from './certificate.ts'
import { bitString, der, inside, oid, readBits, readOid, readSmall, sequence, tags, whole } from './der.ts'
import { oids } from './oids.ts'

/** `ecdsa-with-SHA256` (RFC 5758 §3.2). */
export const ecdsaSha256: Uint8Array = sequence(oid(oids.ecdsaSha256))

/** Certification request (RFC 2986) for a P-256 key; `sign` gives a raw r‖s signature with SHA-256 over what it is handed. DER. */
export const makeCsr = async (of: {
  readonly subject: string
  readonly spki: Uint8Array
  readonly sign: (data: Uint8Array) => Promise<Uint8Array>
}): Promise<Uint8Array> => {
  const info = sequence(Uint8Array.of(tags.integer, 1, 0), nameOf(of.subject), of.spki, der(0xa0))
  return sequence(info, ecdsaSha256, bitString(derSignature(await of.sign(info))))
}

/**
 * The public key of a request whose own signature proves possession of it. Nothing else is taken: names and extensions of a certificate are
 * the profile's, never the requester's. `known`: a key that was imported already, for the case that the request is for it. Throws Problem: `malformed`, `unsupported` key, `unauthenticated` signature.
 */
export const parseCsr = (
  bytes: Uint8Array,
  known?: { readonly spki: Uint8Array; readonly object: KeyObject },
): { readonly spki: Uint8Array; readonly object: KeyObject } => {
  const outer = inside(whole(bytes, tags.sequence))
  const info = outer.next(tags.sequence)
  const algorithm = outer.enter(tags.sequence)
  const signature = readBits(outer.next(tags.bitString))
  outer.end()
  const fields = inside(info)
  if (readSmall(fields.next(tags.integer)) !== 0) throw new Problem('malformed', 'a request of another version', { reason: 'csr.version' })
  fields.next(tags.sequence)
  const spki = fields.next(tags.sequence).bytes
  fields.next(0xa0)
  fields.end()
  if (readOid(algorithm.next(tags.oid)) !== oids.ecdsaSha256)
    throw new Problem('unsupported', 'the request is not signed by ECDSA with SHA-256', { reason: 'csr.algorithm' })
  const object = known !== undefined && Buffer.compare(known.spki, spki) === 0 ? known.object : p256Key(spki)
  if (!isCanonicalP256(spki)) throw new Problem('malformed', 'the public key is not in its canonical form', { reason: 'csr.spki' })
  if (!verifyWith(object, info.bytes, rawSignature(signature)))
    throw new Problem('unauthenticated', 'the request is not signed by its own key', { reason: 'csr.signature' })
  return { spki: Uint8Array.from(spki), object }
}
