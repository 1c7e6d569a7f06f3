import { createHash, createPublicKey, generateKeyPairSync, sign, type KeyObject } from 'node:crypto'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { bitString, boolean, der, explicit, integer, namedBits, octetString, oid, sequence, set, tags, time, utf8 } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'

/** Certificates and CRLs of makers, as wrong as a test wants them. */

export interface Authority {
  readonly name: Uint8Array
  readonly key: KeyObject
  readonly spki: Uint8Array
  readonly certificate: Uint8Array
}

export interface Wanted {
  /** Name, DER. */
  readonly subject: Uint8Array
  readonly key: KeyObject
  readonly extensions: readonly Uint8Array[]
  readonly from?: number
  readonly until?: number
  readonly sha1?: boolean
  /** Without subject and authority key identifiers. */
  readonly bare?: boolean
}

export const never = Date.UTC(9999, 11, 31, 23, 59, 59)
export const extension = (id: string, critical: boolean, value: Uint8Array): Uint8Array =>
  sequence(oid(id), ...(critical ? [boolean(true)] : []), octetString(value))
export const spkiOf = (key: KeyObject): Uint8Array => new Uint8Array(createPublicKey(key).export({ format: 'der', type: 'spki' }))
export const newKey = (curve: 'prime256v1' | 'secp384r1' | 'secp521r1' = 'prime256v1'): KeyObject => generateKeyPairSync('ec', { namedCurve: curve }).privateKey

const identifier = (spki: Uint8Array): Uint8Array => createHash('sha256').update(spki).digest().subarray(0, 20)
const ecdsa = (sha1: boolean): Uint8Array => sequence(oid(sha1 ? '1.2.840.10045.4.1' : oids.ecdsaSha256))
const signed = (tbs: Uint8Array, key: KeyObject, sha1 = false): Uint8Array => sequence(tbs, ecdsa(sha1), bitString(sign(sha1 ? 'sha1' : 'sha256', tbs, key)))

export const serialOf = (of: Pick<Wanted, 'subject' | 'key'>): Uint8Array =>
  createHash('sha256')
    .update(of.subject)
    .update(spkiOf(of.key))
    .digest()
    .subarray(0, 8)
    .map((byte, at) => (at === 0 ? (byte & 0x3f) | 0x40 : byte))

export const issue = (by: Pick<Authority, 'name' | 'key' | 'spki'>, of: Wanted): Uint8Array => {
  const spki = spkiOf(of.key)
  const identifiers = [
    extension(oids.subjectKeyIdentifier, false, octetString(identifier(spki))),
    extension(oids.authorityKeyIdentifier, false, sequence(der(0x80, identifier(by.spki)))),
  ]
  const tbs = sequence(
    explicit(0, Uint8Array.of(tags.integer, 1, 2)),
    integer(serialOf(of)),
    ecdsa(of.sha1 === true),
    by.name,
    sequence(time(of.from ?? Date.UTC(2026, 0, 1)), time(of.until ?? never)),
    of.subject,
    spki,
    explicit(3, sequence(...of.extensions, ...(of.bare === true ? [] : identifiers))),
  )
  return signed(tbs, by.key, of.sha1)
}

export const basic = (ca: boolean, pathLength?: number): Uint8Array =>
  extension(oids.basicConstraints, true, ca ? sequence(boolean(true), ...(pathLength === undefined ? [] : [integer(Uint8Array.of(pathLength))])) : sequence())
export const usage = (...bits: readonly (keyof typeof keyUsages)[]): Uint8Array => extension(oids.keyUsage, true, namedBits(bits.map((bit) => keyUsages[bit])))

/** A CA; self-signed unless `by` issues it. */
export const authority = (
  name: string,
  of: { readonly by?: Authority; readonly pathLength?: number; readonly more?: readonly Uint8Array[] } = {},
): Authority => {
  const key = newKey()
  const own = { name: nameOf(name), key, spki: spkiOf(key) }
  const extensions = [basic(true, of.pathLength), usage('keyCertSign', 'crlSign'), ...(of.more ?? [])]
  return { ...own, certificate: issue(of.by ?? own, { subject: own.name, key, extensions }) }
}

export const serialNumber = (...values: readonly string[]): Uint8Array => sequence(...values.map((value) => set(sequence(oid(oids.serialNumber), utf8(value)))))

/** A CRL (RFC 5280 §5). `revoked`: serials. */
export const crl = (by: Authority, of: { readonly revoked?: readonly Uint8Array[]; readonly until?: number; readonly key?: KeyObject } = {}): Uint8Array => {
  const at = time(Date.UTC(2026, 5, 1))
  const entries = (of.revoked ?? []).map((serial) => sequence(integer(serial), at))
  const tbs = sequence(
    Uint8Array.of(tags.integer, 1, 1),
    ecdsa(false),
    by.name,
    at,
    time(of.until ?? Date.UTC(2030, 0, 1)),
    ...(entries.length === 0 ? [] : [sequence(...entries)]),
    explicit(0, sequence(extension(oids.crlNumber, false, integer(Uint8Array.of(1))))),
  )
  return signed(tbs, of.key ?? by.key)
}
