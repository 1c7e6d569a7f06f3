import { oids, keyUsages } from './oids.ts'
import type { Certificate } from './certificate.ts'
import { crlFault, type Crl, type CrlFailure } from './crl.ts'
import { inside, tags, whole } from './der.ts'
import { isWellFormed, readGeneralName } from './general-names.ts'
import { readNameConstraints, satisfies } from './name-constraints.ts'

/** Why a chain does not validate; stable, for audit entries. */
export type PathFailure =
  | 'unknown-issuer'
  | 'bad-signature'
  | 'not-yet-valid'
  | 'expired'
  | 'not-a-ca'
  | 'path-length'
  | 'unknown-critical-extension'
  | 'malformed-extension'
  | 'name-constraints'
  | 'wrong-usage'
  | 'weak-algorithm'
  | 'too-long'
  | CrlFailure

export type PathResult =
  | { readonly ok: true; /** Leaf first, root last. */ readonly chain: readonly Certificate[] }
  | { readonly ok: false; readonly why: PathFailure; readonly at: string }

export interface PathQuestion {
  readonly leaf: Certificate
  readonly intermediates: readonly Certificate[]
  readonly roots: readonly Certificate[]
  /** Milliseconds since 1970. */
  readonly at: number
  /** Must stand in the leaf, and in each intermediate that restricts usages. */
  readonly eku?: string
  /** A leaf without any extended key usage is content with `eku` too (RFC 5280 §4.2.1.12). */
  readonly ekuMayBeAbsent?: boolean
  /** The leaf may be a CA certificate. */
  readonly leafMayBeCa?: boolean
  /** Intermediates in the chain at most, self-issued ones apart; 5 unless told. */
  readonly maxIntermediates?: number
  /** Lists of the CAs in question: whoever a list of its issuer names, or does not clearly pass, is refused. A CA without a list is not asked for one. */
  readonly crls?: readonly Crl[]
}

/** Signatures checked for one answer: whoever sends a maze of certificates does not get us lost in it. */
const maxSignatures = 64
const maxChain = 16
const understood: ReadonlySet<string> = new Set([oids.basicConstraints, oids.keyUsage, oids.extKeyUsage, oids.subjectAltName, oids.nameConstraints])
/** ECDSA with SHA-256/384/512, RSA PKCS #1 with SHA-256/384/512 (TPM makers' chains). */
const signatures: ReadonlySet<string> = new Set([
  '1.2.840.10045.4.3.2',
  '1.2.840.10045.4.3.3',
  '1.2.840.10045.4.3.4',
  '1.2.840.113549.1.1.11',
  '1.2.840.113549.1.1.12',
  '1.2.840.113549.1.1.13',
])

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0
const isSelfIssued = ({ issuer, subject }: Certificate): boolean => same(issuer, subject)

/**
 * Validates a leaf up to one of the given roots: a narrow profile of RFC 5280 §6. Names chain as bytes; every CA says so (basicConstraints, keyCertSign)
 * and keeps its path length and name constraints; each certificate, the root too, is within its time at `at` and has the extensions RFC 5280 §4.2 makes
 * compulsory; a critical extension we do not understand ends it. Of several ways up, one that holds is enough. Pure; the root itself is never looked up
 * in a revocation list. A refusal names what stopped the way that led furthest.
 */
export const validateChain = (of: PathQuestion): PathResult => {
  const budget = { signatures: maxSignatures }
  let furthest: { readonly depth: number; readonly result: PathResult } | undefined
  const refused = (why: PathFailure, chain: readonly Certificate[]): undefined => {
    const last = chain.at(-1) ?? of.leaf
    if (furthest === undefined || chain.length > furthest.depth)
      furthest = { depth: chain.length, result: { ok: false, why, at: last.commonName ?? last.serial } }
  }

  const climb = (chain: readonly Certificate[]): readonly Certificate[] | undefined => {
    const last = chain.at(-1) ?? of.leaf
    const isRoot = chain.length > 1 && of.roots.some((root) => same(root.der, last.der))
    const fault = faultOf(chain, isRoot, of)
    if (fault !== undefined) return refused(fault, chain)
    if (isRoot) return chain
    if (chain.length > maxChain || isTooLong(chain, of.maxIntermediates ?? 5)) return refused('too-long', chain)
    const named = [...of.roots, ...of.intermediates].filter((issuer) => same(issuer.subject, last.issuer) && !chain.slice(1).includes(issuer))
    if (named.length === 0) return refused('unknown-issuer', chain)
    const issuers = named.filter((issuer) => budget.signatures-- > 0 && signed(last, issuer))
    if (issuers.length === 0) return refused(budget.signatures < 0 ? 'too-long' : 'bad-signature', chain)
    for (const issuer of issuers) {
      const revoked = revocation(last, issuer, of)
      const found = revoked === undefined ? climb([...chain, issuer]) : refused(revoked, chain)
      if (found !== undefined) return found
    }
    return undefined
  }

  const chain = climb([of.leaf])
  return chain === undefined ? (furthest?.result ?? { ok: false, why: 'unknown-issuer', at: of.leaf.serial }) : { ok: true, chain }
}

