import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { explicit, namedBits, oid, sequence, set, utf8 } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { day, extension, issueBy, makeMakerCa, type MakerCa } from './certificate.ts'

/** The simulator's own maker of EK certificates. */
export type EkCa = MakerCa

/** TCG EK credential profile §3.2.9: attributes of the TPM, in the directory name of the SAN. */
const tpmAttribute = { manufacturer: '2.23.133.2.1', model: '2.23.133.2.2', version: '2.23.133.2.3' } as const
/** TPM manufacturers are named by four bytes in hex; FKSM is what the software TPM says of itself. */
const simulator = { manufacturer: 'id:464B534D', model: 'Fleetkey simulator', version: 'id:00010000' } as const

/** A new EK CA: P-256, self-signed. */
export const makeEkCa = (now: number): EkCa => makeMakerCa('Fleetkey simulator EK CA', now)

/** EK certificate of one TPM (TCG EK credential profile §3.5): P-256, key agreement, the TPM described in the SAN. `spki`: DER of the EK. */
export const ekCertificate = (ca: EkCa, spki: Uint8Array, now: number): Uint8Array => {
  const attributes = (Object.keys(tpmAttribute) as (keyof typeof tpmAttribute)[]).map((name) => set(sequence(oid(tpmAttribute[name]), utf8(simulator[name]))))
  return issueBy(ca, {
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
  })
}
