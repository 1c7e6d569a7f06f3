import type { ReasonTable } from './reason.ts'

const another = 'Create another one with `fleetkey token create` and put it on the device.'
const again = 'The agent says hello again by itself.'

/** Single-use tokens, and keys in software. The acceptance list is of TPMs: no numbers. */
export const tokenReasons = {
  'token.missing': {
    cases: [],
    meaning: 'A device that has no identity yet brought no token.',
    attack: 'Anybody who can reach the server enrols.',
    remedy: another,
  },
  'token.unknown': { cases: [], meaning: 'There is no such token.', attack: 'A token that was made up.', remedy: another },
  'token.revoked': { cases: [], meaning: 'The token was revoked by an operator.', attack: 'A token that got into other hands.', remedy: another },
  'token.expired': { cases: [], meaning: 'The token is past its time.', attack: 'A token that was forgotten somewhere and found.', remedy: another },
  'token.other-batch': {
    cases: [],
    meaning: 'The token is for boards of another batch.',
    attack: 'A token for the laboratory lets a device into the plant.',
    remedy: 'Create a token for the batch of this board.',
  },
  'token.other-device': {
    cases: [],
    meaning: 'The token is for another device.',
    attack: 'A token is used for a board that it was not made for.',
    remedy: 'Create a token for this device, or one that is bound to its batch only.',
  },
  'token.spent': {
    cases: [],
    meaning: 'The token was used: by another device, or by another LDevID key.',
    attack: 'A token that was copied is used twice.',
    remedy: another,
  },
  'token.identity-exists': {
    cases: [],
    meaning: 'The device has an identity already, with another LDevID key.',
    attack: 'Whoever gets a token of a batch takes over one of its devices.',
    remedy: 'A board that lost its keys is a new device: revoke this one and import a manifest that lists the board under another device id.',
  },
  'token.proof': {
    cases: [],
    meaning: 'The proof was not made with this token over this conversation and connection.',
    attack: 'A token is guessed; an answer is played again, relayed from another connection, or its request exchanged.',
    remedy: again,
  },
  'ldevid.possession': {
    cases: [],
    meaning: 'The LDevID key did not sign this conversation over this connection.',
    attack: 'An answer is played again or relayed from another connection.',
    remedy: again,
  },
  'ldevid.expired': {
    cases: [],
    meaning: 'The LDevID certificate of a device that comes back by its LDevID key alone has expired.',
    attack: 'A disk that was thrown away years ago comes back to life.',
    remedy: 'The device is a new one: revoke it and import a manifest that lists the board under another device id.',
  },
  'key.two-roles': {
    cases: [],
    meaning: 'One key was presented in two roles (LDevID, recipient, IDevID).',
    attack: 'What is signed in one role is taken for something else in the other.',
    remedy: 'Make a key of its own for every role.',
  },
  'manifest.no-token-row': {
    cases: [],
    meaning: 'No signed batch manifest lists a board of this serial without a hardware key of its own.',
    attack: 'A board with a TPM or a secure element is impersonated with nothing but a token.',
    remedy: 'A board whose row names an EK or an IDevID enrols by that. Others need a row with neither.',
  },
  'identity.other-serial': {
    cases: [],
    meaning: 'The device id is bound to hardware of another kind.',
    attack: 'Somebody takes over a device by its serial.',
    remedy: 'A board whose hardware was replaced is a new device.',
  },
  'method.mixed': {
    cases: [],
    meaning: 'Hello and answer are by different methods.',
    attack: 'A conversation that began by the strict method is finished by an easier one.',
    remedy: again,
  },
  'firmware.unmeasured': {
    cases: [],
    meaning:
      'The device has no TPM that would measure its firmware. A warning, unless the policy of its group names releases, a lowest one, or a list of measured files.',
    attack: 'A device that runs anything at all.',
    remedy: 'Put it into a group whose policy names none of these, or replace it by a board with a TPM.',
  },
} as const satisfies ReasonTable
