import { oids, keyUsages } from './oids.ts'
import type { Certificate } from './certificate.ts'

/** Why a chain does not validate; stable, for audit entries. */
export type PathFailure =
  | 'unknown-issuer'
  | 'bad-signature'
  | 'not-yet-valid'
  | 'expired'
  | 'not-a-ca'
  | 'path-length'
  | 'unknown-critical-extension'
  | 'wrong-usage'
  | 'weak-algorithm'
  | 'too-long'

export type PathResult =
  | { readonly ok: true; /** Leaf first, root last. */ readonly chain: readonly Certificate[] }
  | { readonly ok: false; readonly why: PathFailure; readonly at: string }

const maxLength = 6
const understood: ReadonlySet<string> = new Set([oids.basicConstraints, oids.keyUsage, oids.extKeyUsage, oids.subjectAltName])
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

/**
 * Validates a leaf up to one of the given roots: a narrow profile of RFC 5280 §6. Names chain as bytes; every CA says so (basicConstraints, keyCertSign)
 * and keeps its path length; each certificate is within its time at `at`; a critical extension we do not understand ends it, name constraints included;
 * `eku` must stand in the leaf, and in each intermediate that restricts usages. Pure; revocation is judged elsewhere.
 */
export const validateChain = (of: {
  readonly leaf: Certificate
  readonly intermediates: readonly Certificate[]
  readonly roots: readonly Certificate[]
  readonly at: number
  readonly eku?: string
}): PathResult => {
  const chain: Certificate[] = [of.leaf]
  const refused = (why: PathFailure, certificate: Certificate): PathResult => ({ ok: false, why, at: certificate.commonName ?? certificate.serial })
  for (;;) {
    const last = chain.at(-1) ?? of.leaf
    const fault = faultOf(last, chain.length - 1, of)
    if (fault !== undefined) return refused(fault, last)
    if (of.roots.some((root) => same(root.der, last.der))) return { ok: true, chain }
    if (chain.length >= maxLength) return refused('too-long', last)
    const issuers = [...of.roots, ...of.intermediates].filter((issuer) => same(issuer.subject, last.issuer) && !chain.includes(issuer))
    if (issuers.length === 0) return refused('unknown-issuer', last)
    const issuer = issuers.find((candidate) => signed(last, candidate))
    if (issuer === undefined) return refused('bad-signature', last)
    chain.push(issuer)
  }
}

const signed = (certificate: Certificate, issuer: Certificate): boolean => {
  try {
    return certificate.native.verify(issuer.native.publicKey)
  } catch {
    return false
  }
}

const faultOf = (certificate: Certificate, depth: number, of: { readonly at: number; readonly eku?: string }): PathFailure | undefined => {
  if (certificate.notBefore > of.at) return 'not-yet-valid'
  if (certificate.notAfter < of.at) return 'expired'
  if (!signatures.has(certificate.signatureAlgorithm)) return 'weak-algorithm'
  for (const [id, { critical }] of certificate.extensions) if (critical && !understood.has(id)) return 'unknown-critical-extension'
  if (of.eku !== undefined && (depth === 0 || certificate.extKeyUsage !== null) && certificate.extKeyUsage?.includes(of.eku) !== true) return 'wrong-usage'
  if (depth === 0) return certificate.basicConstraints?.ca === true ? 'wrong-usage' : undefined
  if (certificate.basicConstraints?.ca !== true) return 'not-a-ca'
  if (certificate.keyUsage?.has(keyUsages.keyCertSign) !== true) return 'not-a-ca'
  const { pathLength } = certificate.basicConstraints
  return pathLength !== null && depth - 1 > pathLength ? 'path-length' : undefined
}
