import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { inside, readOid, tags, whole, type Element } from '@fleetkey/protocol/x509/der.ts'
import type { FoundEk } from '@fleetkey/tpm2/ek-certificates.ts'
import type { TpmReport } from '@fleetkey/tpm2/inspect.ts'
import { fail, messageOf, ok, warn, type Finding } from './finding.ts'

/** Attributes of the TPM in the subject alternative name (TCG EK credential profile §3.2.9). */
const attributes = { manufacturer: '2.23.133.2.1', model: '2.23.133.2.2', version: '2.23.133.2.3' } as const
/** GeneralName `directoryName`. */
const directoryName = 0xa4
const tcgEk = '2.23.133.8.1'

const text = ({ content }: Element): string => new TextDecoder('utf-8').decode(content).replaceAll(/\p{Cc}/gu, '?')

/** Attribute values of a Name, by OID; the last of several counts. */
const namedValues = (name: Element): ReadonlyMap<string, string> => {
  const values = new Map<string, string>()
  const rdns = inside(name)
  while (!rdns.done) {
    const set = rdns.enter(tags.set)
    while (!set.done) {
      const one = set.enter(tags.sequence)
      values.set(readOid(one.next(tags.oid)), text(one.next()))
    }
  }
  return values
}

export interface EkFacts {
  readonly index: string
  readonly kind: string
  readonly used: boolean
  readonly subject: string
  readonly issuer: string
  readonly manufacturer: string | null
  readonly model: string | null
  readonly version: string | null
  readonly notBefore: string
  readonly notAfter: string
  /** SHA-256 of the certificate, hexadecimal. */
  readonly fingerprint: string
}

const oneLine = (name: string): string => name.trim().replaceAll(/\s*\n\s*/g, ', ')
/** `id:49465800` stands for the four letters of the vendor registry. */
const vendorName = (value: string | undefined): string | null => {
  const hex = /^id:([0-9a-f]{8})$/i.exec(value ?? '')?.[1]
  const letters = hex === undefined ? '' : Buffer.from(hex, 'hex').toString('latin1').replaceAll('\0', '').trim()
  return value === undefined ? null : /^[\x20-\x7e]+$/.test(letters) ? `${letters} (${value})` : value
}

const factsOf = (found: FoundEk, certificate: Certificate): EkFacts => {
  const directory = certificate.altNames.find((name) => name[0] === directoryName)
  const values = directory === undefined ? new Map<string, string>() : namedValues(whole(whole(directory, directoryName).content, tags.sequence))
  return {
    index: `0x${found.index.toString(16).padStart(8, '0')}`,
    kind: found.kind,
    used: found.used,
    subject: oneLine(certificate.native.subject ?? ''),
    issuer: oneLine(certificate.native.issuer),
    manufacturer: vendorName(values.get(attributes.manufacturer)),
    model: values.get(attributes.model) ?? null,
    version: values.get(attributes.version) ?? null,
    notBefore: new Date(certificate.notBefore).toISOString(),
    notAfter: new Date(certificate.notAfter).toISOString(),
    fingerprint: certificate.fingerprint,
  }
}

const describe = (facts: EkFacts): string =>
  `${facts.kind} at ${facts.index}: issuer ${facts.issuer}${facts.manufacturer === null ? '' : `; TPM ${[facts.manufacturer, facts.model, facts.version].filter((one) => one !== null).join(' ')}`}; until ${facts.notAfter.slice(0, 10)}`

const judge = (facts: EkFacts, certificate: Certificate, of: { spki: Uint8Array | null; now: number }): Finding => {
  const found = describe(facts)
  if (of.spki !== null && Buffer.compare(of.spki, certificate.spki) !== 0)
    return fail(
      'EK certificate',
      `${found}; it is for another key than the TPM's`,
      'the certificate was copied here or the TPM was given new seeds: ask its maker',
    )
  if (certificate.notAfter < of.now || certificate.notBefore > of.now)
    return warn('EK certificate', `${found}; not valid at this machine's time`, 'set the clock; a certificate that has ended is refused by the server')
  if (certificate.extKeyUsage?.includes(tcgEk) !== true)
    return warn('EK certificate', `${found}; not marked as an EK certificate`, 'the server may refuse it; the batch manifest can name this EK instead')
  return ok('EK certificate', found)
}

/** Findings about the EK certificates. `spki`: of the EK that the TPM made for the certificate in use; null when it was not asked for one. Pure. */
export const ekFindings = (
  report: Pick<TpmReport, 'ekCertificates'>,
  of: { readonly spki: Uint8Array | null; readonly now: number },
): { readonly findings: readonly Finding[]; readonly facts: readonly EkFacts[] } => {
  const findings: Finding[] = []
  const facts: EkFacts[] = []
  for (const found of report.ekCertificates) {
    const where = `${found.kind} at 0x${found.index.toString(16).padStart(8, '0')}`
    if (found.der === null) {
      findings.push(
        warn('EK certificate', `${where}: ${found.problem ?? 'not readable'}`, 'it may need the owner\'s password: "tpmAuth": {"ownerAuthFile": "…"}'),
      )
      continue
    }
    try {
      const certificate = parseCertificate(found.der)
      const one = factsOf(found, certificate)
      facts.push(one)
      findings.push(found.used ? judge(one, certificate, of) : ok('EK certificate (other)', describe(one)))
    } catch (thrown) {
      findings.push(warn('EK certificate', `${where}: ${messageOf(thrown)}`, 'the server will not accept it either; the batch manifest has to name this EK'))
    }
  }
  if (!report.ekCertificates.some(({ used }) => used))
    findings.push(
      warn(
        'EK certificate',
        report.ekCertificates.length === 0 ? 'none in the TPM' : 'none for a template that the agent uses (L-1, L-2, H-3)',
        'the batch manifest has to name the hash of this EK; some makers give the certificate on a web page',
      ),
    )
  return { findings, facts }
}
