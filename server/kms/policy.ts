import { Problem } from '@fleetkey/protocol/problem.ts'
import { type DerReader, inside, readBoolean, readOid, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import type { KmsKeyPurpose } from '../flows/context.ts'

/** Every purpose, and the kind of key it has. */
export const purposes = {
  'root-ca': 'ec',
  'issuing-ca': 'ec',
  'server-tls': 'ec',
  'challenge-signing': 'ec',
  'delivery-signing': 'ec',
  'group-signing': 'ec',
  'release-signing': 'ec',
  'audit-signing': 'ec',
  'ocsp-signing': 'ec',
  kek: 'aes',
} as const satisfies Readonly<Record<KmsKeyPurpose, 'ec' | 'aes'>>

export const isPurpose = (value: unknown): value is KmsKeyPurpose => typeof value === 'string' && Object.hasOwn(purposes, value)

/** Names of KMS keys: they become file names and labels of a token. */
export const isKeyName = (value: unknown): value is string => typeof value === 'string' && /^[a-z0-9][a-z0-9-]{0,63}$/.test(value)

const oids = { basicConstraints: '2.5.29.19', extKeyUsage: '2.5.29.37', ocspSigning: '1.3.6.1.5.5.7.3.9' } as const

/** What its first bytes make of it; a list is told by its head alone, because it may have megabytes. */
const kindOf = (data: Uint8Array): 'certificate' | 'list' | 'other' => {
  if (data[0] !== tags.sequence) return 'other'
  const long = (data[1] ?? 0) >= 0x80 ? (data[1] ?? 0) & 0x7f : 0
  const body = data.subarray(2 + long)
  // TBSCertificate, RFC 5280 §4.1: [0] EXPLICIT version, or (version 1) at once the serial and an AlgorithmIdentifier; TBSCertList, §5.1: version 2.
  if (body[0] === 0xa0) return 'certificate'
  return body[0] === tags.integer && body[1] === 1 && body[2] === 1 && body[3] === tags.sequence ? 'list' : 'certificate'
}

interface Powers {
  readonly ca: boolean
  readonly ocsp: boolean
}

/** What a TBSCertificate of version 3 lets its subject do. Throws Problem('malformed') when it is none in strict DER. */
const powersOf = (tbs: Uint8Array): Powers => {
  const fields = inside(whole(tbs, tags.sequence))
  for (const tag of [0xa0, tags.integer, tags.sequence, tags.sequence, tags.sequence, tags.sequence, tags.sequence]) fields.next(tag)
  let powers: Powers = { ca: false, ocsp: false }
  const list = fields.optional(0xa3)
  fields.end()
  if (list === undefined) return powers
  const extensions = inside(inside(list).next(tags.sequence))
  while (!extensions.done) {
    const extension = extensions.enter(tags.sequence)
    const oid = readOid(extension.next(tags.oid))
    extension.optional(tags.boolean)
    const value = extension.next(tags.octetString).content
    if (oid === oids.basicConstraints) {
      const flag = inside(whole(value, tags.sequence)).optional(tags.boolean)
      powers = { ...powers, ca: powers.ca || (flag !== undefined && readBoolean(flag)) }
    }
    if (oid === oids.extKeyUsage) powers = { ...powers, ocsp: powers.ocsp || has(inside(whole(value, tags.sequence)), oids.ocspSigning) }
  }
  return powers
}

const has = (list: DerReader, oid: string): boolean => {
  let found = false
  while (!list.done) found = readOid(list.next(tags.oid)) === oid || found
  return found
}

/**
 * Whether a key of this purpose signs these bytes; read here, behind the socket, so that whoever takes over the server cannot have a CA's key sign just
 * anything: the root makes CAs, OCSP responders and lists; the issuing CA makes what is no CA, and lists; every other key signs nothing that could be taken for a
 * certificate or a list of one. Throws Problem('forbidden', reason `kms.content`).
 */
export const mustMatch = (purpose: KmsKeyPurpose, data: Uint8Array): void => {
  const refused = (what: string, cause?: unknown): Problem =>
    new Problem('forbidden', `a key for ${purpose} does not sign ${what}`, { reason: 'kms.content', cause })
  const kind = kindOf(data)
  if (purpose === 'root-ca' || purpose === 'issuing-ca') {
    if (kind === 'other') throw refused('what is no certificate and no revocation list')
    if (kind === 'list') return
    let powers: Powers
    try {
      powers = powersOf(data)
    } catch (cause) {
      throw refused('a certificate that is not strict DER', cause)
    }
    if (purpose === 'issuing-ca' && powers.ca) throw refused('a CA certificate')
    if (purpose === 'root-ca' && !powers.ca && !powers.ocsp) throw refused('a certificate that is no CA and no OCSP responder')
    return
  }
  // ResponseData (RFC 6960 §4.2.1) is a SEQUENCE too, and starts with the responder's name or key: [1] or [2].
  if (data[0] !== tags.sequence) return
  const long = (data[1] ?? 0) >= 0x80 ? (data[1] ?? 0) & 0x7f : 0
  const first = data[2 + long]
  if (purpose === 'ocsp-signing' && (first === 0xa1 || first === 0xa2)) return
  if (looksSigned(data)) throw refused('a certificate or a revocation list')
}

/**
 * Digests and texts may start with the byte of a SEQUENCE: taken for a certificate or list is what ends where it says and starts as one of them does, with a
 * version or a serial before the AlgorithmIdentifier (a digest that does so by chance is one in 2^32).
 */
const looksSigned = (data: Uint8Array): boolean => {
  try {
    const fields = inside(whole(data, tags.sequence))
    fields.optional(0xa0)
    fields.next(tags.integer)
    fields.next(tags.sequence)
    return true
  } catch {
    return false
  }
}