const isTooLong = (chain: readonly Certificate[], most: number): boolean => chain.slice(1).filter((one) => !isSelfIssued(one)).length > most

const revocation = (certificate: Certificate, issuer: Certificate, of: PathQuestion): PathFailure | undefined =>
  (of.crls ?? [])
    .filter((crl) => same(crl.issuer, issuer.subject))
    .map((crl) => crlFault(crl, certificate, issuer, of.at))
    .find((fault) => fault !== undefined)

const signed = (certificate: Certificate, issuer: Certificate): boolean => {
  try {
    return certificate.native.verify(issuer.native.publicKey)
  } catch {
    return false
  }
}

/** What is wrong with the last certificate of the chain, in its place; undefined when nothing is. */
const faultOf = (chain: readonly Certificate[], isRoot: boolean, of: PathQuestion): PathFailure | undefined => {
  const certificate = chain.at(-1) ?? of.leaf
  const depth = chain.length - 1
  if (certificate.notBefore > of.at) return 'not-yet-valid'
  // notAfter is the whole last second (RFC 5280 §4.1.2.5).
  if (certificate.notAfter + 999 < of.at) return 'expired'
  if (!signatures.has(certificate.signatureAlgorithm)) return 'weak-algorithm'
  for (const [id, { critical }] of certificate.extensions) if (critical && !understood.has(id)) return 'unknown-critical-extension'
  if (!isConforming(certificate, depth)) return 'malformed-extension'
  if (!hasUsage(certificate, depth, of)) return 'wrong-usage'
  return depth === 0 ? leafFault(certificate, of) : caFault(chain, certificate, isRoot)
}

const hasUsage = ({ extKeyUsage }: Certificate, depth: number, { eku, ekuMayBeAbsent }: PathQuestion): boolean =>
  eku === undefined || (extKeyUsage === null ? depth > 0 || ekuMayBeAbsent === true : extKeyUsage.includes(eku))

const leafFault = ({ basicConstraints, keyUsage }: Certificate, of: PathQuestion): PathFailure | undefined => {
  if (basicConstraints?.ca === true) return of.leafMayBeCa === true ? undefined : 'wrong-usage'
  return keyUsage?.has(keyUsages.keyCertSign) === true ? 'wrong-usage' : undefined
}

const caFault = (chain: readonly Certificate[], certificate: Certificate, isRoot: boolean): PathFailure | undefined => {
  const { basicConstraints, keyUsage, extensions } = certificate
  if (basicConstraints?.ca !== true || extensions.get(oids.basicConstraints)?.critical !== true) return 'not-a-ca'
  // Old roots leave the key usage out; what is there counts.
  if (keyUsage === null ? !isRoot : !keyUsage.has(keyUsages.keyCertSign)) return 'not-a-ca'
  const { pathLength } = basicConstraints
  const below = chain.slice(1, -1).filter((one) => !isSelfIssued(one)).length
  if (pathLength !== null && below > pathLength) return 'path-length'
  return constraintFault(chain, extensions.get(oids.nameConstraints)?.value)
}

/** Name constraints hold for everything below their CA but self-issued intermediates (RFC 5280 §6.1.3). */
const constraintFault = (chain: readonly Certificate[], value: Uint8Array | undefined): PathFailure | undefined => {
  if (value === undefined) return undefined
  try {
    const constraints = readNameConstraints(value)
    return chain.slice(0, -1).every((one, at) => (at > 0 && isSelfIssued(one)) || satisfies(one, constraints)) ? undefined : 'name-constraints'
  } catch {
    return 'malformed-extension'
  }
}

/** The form that RFC 5280 §4.1 and §4.2 prescribe, as far as it says what a certificate may be taken for. */
const isConforming = (certificate: Certificate, depth: number): boolean => {
  const { extensions, basicConstraints } = certificate
  const isCa = basicConstraints?.ca === true
  const critical = (id: string): boolean => extensions.get(id)?.critical === true
  if (/^0*$/.test(certificate.serial)) return false
  if (!isSelfIssued(certificate) && !hasKeyIdentifier(extensions.get(oids.authorityKeyIdentifier)?.value)) return false
  if (extensions.has(oids.nameConstraints) && !(isCa && critical(oids.nameConstraints))) return false
  if (extensions.has(oids.policyConstraints)) return false
  const isAnonymous = same(certificate.subject, emptyName)
  if (isAnonymous && (isCa || !critical(oids.subjectAltName))) return false
  if (depth > 0 && !extensions.has(oids.subjectKeyIdentifier)) return false
  return areWellFormed(certificate)
}

const emptyName = Uint8Array.of(tags.sequence, 0)

/** AuthorityKeyIdentifier with its keyIdentifier (RFC 5280 §4.2.1.1). */
const hasKeyIdentifier = (value: Uint8Array | undefined): boolean => {
  if (value === undefined) return false
  try {
    return inside(whole(value, tags.sequence)).optional(0x80) !== undefined
  } catch {
    return false
  }
}

const areWellFormed = ({ altNames }: Certificate): boolean => {
  try {
    return altNames.every((bytes) => isWellFormed(readGeneralName(whole(bytes, bytes[0] ?? 0))))
  } catch {
    return false
  }
}
