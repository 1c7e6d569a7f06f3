import { hash } from 'node:crypto'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { parseCrl } from '@fleetkey/protocol/x509/crl.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { validateChain, type PathFailure } from '@fleetkey/protocol/x509/path.ts'
import type { EkCertificate } from './ek-certificate.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import { isFor, namesFirmware } from './firmware.ts'
import { registeredManufacturers } from './manufacturers.ts'
import { fail, type ReasonCode } from './reasons.ts'

/** What a CA vouches for: the EKs of TPMs, or the factory identities of secure elements. Never both: each counts in its own chains only. */
export type EndorsementPurpose = 'ek' | 'idevid'

/** A CA that vouches for hardware: EKs unless told. `test`: a simulator's; whatever it vouches for is `simulated`. */
export interface EndorsementCa {
  readonly purpose?: EndorsementPurpose
  readonly certificate: Uint8Array
  readonly subject: string
  readonly test: boolean
  /** A CA below one of the others: it vouches only through its own chain. A root unless told. */
  readonly intermediate?: boolean
  /** Its newest CRL (DER), checked against it on import. */
  readonly crl?: Uint8Array | null
}

/** Who vouches for a device's hardware. */
export interface Vouched {
  readonly root: EndorsementCa
  /** SHA-256 (hex) of every CA certificate of the chain, nearest first. */
  readonly by: readonly string[]
  readonly test: boolean
}

/** Parsed once: what is imported is the same for every device. Bounded; keyed by content, so that it cannot be stale. */
const remembering = <T>(parse: (bytes: Uint8Array) => T, most: number): ((bytes: Uint8Array) => T) => {
  const known = new Map<string, T>()
  return (bytes) => {
    const key = hash('sha256', bytes)
    const found = known.get(key)
    if (found !== undefined) return found
    if (known.size >= most) known.clear()
    const made = parse(bytes)
    known.set(key, made)
    return made
  }
}
const certificateOf = remembering(parseCertificate, 1024)
const crlOf = remembering(parseCrl, 64)

/** How the path validator's findings are called here, where it is not by their own name. */
const pathReason = (purpose: EndorsementPurpose, why: PathFailure): ReasonCode => {
  switch (why) {
    case 'wrong-usage':
      return `${purpose}.cert.usage`
    case 'crl-expired':
      return `${purpose}.cert.crl-outdated`
    case 'crl-signature':
    case 'crl-issuer':
      return `${purpose}.cert.crl-untrusted`
    default:
      return `${purpose}.cert.${why}`
  }
}

const checkDeniedSerials = (purpose: EndorsementPurpose, chain: readonly Certificate[], policy: EndorsementPolicy): void => {
  for (const denied of policy.deny)
    if ('serial' in denied && chain.slice(0, -1).some((one, at) => chain[at + 1]?.fingerprint === denied.issuer && one.serial === denied.serial))
      fail(`${purpose}.cert.denied`, `serial ${denied.serial} of ${denied.issuer}`)
}

const checkDeniedTpm = ({ certificate, tpm }: EkCertificate, policy: EndorsementPolicy, test: boolean): void => {
  for (const denied of policy.deny) {
    if ('firmware' in denied && isFor(denied.manufacturer, tpm.manufacturer) && namesFirmware(denied.firmware, BigInt(tpm.version) << 32n))
      fail('ek.cert.firmware-denied', `firmware ${denied.firmware} of ${tpm.manufacturer}`)
  }
  const allowed = policy.manufacturers === null ? (test ? null : registeredManufacturers) : new Set(policy.manufacturers)
  if (allowed !== null && !allowed.has(tpm.manufacturer)) fail('ek.cert.manufacturer', `${tpm.manufacturer} in certificate ${certificate.serial}`)
}

interface Question {
  readonly purpose: EndorsementPurpose
  readonly leaf: Certificate
  /** Sent along: worth nothing without an imported root above. */
  readonly brought: readonly Certificate[]
  readonly eku: string
  /** A leaf that names no usage at all will do. */
  readonly ekuMayBeAbsent: boolean
}

/** The chain from a certificate to an imported root of its own purpose, none of it revoked, outdated or denied. */
const chainFor = (
  { purpose, leaf, brought, eku, ekuMayBeAbsent }: Question,
  endorsements: readonly EndorsementCa[],
  policy: EndorsementPolicy,
  now: number,
): Vouched & { readonly chain: readonly Certificate[] } => {
  const mine = endorsements.filter((ca) => (ca.purpose ?? 'ek') === purpose)
  const cas = mine.map((ca) => ({ ca, certificate: certificateOf(ca.certificate) }))
  const of = (intermediate: boolean): readonly Certificate[] =>
    cas.filter(({ ca }) => (ca.intermediate === true) === intermediate).map(({ certificate }) => certificate)
  const crls = mine.flatMap(({ crl }) => (crl === undefined || crl === null ? [] : [crlOf(crl)]))
  const intermediates = [...of(true), ...brought]
  const result = validateChain({ leaf, intermediates, roots: of(false), at: now, crls, eku, ekuMayBeAbsent })
  if (!result.ok) return fail(pathReason(purpose, result.why), `${purpose} certificate: ${result.why} at ${result.at}`)
  const root = cas.find(({ certificate }) => certificate === result.chain.at(-1))?.ca ?? fail(`${purpose}.cert.unknown-issuer`)
  const issuers = result.chain.slice(1)
  const test = issuers.some((issuer) => cas.find(({ certificate }) => certificate === issuer)?.ca.test === true)
  checkDeniedSerials(purpose, result.chain, policy)
  return { root, by: issuers.map(({ fingerprint }) => fingerprint), test, chain: result.chain }
}

/** The chain from an EK certificate to an imported root, none of it revoked, outdated or denied. */
export const vouchedFor = (ek: EkCertificate, endorsements: readonly EndorsementCa[], policy: EndorsementPolicy, now: number): Vouched => {
  const vouched = chainFor({ purpose: 'ek', leaf: ek.certificate, brought: [], eku: oids.ekCertificate, ekuMayBeAbsent: false }, endorsements, policy, now)
  checkDeniedTpm(ek, policy, vouched.test)
  return vouched
}

/**
 * The same for an IDevID certificate; `brought`: intermediates that the device sent along. Whatever names usages, a certificate for servers or for EKs, names that
 * of a client too or is none (802.1AR leaves the extension out).
 */
export const vouchedForIdevid = (
  leaf: Certificate,
  brought: readonly Certificate[],
  endorsements: readonly EndorsementCa[],
  policy: EndorsementPolicy,
  now: number,
): Vouched => chainFor({ purpose: 'idevid', leaf, brought, eku: oids.clientAuth, ekuMayBeAbsent: true }, endorsements, policy, now)

/** An IDevID key that the deny list names by the hash of its SPKI. */
export const checkIdevidDenied = (idevid: string, policy: EndorsementPolicy): void => {
  if (policy.deny.some((denied) => 'idevid' in denied && denied.idevid === idevid)) fail('idevid.cert.denied', `IDevID ${idevid}`)
}

/** An EK that the deny list names by the hash of its public area, certificate or not. */
export const checkEkDenied = (ekHash: string, policy: EndorsementPolicy): void => {
  if (policy.deny.some((denied) => 'ek' in denied && denied.ek === ekHash)) fail('ek.cert.denied', `EK ${ekHash}`)
}
