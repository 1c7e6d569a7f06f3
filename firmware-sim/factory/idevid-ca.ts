import { createPublicKey, generateKeyPairSync, type KeyObject } from 'node:crypto'
import { der, explicit, namedBits, octetString, oid, sequence, set, utf8 } from '@fleetkey/protocol/x509/der.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { day, extension, issueBy, makeMakerCa, type MakerCa } from './certificate.ts'

/** Kind of hardware in the simulator's hardwareModuleNames, under Fleetkey's own arc. */
const hardwareType = '1.3.6.1.4.1.58888.3.1'

/** A new CA of IDevIDs: P-256, self-signed. */
export const makeIdevidCa = (now: number): MakerCa => makeMakerCa('Fleetkey simulator IDevID CA', now)

/** IDevID certificate of one secure element (IEEE 802.1AR-2018 §8): serialNumber in the subject, hardwareModuleName, no expiry, signing only. */
export const idevidCertificate = (ca: MakerCa, spki: Uint8Array, serial: string, now: number): Uint8Array =>
  issueBy(ca, {
    subject: sequence(set(sequence(oid(oids.serialNumber), utf8(serial)))),
    spki,
    notBefore: now - day,
    extensions: [
      extension(oids.basicConstraints, true, sequence()),
      extension(oids.keyUsage, true, namedBits([keyUsages.digitalSignature])),
      extension(oids.subjectAltName, false, sequence(hardwareModuleName(hardwareType, new TextEncoder().encode(serial)))),
    ],
  })

/** OtherName with a hardwareModuleName (RFC 4108 §5). */
export const hardwareModuleName = (type: string, serial: Uint8Array): Uint8Array =>
  der(0xa0, Buffer.concat([oid(oids.hardwareModuleName), explicit(0, sequence(oid(type), octetString(serial)))]))

/** The secret and the papers of a secure element as a factory makes them. */
export interface MadeElement {
  readonly key: KeyObject
  /** DER SubjectPublicKeyInfo. */
  readonly spki: Uint8Array
  readonly certificate: Uint8Array
}

/** A secure element in software, with its factory identity. */
export const makeElement = (ca: MakerCa, serial: string, now: number, curve: 'prime256v1' | 'secp384r1' = 'prime256v1'): MadeElement => {
  const { privateKey: key } = generateKeyPairSync('ec', { namedCurve: curve })
  const spki = new Uint8Array(createPublicKey(key).export({ format: 'der', type: 'spki' }))
  return { key, spki, certificate: idevidCertificate(ca, spki, serial, now) }
}
