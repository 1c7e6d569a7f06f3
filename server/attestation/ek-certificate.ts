import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { directoryNames, type NameAttribute } from '@fleetkey/protocol/x509/name.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import type { TpmKey } from './keys.ts'
import { fail } from './reasons.ts'

/** What an EK certificate says of its TPM (TCG EK credential profile §3.1.2). `version`: 32 bits, major and minor. */
export interface TpmDescription {
  /** `id:` and four bytes in hex. */
  readonly manufacturer: string
  readonly model: string
  readonly version: number
}

export interface EkCertificate {
  readonly certificate: Certificate
  readonly tpm: TpmDescription
}

const attributes = { manufacturer: '2.23.133.2.1', model: '2.23.133.2.2', version: '2.23.133.2.3' } as const
const emptyName = 2

const described = (name: readonly NameAttribute[]): TpmDescription | undefined => {
  const value = (type: string): string | undefined => {
    const found = name.filter((attribute) => attribute.type === type)
    return found.length === 1 ? found[0]?.value : undefined
  }
  const [manufacturer, model, version] = [value(attributes.manufacturer), value(attributes.model), value(attributes.version)]
  if (manufacturer === undefined || model === undefined || version === undefined) return undefined
  if (!/^id:[0-9A-Fa-f]{8}$/.test(manufacturer) || !/^id:[0-9A-Fa-f]{1,8}$/.test(version)) return undefined
  return { manufacturer: `id:${manufacturer.slice(3).toUpperCase()}`, model: model.replace(/\0+$/, ''), version: Number.parseInt(version.slice(3), 16) }
}

const readTpm = (certificate: Certificate): TpmDescription => {
  // Two names would let the reader choose one.
  const names = directoryNames(certificate.altNames)
  const tpm = names.length === 1 ? described(names[0] ?? []) : undefined
  if (tpm === undefined) return fail('ek.cert.san.missing')
  if (certificate.subject.length === emptyName && certificate.extensions.get(oids.subjectAltName)?.critical !== true) fail('ek.cert.san.not-critical')
  return tpm
}

const understood: ReadonlySet<string> = new Set([oids.basicConstraints, oids.keyUsage, oids.extKeyUsage, oids.subjectAltName])
const signing = [keyUsages.digitalSignature, keyUsages.keyCertSign, keyUsages.crlSign]

const checkProfile = (certificate: Certificate, rsa: boolean): void => {
  if (certificate.basicConstraints?.ca === true) fail('ek.cert.is-a-ca')
  if (certificate.extKeyUsage?.includes(oids.ekCertificate) !== true) fail('ek.cert.usage', `usages ${certificate.extKeyUsage?.join() ?? 'none'}`)
  const needed = rsa ? keyUsages.keyEncipherment : keyUsages.keyAgreement
  if (certificate.keyUsage?.has(needed) !== true || signing.some((usage) => certificate.keyUsage?.has(usage) === true))
    fail('ek.cert.key-usage', `key usage ${certificate.keyUsage === null ? 'none' : [...certificate.keyUsage].join()}`)
  for (const [id, { critical }] of certificate.extensions) if (critical && !understood.has(id)) fail('ek.cert.unknown-critical-extension', id)
}

/** Reads a certificate of the EK chain: strict DER, and read the same by OpenSSL. */
export const readEkCertificate = (bytes: Uint8Array): Certificate => {
  try {
    return parseCertificate(bytes)
  } catch (error) {
    if (!(error instanceof Problem)) throw error
    return fail(error.reason === 'x509.disagree' ? 'ek.cert.disagree' : 'ek.cert.malformed', error.message)
  }
}

/** An EK certificate by the TCG profile: EK usage and none of a CA or a signing key, TPM described. Whose it is, is the chain's matter. */
export const checkEkProfile = (certificate: Certificate): EkCertificate => {
  checkProfile(certificate, certificate.native.publicKey.asymmetricKeyType === 'rsa')
  return { certificate, tpm: readTpm(certificate) }
}

/** The EK certificate of this EK, by the TCG profile. */
export const checkEkCertificate = (bytes: Uint8Array, ek: TpmKey): EkCertificate => {
  const certificate = readEkCertificate(bytes)
  if (!sameBytes(certificate.spki, ek.spki) && !sameBytes(certificate.native.publicKey.export({ format: 'der', type: 'spki' }), ek.spki))
    fail('ek.cert.other-key')
  checkProfile(certificate, ek.public.type === alg.rsa)
  return { certificate, tpm: readTpm(certificate) }
}
