import { hash } from 'node:crypto'
import { isIP } from 'node:net'
import { ecdsaSha256 } from '@fleetkey/protocol/x509/csr.ts'
import { bitString, boolean, der, explicit, integer, namedBits, octetString, oid, sequence, tags, time } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { roleEku, type Role } from '@fleetkey/protocol/x509/roles.ts'
import type { ProfileName } from './certificate.ts'
import { distributionPoints } from './distribution-point.ts'
import { namesOf, type Profile } from './profiles.ts'
import { subjectOf } from './subject.ts'

export interface CertificateOrder {
  readonly profile: ProfileName
  /** Common name. */
  readonly subject: string
  readonly spki: Uint8Array
  /** `server-signing` only. */
  readonly role?: Role
  /** `server-tls` only: host names and addresses. */
  readonly names?: readonly string[]
}

export interface IssuerName {
  /** Name, DER. */
  readonly subject: Uint8Array
  readonly spki: Uint8Array
  /** When its own certificate ends, milliseconds since 1970: nothing it signs lasts longer. Infinity for a root that is just being made. */
  readonly until: number
  /** Where others ask about a certificate; none: certificates do not say. */
  readonly status?: StatusPlaces | undefined
}

/** Places that a certificate names for others to ask about it. */
export interface StatusPlaces {
  readonly crl: (serial: string) => string
  readonly ocsp: string
  readonly issuer: string
}

/** What is decided at issuing. `serial`: 16 bytes, hex, first bit zero. Times: milliseconds since 1970. */
export interface Issuing {
  readonly tenant: string
  readonly serial: string
  readonly notBefore: number
  readonly notAfter: number
}

/** Method 1 of RFC 7093 §2 would truncate SHA-256; so does this: the leftmost 160 bits over the SubjectPublicKeyInfo. */
export const keyIdentifier = (spki: Uint8Array): Uint8Array => Buffer.from(hash('sha256', spki, 'binary').slice(0, 20), 'latin1')

const ipBytes = (address: string): Uint8Array => {
  if (isIP(address) === 4) return Uint8Array.from(address.split('.').map(Number))
  const [head = '', tail] = address.split('::')
  const groups = (text: string | undefined): number[] => (text === undefined || text === '' ? [] : text.split(':').map((group) => Number.parseInt(group, 16)))
  const [front, back] = [groups(head), groups(tail)]
  const all = [...front, ...Array.from({ length: 8 - front.length - back.length }, () => 0), ...back]
  return Uint8Array.from(all.flatMap((group) => [group >> 8, group & 0xff]))
}

const ascii = (text: string): Uint8Array => Buffer.from(text, 'latin1')
const hostName = (name: string): Uint8Array => (isIP(name) === 0 ? der(0x82, ascii(name)) : der(0x87, ipBytes(name)))

/** Host names and addresses as requests are compared with them. */
export const hostNames = (names: readonly string[]): readonly string[] =>
  names.map((name) => (isIP(name) === 0 ? `DNS:${name}` : `IP:${Buffer.from(ipBytes(name)).toString('hex')}`))

/** GeneralNames of the certificate's subjectAltName, DER, in order. */
export const altNamesOf = (profile: Profile, order: CertificateOrder, tenant: string): readonly Uint8Array[] => {
  if ((profile.names === 'hosts') !== (order.names !== undefined)) throw new Error(`profile ${order.profile} and names`)
  if (profile.names === 'hosts') return (order.names ?? []).map(hostName)
  return namesOf(profile, { tenant, id: order.subject }).map((name) => der(name.startsWith('DNS:') ? 0x82 : 0x86, ascii(name.slice(4))))
}

const extension = (id: string, critical: boolean, value: Uint8Array): Uint8Array => sequence(oid(id), ...(critical ? [boolean(true)] : []), octetString(value))

/** OIDs of the extensions of a profile, in the order they are written, each with its critical flag. */
export const extensionsOf = ({ eku, names, status, noCheck }: Profile, issuer: Pick<IssuerName, 'status'>): ReadonlyMap<string, boolean> =>
  new Map([
    [oids.basicConstraints, true],
    [oids.keyUsage, true],
    ...(eku === null ? [] : [[oids.extKeyUsage, false] as const]),
    ...(names === null ? [] : [[oids.subjectAltName, false] as const]),
    [oids.subjectKeyIdentifier, false],
    [oids.authorityKeyIdentifier, false],
    ...(noCheck === true ? [[oids.ocspNoCheck, false] as const] : []),
    ...(status === true && issuer.status !== undefined ? [[oids.crlDistributionPoints, false] as const, [oids.authorityInfoAccess, false] as const] : []),
  ])

/** What is the same in every certificate of a profile: basic constraints, key usage and (but for roles) extended key usage. */
const fixedParts = new WeakMap<Profile, Uint8Array>()
const fixedOf = (profile: Profile): Uint8Array => {
  const known = fixedParts.get(profile)
  if (known !== undefined) return known
  const { usages, ca, eku, purposes } = profile
  const made = Buffer.concat([
    extension(oids.basicConstraints, true, ca === null ? sequence() : sequence(boolean(true), integer(Uint8Array.of(ca)))),
    extension(oids.keyUsage, true, namedBits(usages.map((usage) => keyUsages[usage]))),
    ...(eku === null || eku === 'role' ? [] : [extension(oids.extKeyUsage, false, sequence(oid(eku), ...purposes.map(oid)))]),
  ])
  fixedParts.set(profile, made)
  return made
}

