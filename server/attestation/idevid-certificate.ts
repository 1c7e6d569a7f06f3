import { createHash, type KeyObject } from 'node:crypto'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { hardwareModuleNames, type HardwareModuleName } from '@fleetkey/protocol/x509/hardware-module-name.ts'
import { nameAttributes } from '@fleetkey/protocol/x509/name.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { fail } from './reasons.ts'

/** The factory identity of a secure element (IEEE 802.1AR-2018 §8), found to be one. */
export interface Idevid {
  readonly certificate: Certificate
  readonly key: KeyObject
  /** Hash that goes with its curve. */
  readonly hash: 'sha256' | 'sha384'
  /** The maker's serial number, of the subject. */
  readonly serialNumber: string
  readonly module: HardwareModuleName | null
}

/** SHA-256 (hex) of an IDevID's SubjectPublicKeyInfo: what batch manifests name it by. */
export const idevidHash = (spki: Uint8Array): string => createHash('sha256').update(spki).digest('hex')

/** Reads a certificate of the IDevID chain: strict DER, and read the same by OpenSSL. */
export const readIdevidCertificate = (bytes: Uint8Array): Certificate => {
  try {
    return parseCertificate(bytes)
  } catch (error) {
    if (!(error instanceof Problem)) throw error
    return fail(error.reason === 'x509.disagree' ? 'idevid.cert.disagree' : 'idevid.cert.malformed', error.message)
  }
}

const hashOf: Readonly<Record<string, Idevid['hash']>> = { prime256v1: 'sha256', secp384r1: 'sha384' }

const keyOf = ({ native }: Certificate): Pick<Idevid, 'key' | 'hash'> => {
  const key = native.publicKey
  const curve = key.asymmetricKeyDetails?.namedCurve ?? ''
  const hash = key.asymmetricKeyType === 'ec' && Object.hasOwn(hashOf, curve) ? hashOf[curve] : undefined
  return hash === undefined ? fail('idevid.cert.key', `${key.asymmetricKeyType ?? 'no key'} ${curve}`.trim()) : { key, hash }
}

const signsCertificates = [keyUsages.keyCertSign, keyUsages.crlSign]

const checkUsage = ({ basicConstraints, keyUsage }: Certificate): void => {
  if (basicConstraints?.ca === true) fail('idevid.cert.is-a-ca')
  // 802.1AR leaves the extension to the maker; where it is, it says what it must (§8.10.2).
  const signs = keyUsage?.has(keyUsages.digitalSignature) !== false
  if (!signs || signsCertificates.some((usage) => keyUsage?.has(usage) === true))
    fail('idevid.cert.key-usage', `key usage ${keyUsage === null ? 'none' : [...keyUsage].join()}`)
}

/** Exactly one: of two the reader could choose. */
const serialNumberOf = ({ subject }: Certificate): string => {
  const found = nameAttributes(subject).filter(({ type }) => type === oids.serialNumber)
  const [one] = found
  return one === undefined || found.length !== 1 || !/^[\x20-\x7e]{1,64}$/.test(one.value) ? fail('idevid.cert.serial-number') : one.value
}

const moduleOf = (certificate: Certificate): HardwareModuleName | null => {
  try {
    const names = hardwareModuleNames(certificate.altNames)
    return names.length > 1 ? fail('idevid.cert.hardware-module-name', `${names.length} of them`) : (names[0] ?? null)
  } catch (error) {
    if (!(error instanceof Problem) || error.code !== 'malformed') throw error
    return fail('idevid.cert.hardware-module-name', error.message)
  }
}

/** An IDevID certificate by its profile: a signing key of P-256 or P-384, no CA, named by the maker's serial number. Whose it is, is the chain's matter. */
export const checkIdevidCertificate = (bytes: Uint8Array): Idevid => {
  const certificate = readIdevidCertificate(bytes)
  checkUsage(certificate)
  return { certificate, ...keyOf(certificate), serialNumber: serialNumberOf(certificate), module: moduleOf(certificate) }
}
