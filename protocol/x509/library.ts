import 'reflect-metadata'
import { Crypto } from '@peculiar/webcrypto'
import * as x509 from '@peculiar/x509'

x509.cryptoProvider.set(new Crypto() as unknown as globalThis.Crypto)

/** What another library reads from a certificate: the oracle that our own writer and reader are judged by. */
export interface SecondReading {
  readonly serial: string
  readonly subject: string
  /** Its attributes in order: short name or OID, and value. */
  readonly attributes: readonly (readonly [type: string, value: string])[]
  readonly issuer: string
  readonly spki: Uint8Array
  readonly notBefore: number
  readonly notAfter: number
  readonly altNames: readonly string[]
  readonly extensions: readonly string[]
  /** Bit positions of key usage, and OIDs of extended key usage; empty without. */
  readonly usages: readonly number[]
  readonly purposes: readonly string[]
}

/** Reads a certificate with @peculiar/x509. Throws whatever it throws. */
export const secondReading = (der: Uint8Array): SecondReading => {
  const certificate = new x509.X509Certificate(Uint8Array.from(der))
  const names = certificate.getExtension(x509.SubjectAlternativeNameExtension)
  const usages = certificate.getExtension(x509.KeyUsagesExtension)?.usages ?? 0
  return {
    serial: certificate.serialNumber.toLowerCase(),
    subject: certificate.subject,
    attributes: certificate.subjectName
      .toJSON()
      .flatMap((names) => Object.entries(names).flatMap(([type, values]) => values.map((value) => [type, value] as const))),
    issuer: certificate.issuer,
    spki: new Uint8Array(certificate.publicKey.rawData),
    notBefore: certificate.notBefore.getTime(),
    notAfter: certificate.notAfter.getTime(),
    altNames: names?.names.items.map(({ value }) => value) ?? [],
    extensions: certificate.extensions.map(({ type }) => type),
    usages: [0, 1, 2, 3, 4, 5, 6, 7, 8].filter((bit) => (usages & (1 << bit)) !== 0),
    purposes: certificate.getExtension(x509.ExtendedKeyUsageExtension)?.usages.map(String) ?? [],
  }
}

/** Whether @peculiar/x509 accepts the certificate's signature under this issuer's certificate. */
export const secondVerdict = async (der: Uint8Array, issuer: Uint8Array): Promise<boolean> => {
  const [certificate, signer] = [new x509.X509Certificate(Uint8Array.from(der)), new x509.X509Certificate(Uint8Array.from(issuer))]
  return await certificate.verify({ publicKey: signer.publicKey, signatureOnly: true })
}

/** Whether @peculiar/x509 reads a certification request and accepts its proof of possession. Throws whatever it throws. */
export const secondRequestVerdict = async (der: Uint8Array): Promise<boolean> => await new x509.Pkcs10CertificateRequest(Uint8Array.from(der)).verify()
