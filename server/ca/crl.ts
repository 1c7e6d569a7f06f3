import {
  bitString,
  boolean,
  der,
  enumerated,
  explicit,
  headLength,
  integer,
  number,
  octetString,
  oid,
  sequence,
  tags,
  time,
  writeHead,
} from '@fleetkey/protocol/x509/der.ts'
import { ecdsaSha256 } from '@fleetkey/protocol/x509/csr.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { crlReasons, type CrlReason } from '@fleetkey/protocol/x509/reasons.ts'
import { distributionPoints, fullName } from './distribution-point.ts'
import { keyIdentifier, type IssuerName } from './tbs.ts'

const removeFromCrl = 8

const extension = (id: string, critical: boolean, value: Uint8Array): Uint8Array => sequence(oid(id), ...(critical ? [boolean(true)] : []), octetString(value))

/** Extensions of an entry, made once for each reason: there are many entries. `unspecified` is said by saying nothing (RFC 5280 §5.3.1). */
const reasons = new Map(
  [...Object.values(crlReasons), removeFromCrl].map((reason) => [
    reason,
    reason === crlReasons.unspecified ? new Uint8Array(0) : sequence(sequence(oid(oids.crlReason), octetString(enumerated(reason)))),
  ]),
)

const entry = (serial: string, at: number, reason: number): Uint8Array =>
  sequence(integer(Buffer.from(serial, 'hex')), time(at), reasons.get(reason) ?? new Uint8Array(0))

/** One revoked certificate on a list (RFC 5280 §5.1.2.6). `serial`: hex; `at`: milliseconds since 1970. */
export const entryOf = (serial: string, at: number, code: CrlReason): Uint8Array => entry(serial, at, crlReasons[code])

/** One certificate that is off hold, on a delta list (RFC 5280 §5.3.1, removeFromCRL). */
export const removalOf = (serial: string, at: number): Uint8Array => entry(serial, at, removeFromCrl)

/** What one list is. */
export interface ListOrder {
  /** Grows from list to list of this issuer, a delta and the complete list of its time have the same one. */
  readonly number: number
  readonly thisUpdate: number
  readonly nextUpdate: number
  /** Entries, joined. */
  readonly body: Uint8Array
  /** Number of the complete list that a delta goes with; null for a complete list. */
  readonly base: number | null
  /** The distribution point whose certificates alone it covers; null: all that the issuer has issued. */
  readonly point: string | null
  /** Where the delta to this list is. */
  readonly freshest: string | null
}

/** TBSCertList (RFC 5280 §5.1.2), version 2: what the issuer signs with ECDSA and SHA-256. */
export const tbsCertList = (issuer: Pick<IssuerName, 'subject' | 'spki'>, of: ListOrder): Uint8Array =>
  sequence(
    number(1),
    ecdsaSha256,
    issuer.subject,
    time(of.thisUpdate),
    time(of.nextUpdate),
    // An empty list is left out (RFC 5280 §5.1.2.6).
    ...(of.body.length === 0 ? [] : [sequence(of.body)]),
    explicit(
      0,
      sequence(
        extension(oids.authorityKeyIdentifier, false, sequence(der(0x80, keyIdentifier(issuer.spki)))),
        extension(oids.crlNumber, false, number(of.number)),
        ...(of.base === null ? [] : [extension(oids.deltaCrlIndicator, true, number(of.base))]),
        ...(of.point === null ? [] : [extension(oids.issuingDistributionPoint, true, sequence(explicit(0, fullName(of.point))))]),
        ...(of.freshest === null ? [] : [extension(oids.freshestCrl, false, distributionPoints(of.freshest))]),
      ),
    ),
  )

/** A TBSCertList with room around it for what makes a list of it: no list is copied once more to be signed. */
export interface UnsignedList {
  readonly room: Uint8Array
  readonly tbs: Uint8Array
}

/** Tag and length of what is the longest; algorithm and signature. */
const before = headLength(0xffff_ffff)
const behind = 128

/** `bytes`: a TBSCertList. */
export const unsignedList = (bytes: Uint8Array): UnsignedList => {
  const room = new Uint8Array(before + bytes.length + behind)
  room.set(bytes, before)
  return { room, tbs: room.subarray(before, before + bytes.length) }
}

/** The list of a TBSCertList and its DER signature, in the room of the former. */
export const certListIn = ({ room, tbs }: UnsignedList, signature: Uint8Array): Uint8Array => {
  const rest = Buffer.concat([ecdsaSha256, bitString(signature)])
  if (rest.length > behind) throw new Error(`a signature of ${signature.length} bytes`)
  const length = tbs.length + rest.length
  const start = before - headLength(length)
  writeHead(room.subarray(start), tags.sequence, length)
  room.set(rest, before + tbs.length)
  return room.subarray(start, before + length)
}