const issuerKeys = new WeakMap<IssuerName, Uint8Array>()
/** Key identifier of the issuer, computed once. */
export const issuerKeyIdentifier = (issuer: IssuerName): Uint8Array => {
  const known = issuerKeys.get(issuer)
  if (known !== undefined) return known
  const made = keyIdentifier(issuer.spki)
  issuerKeys.set(issuer, made)
  return made
}

const issuerParts = new WeakMap<IssuerName, Uint8Array>()
const authorityOf = (issuer: IssuerName): Uint8Array => {
  const known = issuerParts.get(issuer)
  if (known !== undefined) return known
  const made = extension(oids.authorityKeyIdentifier, false, sequence(der(0x80, issuerKeyIdentifier(issuer))))
  issuerParts.set(issuer, made)
  return made
}

/** Values of the extensions that say where others ask about the certificate (RFC 5280 §4.2.1.13, §4.2.2.1). */
export const statusValues = (places: StatusPlaces, serial: string): { readonly crl: Uint8Array; readonly access: Uint8Array } => {
  const place = (method: string, uri: string): Uint8Array => sequence(oid(method), der(0x86, ascii(uri)))
  return { crl: distributionPoints(places.crl(serial)), access: sequence(place(oids.ocsp, places.ocsp), place(oids.caIssuers, places.issuer)) }
}

/** Value of id-pkix-ocsp-nocheck (RFC 6960 §4.2.2.2.1). */
export const noCheckValue: Uint8Array = Uint8Array.of(tags.null, 0)

const statusBytes = (profile: Profile, issuer: IssuerName, serial: string): readonly Uint8Array[] => {
  if (profile.status !== true || issuer.status === undefined) return []
  const { crl, access } = statusValues(issuer.status, serial)
  return [extension(oids.crlDistributionPoints, false, crl), extension(oids.authorityInfoAccess, false, access)]
}

const version3 = explicit(0, Uint8Array.of(tags.integer, 1, 2))
const subjectKey = extension(oids.subjectKeyIdentifier, false, octetString(new Uint8Array(20))).subarray(0, -20)

const extensionBytes = (profile: Profile, order: CertificateOrder, issuer: IssuerName, { tenant, serial }: Issuing): Uint8Array => {
  if ((profile.eku === 'role') !== (order.role !== undefined)) throw new Error(`profile ${order.profile} and role ${String(order.role)}`)
  const names = altNamesOf(profile, order, tenant)
  return explicit(
    3,
    sequence(
      fixedOf(profile),
      ...(order.role === undefined ? [] : [extension(oids.extKeyUsage, false, sequence(oid(roleEku[order.role])))]),
      ...(names.length === 0 ? [] : [extension(oids.subjectAltName, false, sequence(...names))]),
      subjectKey,
      keyIdentifier(order.spki),
      authorityOf(issuer),
      ...(profile.noCheck === true ? [extension(oids.ocspNoCheck, false, noCheckValue)] : []),
      ...statusBytes(profile, issuer, serial),
    ),
  )
}

/** TBSCertificate (RFC 5280 §4.1.2): what the issuer signs with ECDSA and SHA-256. */
export const tbsOf = (profile: Profile, order: CertificateOrder, issuer: IssuerName, of: Issuing): Uint8Array =>
  sequence(
    version3,
    integer(Buffer.from(of.serial, 'hex')),
    ecdsaSha256,
    issuer.subject,
    sequence(time(of.notBefore), time(of.notAfter)),
    subjectOf(profile.attributes, order.subject),
    order.spki,
    extensionBytes(profile, order, issuer, of),
  )

/** AlgorithmIdentifier outside of the TBSCertificate. */
export const signatureAlgorithm = ecdsaSha256

/** The certificate of a TBSCertificate and its DER signature. */
export const certificateOf = (tbs: Uint8Array, signature: Uint8Array): Uint8Array => sequence(tbs, signatureAlgorithm, bitString(signature))

/**
 * Serial of 16 bytes, hex: `4`, then the second of `now` (32 bits), then random digits: 92 bits from a CSPRNG (CA/B BR §7.1 asks for 64). What is issued together lies
 * together in every index by serial; of a serial that is random throughout, each index has another page to read and write for each certificate. The third digit is
 * random: it names the distribution point (ca/revocation-list.ts). The time tells nobody anything that the certificate's own dates do not.
 */
export const serialOf = (random: Uint8Array, now: number): string => {
  const digits = Buffer.from(random.buffer, random.byteOffset, random.length).toString('hex')
  const second = (Math.floor(now / 1000) >>> 0).toString(16).padStart(8, '0')
  return `4${second[0] ?? ''}${digits[0] ?? ''}${second.slice(1)}${digits.slice(1, 23)}`
}
