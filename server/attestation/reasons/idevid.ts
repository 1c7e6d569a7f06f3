import type { ReasonTable } from './reason.ts'

const makers = "Import the maker's real intermediates with `fleetkey endorsement import --for idevid`."
const notGenuine = 'If the secure element is genuine, report the certificate to its maker; it cannot be admitted as it is.'
const again = 'The agent says hello again by itself.'

/** Factory identity of a secure element and the chain that vouches for it (IEEE 802.1AR, RFC 5280). The acceptance list is of TPMs: no numbers. */
export const idevidReasons = {
  'idevid.cert.unknown-issuer': {
    cases: [],
    meaning: 'No CA imported for IDevIDs has the name of the issuer. CAs that were imported for EKs do not count.',
    attack: 'A certificate of any CA at all, or a CA of TPMs that vouches for a key which is in no secure element.',
    remedy: "Import the maker's roots with `fleetkey endorsement import --for idevid`.",
  },
  'idevid.cert.bad-signature': {
    cases: [],
    meaning: 'An imported CA has the name of the issuer, and did not sign this certificate.',
    attack: 'A CA of the same name with another key.',
    remedy: 'Import the CA that really issued it (same name, newer key), if the maker has one.',
  },
  'idevid.cert.expired': {
    cases: [],
    meaning: 'A certificate of the IDevID chain is past its time.',
    attack: 'A certificate that its maker no longer stands for.',
    remedy: 'Import the renewed intermediate; IDevIDs themselves run to 99991231235959Z as a rule.',
  },
  'idevid.cert.not-yet-valid': {
    cases: [],
    meaning: 'A certificate of the IDevID chain is not valid yet.',
    attack: 'A certificate made ahead of time, or a server whose clock was set back.',
    remedy: "Check the server's clock.",
  },
  'idevid.cert.revoked': {
    cases: [],
    meaning: "The maker's CRL lists a certificate of the IDevID chain.",
    attack: 'A secure element whose key leaked, or a CA that was broken into.',
    remedy: 'Replace the hardware.',
  },
  'idevid.cert.crl-outdated': {
    cases: [],
    meaning: 'The imported CRL of an issuer of this chain is past its nextUpdate (or not valid yet).',
    attack: 'Withholding a newer CRL hides a revocation.',
    remedy: "Import the maker's current CRL with `fleetkey endorsement import --for idevid`.",
  },
  'idevid.cert.crl-untrusted': {
    cases: [],
    meaning: 'The CRL that bears the name of an issuer of this chain was not signed by it, or it may sign none.',
    attack: 'A list in which the revoked certificate does not stand.',
    remedy: "Import the maker's current CRL with `fleetkey endorsement import --for idevid`.",
  },
  'idevid.cert.denied': {
    cases: [],
    meaning: "The operator's deny list names this IDevID key, or this issuer and serial.",
    attack: 'Hardware known to be lost, cloned or extracted.',
    remedy: 'Take the entry off the deny list if it was a mistake.',
  },
  'idevid.cert.usage': {
    cases: [],
    meaning: 'The certificate, or an issuer of it, names extended key usages, and clientAuth is not among them.',
    attack: 'A server, code-signing or EK certificate of the same maker is shown as an IDevID.',
    remedy: makers,
  },
  'idevid.cert.is-a-ca': {
    cases: [],
    meaning: 'The IDevID certificate says that it is a CA.',
    attack: 'Whoever has a sub-CA is any device.',
    remedy: notGenuine,
  },
  'idevid.cert.key-usage': {
    cases: [],
    meaning: 'Key usage does not allow digital signatures, or allows signing certificates or CRLs.',
    attack: 'The key of a CA, or one for encryption only, poses as a device.',
    remedy: notGenuine,
  },
  'idevid.cert.key': {
    cases: [],
    meaning: 'The key is not of P-256 or P-384.',
    attack: 'A key that is weak, or of an algorithm that nobody checks here.',
    remedy: 'Use the P-256 or P-384 identity of the secure element; most have one.',
  },
  'idevid.cert.serial-number': {
    cases: [],
    meaning: 'The subject does not have exactly one serialNumber attribute of printable ASCII (802.1AR-2018 §8.6).',
    attack: 'A certificate of some other kind by the same maker.',
    remedy: notGenuine,
  },
  'idevid.cert.hardware-module-name': {
    cases: [],
    meaning: 'The hardwareModuleName in the subject alternative name (RFC 4108 §5) is there twice, or is malformed.',
    attack: 'Of two names the reader chooses one.',
    remedy: notGenuine,
  },
  'idevid.cert.unknown-critical-extension': {
    cases: [],
    meaning: 'A certificate of the chain has a critical extension that the verifier does not know.',
    attack: 'A restriction that the issuer meant is skipped.',
    remedy: notGenuine,
  },
  'idevid.cert.malformed': {
    cases: [],
    meaning: 'A certificate of the chain that the device sent is not strict DER of an X.509 v3 certificate.',
    attack: 'What two parsers read differently.',
    remedy: notGenuine,
  },
  'idevid.cert.disagree': {
    cases: [],
    meaning: 'Two independent parsers read a certificate differently (key, serial, subject or alternative name).',
    attack: 'A certificate that is one thing to the checker and another to the user.',
    remedy: notGenuine,
  },
  'idevid.cert.malformed-extension': {
    cases: [],
    meaning: 'A certificate of the chain lacks an extension that RFC 5280 §4.2 makes compulsory (key identifiers), or has it in another form.',
    attack: 'What two parsers read differently.',
    remedy: notGenuine,
  },
  'idevid.cert.name-constraints': {
    cases: [],
    meaning: 'A CA of the chain may not issue for this name.',
    attack: 'A CA that is limited to its own names vouches for others.',
    remedy: notGenuine,
  },
  'idevid.cert.not-a-ca': {
    cases: [],
    meaning: 'An issuer in the chain is not a CA (basicConstraints, keyCertSign).',
    attack: 'The holder of an IDevID issues IDevIDs.',
    remedy: makers,
  },
  'idevid.cert.path-length': {
    cases: [],
    meaning: 'A CA of the chain issued below its path length.',
    attack: 'A CA that may only issue IDevIDs makes another CA.',
    remedy: makers,
  },
  'idevid.cert.too-long': {
    cases: [],
    meaning: 'The chain is longer than is followed.',
    attack: 'Work without end for the verifier.',
    remedy: 'Import the intermediate nearest to the IDevID as an endorsement.',
  },
  'idevid.cert.weak-algorithm': {
    cases: [],
    meaning: 'A certificate of the chain is signed with SHA-1, MD5 or another algorithm that is not accepted.',
    attack: 'Collisions make a second certificate with the same signature.',
    remedy: 'Import a newer intermediate of the maker.',
  },
  'idevid.possession': {
    cases: [],
    meaning: 'The IDevID key did not sign this conversation over this connection.',
    attack:
      'A certificate that everybody can read is shown without its key; an answer is played again or relayed from another connection; a request is exchanged.',
    remedy: again,
  },
  'manifest.unknown-idevid': {
    cases: [],
    meaning: 'No signed batch manifest lists this IDevID key.',
    attack: 'A genuine secure element of the same maker that is not ours.',
    remedy: 'Have the station sign and import a manifest that lists this board (column `idevid`).',
  },
  'identity.other-idevid': {
    cases: [],
    meaning: 'The device id is bound to another IDevID key, or to hardware of another kind.',
    attack: 'Somebody takes over a device by its id.',
    remedy: 'A board whose secure element was replaced is a new device.',
  },
} as const satisfies ReasonTable
