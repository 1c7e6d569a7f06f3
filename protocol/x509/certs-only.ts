import { integer, explicit, oid, sequence, set } from './der.ts'
import { oids } from './oids.ts'

/** Certificates without a signature around them: the degenerate SignedData that EST answers with (RFC 5652 §5, RFC 7030 §4.1.3). DER. */
export const certsOnly = (certificates: readonly Uint8Array[]): Uint8Array =>
  sequence(oid(oids.signedData), explicit(0, sequence(integer(Uint8Array.of(1)), set(), sequence(oid(oids.data)), explicit(0, ...certificates), set())))
