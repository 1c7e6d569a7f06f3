import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { crlFault, parseCrl } from '@fleetkey/protocol/x509/crl.ts'
import { fromPem, pemLabels } from '@fleetkey/protocol/x509/pem.ts'
import type { EndorsementCa } from '@fleetkey/server/attestation/endorsements.ts'
import { checkEk } from '@fleetkey/server/attestation/ek-template.ts'
import { appraiseOffline, withoutSize, type OfflineEvidence, type OfflineVerdict } from '@fleetkey/server/attestation/offline.ts'
import { readOfflinePolicy, type OfflinePolicy } from '@fleetkey/server/attestation/offline-policy.ts'
import { concat, sized, TpmFormatError, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import type { PcrBank } from '@fleetkey/tpm2/structures.ts'

export { appraiseOffline, readOfflinePolicy, type OfflineEvidence, type OfflinePolicy, type OfflineVerdict }

const limits = { blocks: 1024, length: 4 << 20 } as const

/** The CAs of a PEM bundle: self-signed ones are roots, the others only link; a CRL belongs to the CA that signed it. Throws Problem('malformed'). */
export const endorsementsOf = (pem: string): readonly EndorsementCa[] => {
  const crls = pemLabels(pem).includes('X509 CRL') ? fromPem('X509 CRL', pem, limits).map((der) => ({ der, crl: parseCrl(der) })) : []
  return fromPem('CERTIFICATE', pem, limits).map((der) => {
    const certificate = parseCertificate(der)
    const own = crls.find(({ crl }) => ['revoked', undefined].includes(crlFault(crl, certificate, certificate, crl.thisUpdate)))
    const intermediate = Buffer.compare(certificate.subject, certificate.issuer) !== 0
    return { certificate: der, subject: certificate.native.subject.replaceAll('\n', ', '), test: true, intermediate, crl: own?.der ?? null }
  })
}

const hashes: Readonly<Record<string, number>> = { sha1: alg.sha1, sha256: alg.sha256, sha384: alg.sha384, sha512: alg.sha512 }

/** `sha256:0,1,2` or `sha256:all`; undefined for another form. */
export const selectionOf = (text: string): PcrBank | undefined => {
  const [, name = '', list = ''] = /^(sha1|sha256|sha384|sha512):(all|\d{1,2}(?:,\d{1,2})*)$/.exec(text) ?? []
  const pcrs = list === 'all' ? Array.from({ length: 24 }, (_, pcr) => pcr) : [...new Set(list.split(',').map(Number))].toSorted((one, other) => one - other)
  const hash = hashes[name]
  return hash === undefined || pcrs.some((pcr) => pcr > 23) ? undefined : { hash, pcrs }
}

/**
 * A credential as tpm2_activatecredential reads it: magic, version, TPM2B_ID_OBJECT, TPM2B_ENCRYPTED_SECRET, all big-endian. The EK must be one of the TCG
 * templates; the name of the AK is computed from its public area. Throws Problem('attestation-failed') and TpmFormatError.
 */
export const credentialFile = (of: { ek: Uint8Array; ak: Uint8Array; secret: Uint8Array; random: (length: number) => Uint8Array }): Uint8Array => {
  const ek = checkEk(withoutSize(of.ek))
  if (of.secret.length === 0 || of.secret.length > 32) throw new TpmFormatError('a secret has 1 to 32 bytes')
  const { blob, secret } = makeCredential({ ek: ek.bytes, name: nameOf(withoutSize(of.ak)), secret: { bytes: () => of.secret }, random: of.random })
  return concat(u32(0xbadc_c0de), u32(1), sized(blob), sized(secret))
}
