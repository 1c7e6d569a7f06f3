import { createHash, createPublicKey, randomBytes, sign, type KeyObject } from 'node:crypto'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { ecdsaSha256 } from '@fleetkey/protocol/x509/csr.ts'
import { bitString, boolean, der, explicit, integer, namedBits, octetString, oid, sequence, tags, time } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { roleEku, type Role } from '@fleetkey/protocol/x509/roles.ts'

export interface Order {
  readonly subject: string
  readonly spki: Uint8Array
  readonly issuer: string
  /** The issuer's private key. */
  readonly key: KeyObject
  /** Path length of a CA; null for a leaf. */
  readonly ca: number | null
  readonly notBefore: number
  readonly notAfter: number
  readonly role?: Role
  /** Server certificate for 127.0.0.1. */
  readonly local?: boolean
}

const extension = (id: string, critical: boolean, value: Uint8Array): Uint8Array => sequence(oid(id), ...(critical ? [boolean(true)] : []), octetString(value))

/** 20 bytes that stand for a public key (RFC 7093 §2, method 1, over the whole SubjectPublicKeyInfo). */
const identifier = (spki: Uint8Array): Uint8Array => createHash('sha256').update(spki).digest().subarray(0, 20)

/** For tests: a certificate (RFC 5280 §4.1) as ordered, DER. */
export const testCertificate = (of: Order): Uint8Array => {
  const usage = of.ca === null ? keyUsages.digitalSignature : keyUsages.keyCertSign
  const purpose = of.role === undefined ? (of.local === true ? oids.serverAuth : undefined) : roleEku[of.role]
  const tbs = sequence(
    explicit(0, Uint8Array.of(tags.integer, 1, 2)),
    integer(Uint8Array.of(0x40, ...randomBytes(15))),
    ecdsaSha256,
    nameOf(of.issuer),
    sequence(time(of.notBefore), time(of.notAfter)),
    nameOf(of.subject),
    of.spki,
    explicit(
      3,
      sequence(
        extension(oids.basicConstraints, true, of.ca === null ? sequence() : sequence(boolean(true), integer(Uint8Array.of(of.ca)))),
        extension(oids.keyUsage, true, namedBits([usage])),
        extension(oids.subjectKeyIdentifier, false, octetString(identifier(of.spki))),
        extension(oids.authorityKeyIdentifier, false, sequence(der(0x80, identifier(createPublicKey(of.key).export({ format: 'der', type: 'spki' }))))),
        ...(purpose === undefined ? [] : [extension(oids.extKeyUsage, false, sequence(oid(purpose)))]),
        ...(of.local === true ? [extension(oids.subjectAltName, false, sequence(der(0x87, Uint8Array.of(127, 0, 0, 1))))] : []),
      ),
    ),
  )
  return new Uint8Array(sequence(tbs, ecdsaSha256, bitString(new Uint8Array(sign('sha256', tbs, of.key)))))
}
