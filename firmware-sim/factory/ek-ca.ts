import { createHash, generateKeyPairSync, sign, type KeyObject } from 'node:crypto'
import { nameOf, parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { ecdsaSha256 } from '@fleetkey/protocol/x509/csr.ts'
import { bitString, boolean, der, explicit, integer, namedBits, octetString, oid, sequence, set, tags, time, utf8 } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'

/** The simulator's own maker of EK certificates: it vouches for software, so a server admits it only as a test endorsement. */
export interface EkCa {
  readonly certificate: Uint8Array
  readonly key: KeyObject
}

/** TCG EK credential profile §3.2.9: attributes of the TPM, in the directory name of the SAN. */
const tpmAttribute = { manufacturer: '2.23.133.2.1', model: '2.23.133.2.2', version: '2.23.133.2.3' } as const
/** TPM manufacturers are named by four bytes in hex; FKSM is what the software TPM says of itself. */
const simulator = { manufacturer: 'id:464B534D', model: 'Fleetkey simulator', version: 'id:00010000' } as const

const day = 86_400_000
/** 99991231235959Z: no expiry (RFC 5280 §4.1.2.5). */
const never = Date.UTC(9999, 11, 31, 23, 59, 59)

const extension = (id: string, critical: boolean, value: Uint8Array): Uint8Array => sequence(oid(id), ...(critical ? [boolean(true)] : []), octetString(value))
const identifier = (spki: Uint8Array): Uint8Array => createHash('sha256').update(spki).digest().subarray(0, 20)

const issue = (
  by: { readonly name: Uint8Array; readonly spki: Uint8Array; readonly key: KeyObject },
  of: { readonly subject: Uint8Array; readonly spki: Uint8Array; readonly notBefore: number; readonly extensions: readonly Uint8Array[] },
): Uint8Array => {
  const serial = createHash('sha256').update(by.spki).update(of.spki).digest().subarray(0, 16)
  serial[0] = ((serial[0] ?? 0) & 0x7f) | 0x40
  const tbs = sequence(
    explicit(0, Uint8Array.of(tags.integer, 1, 2)),
    integer(serial),
    ecdsaSha256,
    by.name,
    sequence(time(of.notBefore), time(never)),
    of.subject,
    of.spki,
    explicit(
      3,
      sequence(
        ...of.extensions,
        extension(oids.subjectKeyIdentifier, false, octetString(identifier(of.spki))),
        extension(oids.authorityKeyIdentifier, false, sequence(der(0x80, identifier(by.spki)))),
      ),
    ),
  )
  return sequence(tbs, ecdsaSha256, bitString(sign('sha256', tbs, by.key)))
}

const caName = 'Fleetkey simulator EK CA'

/** A new EK CA: P-256, self-signed. */
export const makeEkCa = (now: number): EkCa => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const name = nameOf(caName)
  const certificate = issue(
    { name, spki, key: privateKey },
    {
      subject: name,
      spki,
      notBefore: now - day,
      extensions: [
        extension(oids.basicConstraints, true, sequence(boolean(true), integer(Uint8Array.of(0)))),
        extension(oids.keyUsage, true, namedBits([keyUsages.keyCertSign, keyUsages.crlSign])),
      ],
    },
  )
  return { certificate, key: privateKey }
}

/** EK certificate of one TPM (TCG EK credential profile §3.5): P-256, key agreement, the TPM described in the SAN. `spki`: DER of the EK. */
export const ekCertificate = (ca: EkCa, spki: Uint8Array, now: number): Uint8Array => {
  const issuer = parseCertificate(ca.certificate)
  const attributes = (Object.keys(tpmAttribute) as (keyof typeof tpmAttribute)[]).map((name) => set(sequence(oid(tpmAttribute[name]), utf8(simulator[name]))))
  return issue(
    { name: issuer.subject, spki: issuer.spki, key: ca.key },
    {
      subject: nameOf('EK of a simulated TPM'),
      spki,
      notBefore: now - day,
      extensions: [
        extension(oids.basicConstraints, true, sequence()),
        extension(oids.keyUsage, true, namedBits([keyUsages.keyAgreement])),
        extension(oids.extKeyUsage, false, sequence(oid(oids.ekCertificate))),
        // [4] directoryName is explicit: a Name is a CHOICE (X.680 §31.2.7).
        extension(oids.subjectAltName, false, sequence(explicit(4, sequence(...attributes)))),
      ],
    },
  )
}
