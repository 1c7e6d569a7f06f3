import { createHash, createPublicKey, generateKeyPairSync } from 'node:crypto'
import { isIP } from 'node:net'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { ecdsaSha256 } from '@fleetkey/protocol/x509/csr.ts'
import { bitString, boolean, der, explicit, integer, namedBits, octetString, oid, sequence, tags, time } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { deviceIdentityEku, roleEku, type Role } from '@fleetkey/protocol/x509/roles.ts'
import { secondReading } from '@fleetkey/protocol/x509/library.ts'
import type { ProfileName } from './certificate.ts'
import { distributionPoints } from './distribution-point.ts'

const hour = 3_600_000
const day = 24 * hour

interface Profile {
  /** Milliseconds from issuing until the certificate ends. */
  readonly life: number
  readonly usages: readonly (keyof typeof keyUsages)[]
  /** OID; `role` for the one named in the order. */
  readonly eku: string | null
  /** Path length of a CA; null for end entities. */
  readonly ca: number | null
}

/** What each kind of certificate may be. Nothing in a certificate comes from a request but the public key. */
export const profiles: Readonly<Record<ProfileName, Profile>> = {
  'root-ca': { life: 20 * 365 * day, usages: ['keyCertSign', 'crlSign'], eku: null, ca: 1 },
  'issuing-ca': { life: 10 * 365 * day, usages: ['keyCertSign', 'crlSign'], eku: null, ca: 0 },
  'server-signing': { life: 2 * 365 * day, usages: ['digitalSignature'], eku: 'role', ca: null },
  'server-tls': { life: 30 * day, usages: ['digitalSignature'], eku: oids.serverAuth, ca: null },
  // No revocation status of its own (RFC 6960 §4.2.2.2.1): short-lived instead.
  'ocsp-responder': { life: 30 * day, usages: ['digitalSignature'], eku: oids.ocspSigning, ca: null },
  'device-identity': { life: 3 * 365 * day, usages: ['digitalSignature'], eku: deviceIdentityEku, ca: null },
  'device-tls': { life: 48 * hour, usages: ['digitalSignature'], eku: oids.clientAuth, ca: null },
}

/** Certificates begin a little earlier, for clocks that run behind. */
const backdate = hour

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
  /** Where others ask about a certificate; none: certificates do not say. */
  readonly status?: StatusPlaces | undefined
}

/** Places that a certificate names for others to ask about it. */
export interface StatusPlaces {
  readonly crl: (serial: string) => string
  readonly ocsp: string
  readonly issuer: string
}

export const validityOf = (profile: ProfileName, now: number): { readonly notBefore: number; readonly notAfter: number } => {
  const whole = Math.floor(now / 1000) * 1000
  return { notBefore: whole - backdate, notAfter: whole + profiles[profile].life }
}

/** Method 1 of RFC 7093 §2 would truncate SHA-256; so does this: the leftmost 160 bits over the key's bits. */
export const keyIdentifier = (spki: Uint8Array): Uint8Array => createHash('sha256').update(spki).digest().subarray(0, 20)

const ipBytes = (address: string): Uint8Array => {
  if (isIP(address) === 4) return Uint8Array.from(address.split('.').map(Number))
  const [head = '', tail] = address.split('::')
  const groups = (text: string | undefined): number[] => (text === undefined || text === '' ? [] : text.split(':').map((group) => Number.parseInt(group, 16)))
  const [front, back] = [groups(head), groups(tail)]
  const all = [...front, ...Array.from({ length: 8 - front.length - back.length }, () => 0), ...back]
  return Uint8Array.from(all.flatMap((group) => [group >> 8, group & 0xff]))
}

const generalName = (name: string): Uint8Array => (isIP(name) === 0 ? der(0x82, new TextEncoder().encode(name)) : der(0x87, ipBytes(name)))

const extension = (id: string, critical: boolean, value: Uint8Array): Uint8Array => sequence(oid(id), ...(critical ? [boolean(true)] : []), octetString(value))

/** Only long-lived certificates name them: what lives for hours is not worth a list. */
const statusExtensions = (places: StatusPlaces, serial: string): readonly Uint8Array[] => {
  const place = (method: string, uri: string): Uint8Array => sequence(oid(method), der(0x86, new TextEncoder().encode(uri)))
  return [
    extension(oids.crlDistributionPoints, false, distributionPoints(places.crl(serial))),
    extension(oids.authorityInfoAccess, false, sequence(place(oids.ocsp, places.ocsp), place(oids.caIssuers, places.issuer))),
  ]
}

