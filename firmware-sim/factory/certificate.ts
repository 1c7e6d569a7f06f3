import { createHash, generateKeyPairSync, sign, type KeyObject } from 'node:crypto'
import { nameOf, parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { ecdsaSha256 } from '@fleetkey/protocol/x509/csr.ts'
import { bitString, boolean, der, explicit, integer, namedBits, octetString, oid, sequence, tags, time } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'

/** A maker's CA: P-256, self-signed. It vouches for software, so a server admits it only as a test endorsement. */
export interface MakerCa {
  readonly certificate: Uint8Array
  readonly key: KeyObject
}

export const day = 86_400_000
/** 99991231235959Z: no expiry (RFC 5280 §4.1.2.5). */
const never = Date.UTC(9999, 11, 31, 23, 59, 59)

export const extension = (id: string, critical: boolean, value: Uint8Array): Uint8Array =>
  sequence(oid(id), ...(critical ? [boolean(true)] : []), octetString(value))
const identifier = (spki: Uint8Array): Uint8Array => createHash('sha256').update(spki).digest().subarray(0, 20)

interface Issuer {
  readonly name: Uint8Array
  readonly spki: Uint8Array
  readonly key: KeyObject
}

/** What a maker's certificate says. `subject`: a Name, DER; valid from `notBefore` for ever unless `notAfter` is given. */
export interface MakerCertificate {
  readonly subject: Uint8Array
  readonly spki: Uint8Array
  readonly notBefore: number
  readonly notAfter?: number
  readonly extensions: readonly Uint8Array[]
}

const issue = (by: Issuer, of: MakerCertificate): Uint8Array => {
  const serial = createHash('sha256').update(by.spki).update(of.spki).digest().subarray(0, 16)
  serial[0] = ((serial[0] ?? 0) & 0x7f) | 0x40
  const tbs = sequence(
    explicit(0, Uint8Array.of(tags.integer, 1, 2)),
    integer(serial),
    ecdsaSha256,
    by.name,
    sequence(time(of.notBefore), time(of.notAfter ?? never)),
    of.subject,
    of.spki,
    explicit(
      3,
      sequence(
        ...of.extensions,
        extension(oids.subjectKeyIdentifier, false, octetString(identifier(of.spki))),
        extension(oids.authorityKeyIdentifier, false, sequence(der(0x80, identifier(by.spki)))),
      ),
    ),
  )
  return sequence(tbs, ecdsaSha256, bitString(sign('sha256', tbs, by.key)))
}

/** A new CA of this name. */
export const makeMakerCa = (commonName: string, now: number): MakerCa => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const name = nameOf(commonName)
  const certificate = issue(
    { name, spki, key: privateKey },
    {
      subject: name,
      spki,
      notBefore: now - day,
      extensions: [
        extension(oids.basicConstraints, true, sequence(boolean(true), integer(Uint8Array.of(0)))),
        extension(oids.keyUsage, true, namedBits([keyUsages.keyCertSign, keyUsages.crlSign])),
      ],
    },
  )
  return { certificate, key: privateKey }
}

/** A certificate by this CA. */
export const issueBy = (ca: MakerCa, of: MakerCertificate): Uint8Array => {
  const issuer = parseCertificate(ca.certificate)
  return issue({ name: issuer.subject, spki: issuer.spki, key: ca.key }, of)
}
