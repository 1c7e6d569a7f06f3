import { hash, X509Certificate } from 'node:crypto'
import { Problem } from '../problem.ts'
import { sameAltNames, sameSubject } from './agreement.ts'
import {
  DerProblem,
  inside,
  oid,
  readBits,
  readBoolean,
  readNamedBits,
  readOid,
  readSmall,
  readTime,
  readUnsigned,
  sequence,
  set,
  tags,
  utf8,
  whole,
  type Element,
} from './der.ts'
import { oids } from './oids.ts'
import { importSpki, isCanonicalP256, refuseExplicitCurve } from './public-key.ts'

/** A certificate (RFC 5280 §4.1), read strictly. Names and keys are kept as DER: they are compared as bytes. */
export interface Certificate {
  readonly der: Uint8Array
  readonly tbs: Uint8Array
  /** Lower-case hex without sign byte. */
  readonly serial: string
  readonly issuer: Uint8Array
  readonly subject: Uint8Array
  readonly commonName: string | null
  /** SubjectPublicKeyInfo, DER. */
  readonly spki: Uint8Array
  readonly notBefore: number
  readonly notAfter: number
  readonly signatureAlgorithm: string
  readonly extensions: ReadonlyMap<string, { readonly critical: boolean; readonly value: Uint8Array }>
  readonly basicConstraints: { readonly ca: boolean; readonly pathLength: number | null } | null
  /** Bit positions; null when the extension is absent. */
  readonly keyUsage: ReadonlySet<number> | null
  readonly extKeyUsage: readonly string[] | null
  /** GeneralName elements of the subjectAltName, DER. */
  readonly altNames: readonly Uint8Array[]
  readonly fingerprint: string
  /** Node's reading of the same bytes: its chain signature check serves every algorithm. */
  readonly native: X509Certificate
}

const fail = (what: string, reason = 'x509.certificate'): never => {
  throw new Problem('malformed', `certificate: ${what}`, { reason })
}

const maxBytes = 64 << 10
const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
const sameBytes = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

const serialText = (content: Uint8Array): string => hex(content[0] === 0 && content.length > 1 ? content.subarray(1) : content)

/** Serial (hex) that a certificate says it has, for looking it up; undefined where none stands. Nothing else of it is read, and nothing is judged. */
export const claimedSerial = (bytes: Uint8Array): string | undefined => {
  try {
    const tbs = inside(inside(whole(bytes, tags.sequence)).next(tags.sequence))
    tbs.optional(0xa0)
    return serialText(tbs.next(tags.integer).content)
  } catch (error) {
    if (error instanceof DerProblem) return undefined
    throw error
  }
}

/**
 * Reads one certificate. It counts only if node's parser reads it too and both agree on serial, public key, subject and alternative names:
 * a certificate that two parsers read differently is an attack, not a certificate. Throws Problem('malformed').
 */
export const parseCertificate = (bytes: Uint8Array): Certificate => {
  if (bytes.length > maxBytes) fail(`${bytes.length} bytes`)
  const outer = inside(whole(bytes, tags.sequence))
  const tbs = outer.next(tags.sequence)
  const algorithm = outer.next(tags.sequence)
  readBits(outer.next(tags.bitString))
  outer.end()
  const fields = inside(tbs)
  const version = fields.optional(0xa0)
  if (version === undefined || readSmall(whole(version.content, tags.integer)) !== 2) fail('not version 3')
  const serialBytes = readUnsigned(fields.next(tags.integer))
  if (serialBytes.length > 21) fail('a serial of more than 20 bytes')
  if (!sameBytes(fields.next(tags.sequence).bytes, algorithm.bytes)) fail('two signature algorithms')
  const issuer = fields.next(tags.sequence)
  const validity = fields.enter(tags.sequence)
  const notBefore = readTime(validity.next())
  const notAfter = readTime(validity.next())
  validity.end()
  const subject = fields.next(tags.sequence)
  const spki = fields.next(tags.sequence)
  const extensions = readExtensions(fields.optional(0xa3))
  fields.end()
  // Before OpenSSL, which would take an explicit curve for the one it resembles.
  if (!isCanonicalP256(spki.bytes)) refuseExplicitCurve(spki)
  const native = nativeOf(bytes)
  const certificate: Certificate = {
    der: bytes,
    tbs: tbs.bytes,
    serial: serialText(serialBytes),
    issuer: issuer.bytes,
    subject: subject.bytes,
    commonName: commonNameOf(subject),
    spki: spki.bytes,
    notBefore,
    notAfter,
    signatureAlgorithm: readOid(inside(algorithm).next(tags.oid)),
    extensions,
    ...knownExtensions(extensions),
    fingerprint: hash('sha256', bytes),
    native,
  }
  agree(certificate)
  return certificate
}

const nativeOf = (bytes: Uint8Array): X509Certificate => {
  try {
    return new X509Certificate(bytes)
  } catch (cause) {
    throw new Problem('malformed', 'certificate: OpenSSL does not read it', { reason: 'x509.certificate', cause })
  }
}