const extensionsOf = (order: CertificateOrder, issuer: IssuerName, serial: string): Uint8Array => {
  const { usages, eku, ca } = profiles[order.profile]
  if ((eku === 'role') !== (order.role !== undefined)) throw new Error(`profile ${order.profile} and role ${String(order.role)}`)
  if ((order.profile === 'server-tls') !== (order.names !== undefined)) throw new Error(`profile ${order.profile} and names`)
  const purpose = order.role === undefined ? eku : roleEku[order.role]
  return explicit(
    3,
    sequence(
      extension(oids.basicConstraints, true, ca === null ? sequence() : sequence(boolean(true), integer(Uint8Array.of(ca)))),
      extension(oids.keyUsage, true, namedBits(usages.map((usage) => keyUsages[usage]))),
      ...(purpose === null ? [] : [extension(oids.extKeyUsage, false, sequence(oid(purpose)))]),
      ...(order.names === undefined ? [] : [extension(oids.subjectAltName, false, sequence(...order.names.map(generalName)))]),
      extension(oids.subjectKeyIdentifier, false, octetString(keyIdentifier(order.spki))),
      extension(oids.authorityKeyIdentifier, false, sequence(der(0x80, keyIdentifier(issuer.spki)))),
      ...(order.profile === 'ocsp-responder' ? [extension(oids.ocspNoCheck, false, Uint8Array.of(tags.null, 0))] : []),
      ...(order.profile === 'device-identity' && issuer.status !== undefined ? statusExtensions(issuer.status, serial) : []),
    ),
  )
}

/** TBSCertificate (RFC 5280 §4.1.2): what the issuer signs with ECDSA and SHA-256. `serial`: 16 bytes, hex, first bit zero. */
export const tbsOf = (order: CertificateOrder, issuer: IssuerName, of: { serial: string; notBefore: number; notAfter: number }): Uint8Array =>
  sequence(
    explicit(0, Uint8Array.of(tags.integer, 1, 2)),
    integer(Buffer.from(of.serial, 'hex')),
    ecdsaSha256,
    issuer.subject,
    sequence(time(of.notBefore), time(of.notAfter)),
    nameOf(order.subject),
    order.spki,
    extensionsOf(order, issuer, of.serial),
  )

/** The certificate of a TBSCertificate and its DER signature. */
export const certificateOf = (tbs: Uint8Array, signature: Uint8Array): Uint8Array => sequence(tbs, ecdsaSha256, bitString(signature))

/** Serial of 16 random bytes whose first bit is zero and first byte is not: 127 bits from a CSPRNG (CA/B BR §7.1 asks for 64). */
export const serialOf = (random: Uint8Array): string => {
  const bytes = Uint8Array.from(random)
  bytes[0] = ((bytes[0] ?? 0) & 0x7f) | 0x40
  return Buffer.from(bytes).toString('hex')
}

/**
 * Writes one certificate of every profile and has it read by our own reader, by node and by @peculiar/x509: a profile that one of them reads differently
 * must not issue anything. Run at start. Throws when one differs.
 */
export const checkProfiles = (now: number): void => {
  const { publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const issuer: IssuerName = { subject: nameOf('check'), spki }
  // The shape is judged here, not the signature: two small integers will do.
  const signature = Uint8Array.of(0x30, 0x06, 0x02, 0x01, 0x01, 0x02, 0x01, 0x01)
  for (const profile of Object.keys(profiles) as ProfileName[]) {
    const order: CertificateOrder = {
      profile,
      subject: 'check',
      spki,
      ...(profiles[profile].eku === 'role' ? { role: 'challenge' as const } : {}),
      ...(profile === 'server-tls' ? { names: ['localhost', '127.0.0.1', '::1'] } : {}),
    }
    const validity = validityOf(profile, now)
    const serial = serialOf(new Uint8Array(16))
    const bytes = certificateOf(tbsOf(order, issuer, { serial, ...validity }), signature)
    const [own, second] = [parseCertificate(bytes), secondReading(bytes)]
    const same =
      own.serial === serial &&
      second.serial === serial &&
      own.notAfter === second.notAfter &&
      own.notAfter === validity.notAfter &&
      Buffer.compare(second.spki, own.spki) === 0 &&
      createPublicKey({ key: Buffer.from(second.spki), format: 'der', type: 'spki' }).equals(publicKey) &&
      second.extensions.length === own.extensions.size
    if (!same) throw new Error(`certificate profile ${profile} is read differently by different parsers`)
  }
}
