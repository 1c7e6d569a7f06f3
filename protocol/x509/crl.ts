import { verify } from 'node:crypto'
import { Problem } from '../problem.ts'
import type { Certificate } from './certificate.ts'
import { inside, readBits, readBoolean, readOid, readSmall, readTime, readUnsigned, tags, whole, type DerReader, type Element } from './der.ts'
import { keyUsages, oids } from './oids.ts'

/** A complete certificate revocation list of one CA (RFC 5280 §5). Times in milliseconds since 1970. */
export interface Crl {
  /** Name, DER. */
  readonly issuer: Uint8Array
  readonly thisUpdate: number
  readonly nextUpdate: number
  /** Hex, lower case. */
  readonly number: string
  /** Serial (as in Certificate) → time of revocation. */
  readonly revoked: ReadonlyMap<string, number>
  readonly tbs: Uint8Array
  readonly signatureAlgorithm: string
  readonly signature: Uint8Array
}

export type CrlFailure = 'crl-signature' | 'crl-issuer' | 'crl-expired' | 'revoked'

const maxBytes = 4 << 20
const maxEntries = 200_000

const fail = (what: string): never => {
  throw new Problem('malformed', `CRL: ${what}`, { reason: 'x509.crl' })
}

const isTime = (tag: number | undefined): boolean => tag === tags.utcTime || tag === tags.generalizedTime

/** Serial as Certificate has it: hex without sign byte. */
const readSerial = (element: Element): string => {
  const bytes = readUnsigned(element)
  if (bytes.length > 21) fail('a serial of more than 20 bytes')
  return Buffer.from(bytes[0] === 0 && bytes.length > 1 ? bytes.subarray(1) : bytes).toString('hex')
}

/** Reads extensions one by one; whatever is critical and not `known` makes the list useless to us. */
const readExtensions = (list: DerReader, known: ReadonlySet<string>, take: (id: string, value: Uint8Array, critical: boolean) => void): void => {
  while (!list.done) {
    const one = list.enter(tags.sequence)
    const id = readOid(one.next(tags.oid))
    const flag = one.optional(tags.boolean)
    const critical = flag !== undefined && readBoolean(flag)
    const value = one.next(tags.octetString).content
    one.end()
    if (critical && !known.has(id)) fail(`critical extension ${id}`)
    take(id, value, critical)
  }
}

/**
 * Parses a full, direct CRL, version 2 with a CRL number. Delta, partitioned and indirect lists say so in a critical extension and are refused.
 * Throws Problem('malformed').
 */
export const parseCrl = (bytes: Uint8Array): Crl => {
  if (bytes.length > maxBytes) fail(`${bytes.length} bytes`)
  const outer = inside(whole(bytes, tags.sequence))
  const tbs = outer.next(tags.sequence)
  const algorithm = outer.next(tags.sequence)
  const signature = readBits(outer.next(tags.bitString))
  outer.end()
  const fields = inside(tbs)
  if (readSmall(fields.next(tags.integer)) !== 1) fail('not version 2')
  if (Buffer.compare(fields.next(tags.sequence).bytes, algorithm.bytes) !== 0) fail('two signature algorithms')
  const issuer = fields.next(tags.sequence).bytes
  const thisUpdate = readTime(fields.next())
  if (!isTime(fields.peek())) fail('no next update')
  const nextUpdate = readTime(fields.next())
  const revoked = readEntries(fields.optional(tags.sequence))
  const number = readNumber(fields.optional(0xa0))
  fields.end()
  return { issuer, thisUpdate, nextUpdate, number, revoked, tbs: tbs.bytes, signatureAlgorithm: readOid(inside(algorithm).next(tags.oid)), signature }
}

const readEntries = (element: Element | undefined): ReadonlyMap<string, number> => {
  const found = new Map<string, number>()
  if (element === undefined) return found
  const list = inside(element)
  while (!list.done) {
    if (found.size >= maxEntries) fail(`more than ${maxEntries} entries`)
    const entry = list.enter(tags.sequence)
    const serial = readSerial(entry.next(tags.integer))
    const at = readTime(entry.next())
    const extensions = entry.optional(tags.sequence)
    entry.end()
    if (extensions !== undefined) readExtensions(inside(extensions), new Set(), () => undefined)
    found.set(serial, at)
  }
  return found
}

const readNumber = (element: Element | undefined): string => {
  let number: string | undefined
  if (element !== undefined)
    readExtensions(inside(whole(element.content, tags.sequence)), new Set(), (id, value) => {
      if (id === oids.crlNumber) number = readSerial(whole(value, tags.integer))
    })
  return number ?? fail('no CRL number')
}

const hashes: Readonly<Record<string, string>> = {
  '1.2.840.10045.4.3.2': 'sha256',
  '1.2.840.10045.4.3.3': 'sha384',
  '1.2.840.10045.4.3.4': 'sha512',
  '1.2.840.113549.1.1.11': 'sha256',
  '1.2.840.113549.1.1.12': 'sha384',
  '1.2.840.113549.1.1.13': 'sha512',
}

/**
 * Why the certificate does not stand up to this CRL of its issuer at `at`; undefined when it does. A list that is out of date, or that this CA may not or
 * did not sign, says nothing good about anybody.
 */
export const crlFault = (crl: Crl, certificate: Certificate, issuer: Certificate, at: number): CrlFailure | undefined => {
  if (Buffer.compare(crl.issuer, issuer.subject) !== 0 || issuer.keyUsage?.has(keyUsages.crlSign) === false) return 'crl-issuer'
  const hash = Object.hasOwn(hashes, crl.signatureAlgorithm) ? hashes[crl.signatureAlgorithm] : undefined
  if (hash === undefined || !verify(hash, crl.tbs, issuer.native.publicKey, crl.signature)) return 'crl-signature'
  if (crl.thisUpdate > at || crl.nextUpdate < at) return 'crl-expired'
  return crl.revoked.has(certificate.serial) ? 'revoked' : undefined
}