/** Both readings, side by side. Only what is compared is asked of OpenSSL: its reading in one piece costs more than parsing. */
const agree = (certificate: Certificate): void => {
  const { native } = certificate
  const serial = native.serialNumber.toLowerCase()
  if (!sameKey(certificate)) fail('two readings of the public key', 'x509.disagree')
  if (serial.padStart(certificate.serial.length, '0') !== certificate.serial.padStart(serial.length, '0')) fail('two readings of the serial', 'x509.disagree')
  if (!sameSubject(native, certificate.subject)) fail('two readings of the subject', 'x509.disagree')
  if (!sameAltNames(native, certificate.altNames)) fail('two readings of the names', 'x509.disagree')
}

/** P-256 in its canonical form is compared with the point that OpenSSL read; any other key is written anew by OpenSSL from both readings. */
const sameKey = ({ native, spki }: Certificate): boolean => {
  try {
    if (isCanonicalP256(spki)) {
      const { crv, x, y } = native.publicKey.export({ format: 'jwk' })
      const point = Buffer.from(spki.buffer, spki.byteOffset + 27, 64)
      return crv === 'P-256' && x === point.toString('base64url', 0, 32) && y === point.toString('base64url', 32)
    }
    const theirs = native.publicKey.export({ format: 'der', type: 'spki' })
    if (sameBytes(theirs, spki)) return true
    // An odd but legal encoding is not called a difference.
    return sameBytes(theirs, importSpki(spki).export({ format: 'der', type: 'spki' }))
  } catch (cause) {
    throw new Problem('malformed', 'certificate: no usable public key', { reason: 'x509.certificate', cause })
  }
}

const readExtensions = (element: Element | undefined): Certificate['extensions'] => {
  const found = new Map<string, { critical: boolean; value: Uint8Array }>()
  if (element === undefined) return found
  const list = inside(whole(element.content, tags.sequence))
  while (!list.done) {
    const one = list.enter(tags.sequence)
    const id = readOid(one.next(tags.oid))
    const flag = one.optional(tags.boolean)
    const critical = flag !== undefined && readBoolean(flag)
    if (flag !== undefined && !critical) fail('a default written out')
    const value = one.next(tags.octetString).content
    one.end()
    if (found.has(id)) fail(`extension ${id} twice`)
    if (found.size >= 32) fail('more than 32 extensions')
    found.set(id, { critical, value })
  }
  return found
}

const knownExtensions = (extensions: Certificate['extensions']): Pick<Certificate, 'basicConstraints' | 'keyUsage' | 'extKeyUsage' | 'altNames'> => {
  const value = (id: string): Uint8Array | undefined => extensions.get(id)?.value
  const constraints = value(oids.basicConstraints)
  const usage = value(oids.keyUsage)
  const extended = value(oids.extKeyUsage)
  const names = value(oids.subjectAltName)
  return {
    basicConstraints: constraints === undefined ? null : readConstraints(constraints),
    keyUsage: usage === undefined ? null : readNamedBits(whole(usage, tags.bitString)),
    extKeyUsage: extended === undefined ? null : elements(extended).map(readOid),
    altNames: names === undefined ? [] : elements(names).map(({ bytes }) => bytes),
  }
}

const readConstraints = (bytes: Uint8Array): Certificate['basicConstraints'] => {
  const reader = inside(whole(bytes, tags.sequence))
  const flag = reader.optional(tags.boolean)
  const ca = flag !== undefined && readBoolean(flag)
  const length = reader.optional(tags.integer)
  reader.end()
  if (length !== undefined && !ca) fail('a path length without CA')
  return { ca, pathLength: length === undefined ? null : readSmall(length) }
}

/** Elements of a SEQUENCE OF, at least one, at most 64. */
const elements = (bytes: Uint8Array): readonly Element[] => {
  const reader = inside(whole(bytes, tags.sequence))
  const found: Element[] = []
  while (!reader.done) {
    if (found.length >= 64) fail('more than 64 entries')
    found.push(reader.next())
  }
  if (found.length === 0) fail('an empty list')
  return found
}

const utf8Text = new TextDecoder('utf-8')

/** Last common name of a Name (RFC 5280 §4.1.2.4). */
const commonNameOf = (name: Element): string | null => {
  const rdns = inside(name)
  let found: string | null = null
  while (!rdns.done) {
    const attributes = rdns.enter(tags.set)
    while (!attributes.done) {
      const attribute = attributes.enter(tags.sequence)
      const type = readOid(attribute.next(tags.oid))
      const value = attribute.next()
      attribute.end()
      if (type !== oids.commonName) continue
      if (value.tag !== tags.utf8 && value.tag !== tags.printable && value.tag !== tags.ia5) fail('a common name of another string type')
      found = utf8Text.decode(value.content)
      if (/[\0\r\n]/.test(found)) fail('a common name with control characters')
    }
  }
  return found
}

/** Name with one common name. */
export const nameOf = (commonName: string): Uint8Array => sequence(set(sequence(oid(oids.commonName), utf8(commonName))))
