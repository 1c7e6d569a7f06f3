import type { ReasonTable } from './reason.ts'

const otherFirmware = 'Compare with what the maker published for this chip; a genuine device is fixed by a TPM firmware update that is recorded.'
const differ = 'What two parsers read differently.'
const notGenuine = 'If the TPM is genuine, report the certificate to its maker; it cannot be admitted as it is.'

/** EK certificate and the chain that vouches for it (TCG EK credential profile, RFC 5280). */
export const endorsementReasons = {
  'ek.cert.missing': {
    cases: [1],
    meaning: 'The server demands an EK certificate and the device has none.',
    attack: 'A software TPM has no certificate of a maker.',
    remedy: 'Have the certificate written to the TPM (NV 0x01c00002, 0x01c0000a, 0x01c00016), or let the signed batch manifest vouch for it.',
  },
  'ek.cert.unknown-issuer': {
    cases: [1],
    meaning: 'No imported endorsement has the name of the issuer of the EK certificate or of a CA above it.',
    attack: 'Any software TPM brings a certificate that somebody signed.',
    remedy: "Import the maker's roots and intermediates with `fleetkey endorsement import`.",
  },
  'ek.cert.bad-signature': {
    cases: [2],
    meaning: 'An imported CA has the name of the issuer, and did not sign this certificate.',
    attack: 'A CA of the same name with another key: a name is not a chain.',
    remedy: 'Import the CA that really issued it (same name, newer key), if the maker has one.',
  },
  'ek.cert.other-key': {
    cases: [3],
    meaning: 'The EK certificate certifies another key than the EK that was presented.',
    attack: 'A genuine certificate is shown for a software EK.',
    remedy: 'Read certificate and EK from the same TPM and the same template.',
  },
  'ek.cert.expired': {
    cases: [4],
    meaning: 'A certificate of the EK chain is past its time.',
    attack: 'A certificate that its maker no longer stands for.',
    remedy: 'Import the renewed intermediate; EK certificates themselves run to 99991231235959Z as a rule.',
  },
  'ek.cert.not-yet-valid': {
    cases: [4],
    meaning: 'A certificate of the EK chain is not valid yet.',
    attack: 'A certificate made ahead of time, or a server whose clock was set back.',
    remedy: "Check the server's clock.",
  },
  'ek.cert.revoked': {
    cases: [4],
    meaning: "The maker's CRL lists a certificate of the EK chain.",
    attack: 'A TPM whose EK leaked, or a CA that was broken into.',
    remedy: 'Replace the hardware.',
  },
  'ek.cert.crl-outdated': {
    cases: [4],
    meaning: 'The imported CRL of an issuer of this chain is past its nextUpdate (or not valid yet).',
    attack: 'Withholding a newer CRL hides a revocation.',
    remedy: "Import the maker's current CRL with `fleetkey endorsement import`.",
  },
  'ek.cert.crl-untrusted': {
    cases: [4],
    meaning: 'The CRL that bears the name of an issuer of this chain was not signed by it, or it may sign none.',
    attack: 'A list in which the revoked certificate does not stand.',
    remedy: "Import the maker's current CRL with `fleetkey endorsement import`.",
  },
  'ek.cert.denied': {
    cases: [4],
    meaning: "The operator's deny list names this EK, or this issuer and serial.",
    attack: 'Hardware known to be lost, cloned or extracted.',
    remedy: 'Take the entry off the deny list if it was a mistake.',
  },
  'ek.cert.firmware-denied': {
    cases: [4],
    meaning: "The operator's deny list names the TPM firmware version that the EK certificate states (2.23.133.2.3).",
    attack: 'TPMs that left the factory with a broken key generator or broken firmware.',
    remedy: otherFirmware,
  },
  'ek.cert.usage': {
    cases: [5],
    meaning: 'The certificate lacks the extended key usage tcg-kp-EKCertificate (2.23.133.8.1), or an issuer is restricted to other usages.',
    attack: 'An AK, TLS or platform certificate of the same maker is shown as an EK certificate.',
    remedy: notGenuine,
  },
  'ek.cert.is-a-ca': {
    cases: [5],
    meaning: 'The EK certificate says that it is a CA.',
    attack: 'Whoever has a sub-CA makes EKs of their own.',
    remedy: notGenuine,
  },
  'ek.cert.key-usage': {
    cases: [5],
    meaning: 'Key usage is missing, or not that of an EK: keyEncipherment for RSA, keyAgreement for ECC, and never a signing usage.',
    attack: 'A certificate for a signing key is shown as an EK certificate.',
    remedy: notGenuine,
  },
  'ek.cert.unknown-critical-extension': {
    cases: [6],
    meaning: 'A certificate of the chain has a critical extension that the verifier does not know.',
    attack: 'A restriction that the issuer meant is skipped.',
    remedy: notGenuine,
  },
  'ek.cert.manufacturer': {
    cases: [6],
    meaning: 'The TPM manufacturer in the certificate is none of the TCG registry, or not one that the operator allows.',
    attack: 'A CA that is trusted for one maker vouches for another.',
    remedy: 'Add the manufacturer to the allowed ones, if it is meant to be.',
  },
  'ek.cert.san.missing': {
    cases: [6],
    meaning: 'The subject alternative name does not say manufacturer, model and version of the TPM as one directory name.',
    attack: 'A certificate whose firmware version and maker cannot be judged.',
    remedy: notGenuine,
  },
  'ek.cert.san.not-critical': {
    cases: [6],
    meaning: 'The subject is empty and the subject alternative name is not critical (RFC 5280 §4.2.1.6).',
    attack: 'A parser that skips the name takes the certificate for anybody.',
    remedy: notGenuine,
  },
  'ek.cert.malformed': {
    cases: [20],
    meaning: 'The EK certificate is not strict DER of an X.509 v3 certificate.',
    attack: 'What two parsers read differently.',
    remedy: 'Cut the padding of the NV area at the length that the certificate states.',
  },
  'ek.cert.disagree': {
    cases: [20],
    meaning: 'Two independent parsers read this certificate differently (key, serial, subject or alternative name).',
    attack: 'A certificate that is one thing to the checker and another to the user.',
    remedy: notGenuine,
  },
  'ek.cert.malformed-extension': {
    cases: [20],
    meaning: 'A certificate of the chain lacks an extension that RFC 5280 §4.2 makes compulsory (key identifiers), or has it in another form.',
    attack: differ,
    remedy: notGenuine,
  },
  'ek.cert.name-constraints': {
    cases: [6],
    meaning: 'A CA of the chain may not issue for this name.',
    attack: 'A CA that is limited to its own names vouches for others.',
    remedy: notGenuine,
  },
  'ek.cert.not-a-ca': {
    cases: [5],
    meaning: 'An issuer in the chain is not a CA (basicConstraints, keyCertSign).',
    attack: 'The holder of an ordinary certificate issues EK certificates.',
    remedy: "Import the maker's real intermediates.",
  },
  'ek.cert.path-length': {
    cases: [5],
    meaning: 'A CA of the chain issued below its path length.',
    attack: 'A CA that may only issue EK certificates makes another CA.',
    remedy: "Import the maker's real intermediates.",
  },
  'ek.cert.too-long': {
    cases: [2],
    meaning: 'The chain has more than six certificates.',
    attack: 'Work without end for the verifier.',
    remedy: 'Import the intermediate nearest to the EK as an endorsement.',
  },
  'ek.cert.weak-algorithm': {
    cases: [2],
    meaning: 'A certificate of the chain is signed with SHA-1, MD5 or another algorithm that is not accepted.',
    attack: 'Collisions make a second certificate with the same signature.',
    remedy: 'Import a newer intermediate of the maker.',
  },
} as const satisfies ReasonTable
