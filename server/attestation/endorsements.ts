import { createHash } from 'node:crypto'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { parseCrl } from '@fleetkey/protocol/x509/crl.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { validateChain, type PathFailure } from '@fleetkey/protocol/x509/path.ts'
import type { EkCertificate } from './ek-certificate.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import { isFor, namesFirmware } from './firmware.ts'
import { registeredManufacturers } from './manufacturers.ts'
import { fail, type ReasonCode } from './reasons.ts'

/** A CA that vouches for endorsement keys. `test`: a simulator's; whatever it vouches for is `simulated`. */
export interface EndorsementCa {
  readonly certificate: Uint8Array
  readonly subject: string
  readonly test: boolean
  /** A CA below one of the others: it vouches only through its own chain. A root unless told. */
  readonly intermediate?: boolean
  /** Its newest CRL (DER), checked against it on import. */
  readonly crl?: Uint8Array | null
}

/** Who vouches for an EK. */
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
    const key = createHash('sha256').update(bytes).digest('base64')
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
const pathReason = (why: PathFailure): ReasonCode => {
  switch (why) {
    case 'wrong-usage':
      return 'ek.cert.usage'
    case 'crl-expired':
      return 'ek.cert.crl-outdated'
    case 'crl-signature':
    case 'crl-issuer':
      return 'ek.cert.crl-untrusted'
    default:
      return `ek.cert.${why}`
  }
}

const checkDenied = ({ certificate, tpm }: EkCertificate, chain: readonly Certificate[], policy: EndorsementPolicy, test: boolean): void => {
  for (const denied of policy.deny) {
    if ('serial' in denied && chain.slice(0, -1).some((one, at) => chain[at + 1]?.fingerprint === denied.issuer && one.serial === denied.serial))
      fail('ek.cert.denied', `serial ${denied.serial} of ${denied.issuer}`)
    if ('firmware' in denied && isFor(denied.manufacturer, tpm.manufacturer) && namesFirmware(denied.firmware, BigInt(tpm.version) << 32n))
      fail('ek.cert.firmware-denied', `firmware ${denied.firmware} of ${tpm.manufacturer}`)
  }
  const allowed = policy.manufacturers === null ? (test ? null : registeredManufacturers) : new Set(policy.manufacturers)
  if (allowed !== null && !allowed.has(tpm.manufacturer)) fail('ek.cert.manufacturer', `${tpm.manufacturer} in certificate ${certificate.serial}`)
}

/** The chain from an EK certificate to an imported root, none of it revoked, outdated or denied. */
export const vouchedFor = (ek: EkCertificate, endorsements: readonly EndorsementCa[], policy: EndorsementPolicy, now: number): Vouched => {
  const cas = endorsements.map((ca) => ({ ca, certificate: certificateOf(ca.certificate) }))
  const of = (intermediate: boolean): readonly Certificate[] =>
    cas.filter(({ ca }) => (ca.intermediate === true) === intermediate).map(({ certificate }) => certificate)
  const crls = endorsements.flatMap(({ crl }) => (crl === undefined || crl === null ? [] : [crlOf(crl)]))
  const result = validateChain({ leaf: ek.certificate, intermediates: of(true), roots: of(false), at: now, eku: oids.ekCertificate, crls })
  if (!result.ok) return fail(pathReason(result.why), `EK certificate: ${result.why} at ${result.at}`)
  const root = cas.find(({ certificate }) => certificate === result.chain.at(-1))?.ca ?? fail('ek.cert.unknown-issuer')
  const issuers = result.chain.slice(1)
  const test = issuers.some((issuer) => cas.find(({ certificate }) => certificate === issuer)?.ca.test === true)
  checkDenied(ek, result.chain, policy, test)
  return { root, by: issuers.map(({ fingerprint }) => fingerprint), test }
}

/** An EK that the deny list names by the hash of its public area, certificate or not. */
export const checkEkDenied = (ekHash: string, policy: EndorsementPolicy): void => {
  if (policy.deny.some((denied) => 'ek' in denied && denied.ek === ekHash)) fail('ek.cert.denied', `EK ${ekHash}`)
}
