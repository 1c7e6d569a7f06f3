import type { ReasonTable } from './reason.ts'

const again = 'The agent says hello again by itself.'
const batch = 'Have the station sign and import a manifest that lists this board.'

/** Proof of activation, manifest, challenge, identity, delivery, and the comparison with reference values. */
export const protocolReasons = {
  'method.unknown': {
    cases: [],
    meaning: 'The device attests by a method that this server does not know.',
    attack: 'A method whose checks were never made.',
    remedy: 'Update the server.',
  },
  'certify.missing': { cases: [22, 23], meaning: 'A certification is missing from the answer.', attack: 'A key that no TPM vouches for.', remedy: again },
  'credential.proof': {
    cases: [18, 19, 51],
    meaning: 'The proof of activation is not that of this secret, connection and transcript.',
    attack: 'An AK beside the EK (another TPM, software), a secret of another session, evidence relayed from another connection.',
    remedy: again,
  },
  'challenge.unknown': { cases: [18, 52], meaning: 'There is no such challenge (any more).', attack: 'A recorded enrolment is played again.', remedy: again },
  'challenge.spent': { cases: [18, 52], meaning: 'The challenge was answered before.', attack: 'A secret or a recorded answer is used twice.', remedy: again },
  'challenge.expired': { cases: [18, 28], meaning: 'The answer came after the deadline.', attack: 'Time to find a secret.', remedy: again },
  'challenge.client': {
    cases: [18, 51],
    meaning: 'The challenge was made for another client.',
    attack: "Somebody else's challenge is answered.",
    remedy: again,
  },
  'connect.other-device': {
    cases: [51],
    meaning: 'The peer presented the client id of another device than its certificate is for.',
    attack: 'A device of the fleet poses as another one.',
    remedy: 'Look at who has access to the device whose record says so.',
  },
  'enrol.other-device': {
    cases: [51],
    meaning: 'The connection of one device presented the EK of another.',
    attack: 'Evidence of one device is used for another one.',
    remedy: 'Look at who has access to the device whose connection it was.',
  },
  'manifest.unknown-ek': { cases: [10], meaning: 'No signed batch manifest lists this EK.', attack: 'A genuine TPM that is not ours (cuckoo).', remedy: batch },
  'manifest.serial-mismatch': {
    cases: [10],
    meaning: 'The manifest has this EK under another serial.',
    attack: 'One of our TPMs answers for another of our boards.',
    remedy: batch,
  },
  'manifest.window-closed': {
    cases: [52],
    meaning: 'The claim window of its batch ended before this device enrolled for the first time.',
    attack: 'A board that was stolen between factory and plant, or kept for later.',
    remedy: 'Find out where the board was; then `fleetkey batch window BATCH --claim-until DATE`.',
  },
  'identity.other-ek': {
    cases: [9],
    meaning: 'The device id is bound to another EK.',
    attack: 'Somebody takes over a device by its id.',
    remedy: 'A board whose TPM was replaced is a new device.',
  },
  'return.other-srk': {
    cases: [38],
    meaning: 'The device returns with another SRK: its owner hierarchy was cleared.',
    attack: 'A cleared TPM is passed off as the known one.',
    remedy: 'Enrol again.',
  },
  'reference.none': {
    cases: [47],
    meaning: "There are no reference values for the device's model.",
    attack: 'A release of another model.',
    remedy: 'Import the release manifests of the model.',
  },
  'reference.pcr-N': {
    cases: [47],
    meaning: 'PCR N is the lowest that differs from the release that agrees most.',
    attack: 'A changed boot stage, a release of another model, a debug build.',
    remedy: 'Reinstall an accepted release; import its reference values if it is one.',
  },
  'release.withdrawn': {
    cases: [47],
    meaning: 'The release that runs was withdrawn.',
    attack: 'A release with known holes.',
    remedy: 'Install the current release.',
  },
  'release.debug': {
    cases: [47],
    meaning: 'A debug build runs.',
    attack: 'Doors that are open for developers.',
    remedy: 'Install a production release, or let the group policy warn only (`onDebug`).',
  },
  'release.not-accepted': {
    cases: [47],
    meaning: "The release is not among those that the group's policy accepts.",
    attack: 'A release that was never meant for this fleet.',
    remedy: 'Install an accepted release, or accept this one.',
  },
  'release.below-minimum': {
    cases: [47],
    meaning: "The release is below the minimum of the group's policy.",
    attack: 'Back to a release with known holes.',
    remedy: 'Install the current release.',
  },
  'release.rollback': {
    cases: [47],
    meaning: 'The firmware is older than what this device has run.',
    attack: 'Back to a release with known holes.',
    remedy: 'Install the current release.',
  },
  'attest.challenge': {
    cases: [28, 51],
    meaning: 'Evidence that was not asked for on this connection, or for another challenge.',
    attack: 'Evidence that was recorded, or is of another connection.',
    remedy: again,
  },
  'attest.expired': { cases: [28], meaning: 'Evidence came after the deadline of its challenge.', attack: 'Old evidence.', remedy: again },
  'ima.unasked': {
    cases: [48],
    meaning: 'An IMA list came that was not asked for, or from another entry than was asked for.',
    attack: 'What is not asked for is not bound.',
    remedy: again,
  },
  'recipient.unasked': {
    cases: [23],
    meaning: 'A recipient key came that was not asked for, or none came.',
    attack: 'A key that keys are wrapped to is exchanged.',
    remedy: again,
  },
  'key.import-refused': {
    cases: [49],
    meaning: 'The TPM of the device refused to import the key; the device says so (reason of its holding).',
    attack: 'The blob, its seed or its public area was altered, or the inner key is that of another delivery.',
    remedy: 'The key is delivered anew; if it stays, the record holds the SRK of another TPM: enrol again.',
  },
  'firmware.approval-refused': {
    cases: [53],
    meaning: 'The TPM of the device refused an approval of the firmware that runs; the device says so (log, status) and stays locked.',
    attack: 'An approval by another key, for another policyRef (before a withdrawal) or for other PCRs.',
    remedy: 'Connect the device: it gets the approvals of its model anew.',
  },
  'acknowledge.proof': {
    cases: [50],
    meaning: 'The proof of use was not made with the new key over its nonce.',
    attack: 'A device says that it uses a key which it cannot open.',
    remedy: again,
  },
  'acknowledge.nonce': {
    cases: [50],
    meaning: 'The acknowledgement is for another delivery.',
    attack: 'An older acknowledgement is played again.',
    remedy: again,
  },
} as const satisfies ReasonTable
