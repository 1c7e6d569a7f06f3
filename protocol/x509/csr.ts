import { derSignature } from '../signed.ts'
import { nameOf } from './certificate.ts'
import { bitString, der, oid, sequence, tags } from './der.ts'
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
