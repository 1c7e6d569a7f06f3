import { execFileSync } from 'node:child_process'

/** The certificates in an answer of EST (base64 of a certs-only message), as openssl reads them. PEM, in order. */
export const certificatesIn = (body: string): readonly string[] =>
  execFileSync('openssl', ['pkcs7', '-inform', 'DER', '-print_certs'], { input: Buffer.from(body, 'base64'), encoding: 'utf8' }).match(
    /-----BEGIN CERTIFICATE-----[^]*?-----END CERTIFICATE-----\n/g,
  ) ?? []
