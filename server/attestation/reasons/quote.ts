import type { Reason, ReasonTable } from './reason.ts'

/** What an AK states: the quote, and the certification of each other key. */
export type StatementRole = 'quote' | 'srk' | 'ldevid' | 'recipient'
const again = 'Attest again; a device that keeps failing has a broken agent, or somebody on its way.'

const statementFaults = {
  statement: { cases: [20], meaning: 'is no TPMS_ATTEST: trailing bytes or lengths that do not fit', attack: 'What two parsers read differently.' },
  magic: { cases: [26], meaning: 'does not start with TPM_GENERATED (ff544347)', attack: 'Bytes that an unrestricted key signed and no TPM made.' },
  type: { cases: [27], meaning: 'is of another type than asked', attack: 'One statement of the TPM is passed off as another.' },
  signature: { cases: [24, 25, 36], meaning: 'is not signed by the AK', attack: 'Altered, or of another device.' },
  'signature.malformed': { cases: [20], meaning: 'comes with a signature that is no TPMT_SIGNATURE', attack: 'What two parsers read differently.' },
  'signature.scheme': {
    cases: [40],
    meaning: "comes with a signature in another scheme or hash than the AK's own",
    attack: 'RSASSA for PSS, SHA-1 for SHA-256: the attacker chooses the algorithm.',
  },
  'signature.range': {
    cases: [40],
    meaning: 'comes with an r or s of zero, or beyond the order of the curve',
    attack: 'Signatures that careless verifiers accept for any message.',
  },
  nonce: {
    cases: [21, 28, 51],
    meaning: 'was made for another nonce, connection, transcript or role',
    attack: 'Replay, relay, or a nonce of which only a part is compared.',
  },
  signer: {
    cases: [37],
    meaning: 'names a qualified signer that does not follow from hierarchy (or EK) and AK',
    attack: 'An AK below a parent that is not in this TPM.',
  },
} as const
export type StatementFault = keyof typeof statementFaults
export type StatementCode = `${StatementRole}.${StatementFault}`

const title: Readonly<Record<StatementRole, string>> = {
  quote: 'The quote',
  srk: 'The certification of the SRK',
  ldevid: 'The certification of the LDevID key',
  recipient: 'The certification of the recipient key',
}

const statementReasons = Object.fromEntries(
  (Object.keys(title) as StatementRole[]).flatMap((role) =>
    (Object.keys(statementFaults) as StatementFault[]).map((fault): [StatementCode, Reason] => [
      `${role}.${fault}`,
      {
        cases: statementFaults[fault].cases,
        meaning: `${title[role]} ${statementFaults[fault].meaning}.`,
        attack: statementFaults[fault].attack,
        remedy: again,
      },
    ]),
  ),
) as Readonly<Record<StatementCode, Reason>>

const asked = 'Quote exactly the bank and the PCRs that the challenge asks for.'
const values = 'Send the PCR values that were quoted, one line each, with their index.'
const tampered = 'Power-cycle the board and attest again; look at who has access to its TPM.'

const quoteOnlyReasons = {
  'quote.nonce.short': {
    cases: [28],
    meaning: 'The nonce that the verifier was given has fewer than eight bytes.',
    attack: 'A nonce that can be guessed or repeats is no proof of freshness.',
    remedy: 'Use at least 16 random bytes.',
  },
  'quote.selection.missing': {
    cases: [29],
    meaning: 'The quote leaves out PCRs that policy demands.',
    attack: 'A changed stage is not looked at.',
    remedy: asked,
  },
  'quote.selection.resettable': {
    cases: [30],
    meaning: 'Only PCRs that software can reset (16, 23) are quoted or asked for.',
    attack: 'Any value is made at will.',
    remedy: asked,
  },
  'quote.selection.bank': {
    cases: [31],
    meaning: 'The quote is of another bank than asked (SHA-1).',
    attack: 'A bank whose collisions can be had, or that firmware does not extend.',
    remedy: asked,
  },
  'quote.selection.extra-bank': {
    cases: [32],
    meaning: 'The quote has a bank more than asked.',
    attack: 'The digest covers values that nobody looks at.',
    remedy: asked,
  },
  'quote.selection.extra': {
    cases: [32],
    meaning: 'The quote has PCRs that were not asked for.',
    attack: 'The digest covers values that nobody looks at.',
    remedy: asked,
  },
  'quote.selection.empty': { cases: [34], meaning: 'The quote selects no PCR.', attack: 'A quote that says nothing.', remedy: asked },
  'quote.selection.size': {
    cases: [34],
    meaning: 'A selection is not of three bytes, or has too many banks.',
    attack: 'What two parsers read differently.',
    remedy: asked,
  },
  'quote.selection.duplicate': {
    cases: [34],
    meaning: 'A bank is selected twice.',
    attack: 'One selection is checked and the other one signed.',
    remedy: asked,
  },
  'quote.values.malformed': {
    cases: [33],
    meaning: 'The PCR values are not lines of index and hex value of the bank’s size.',
    attack: 'What two parsers read differently.',
    remedy: values,
  },
  'quote.values.index': {
    cases: [33],
    meaning: 'PCR values are labelled with indexes that were not signed, or twice.',
    attack: 'The value of one PCR is shown as that of another.',
    remedy: values,
  },
  'quote.values.count': {
    cases: [35],
    meaning: 'There are more or fewer PCR values than the quote selects.',
    attack: 'A value that nobody signed.',
    remedy: values,
  },
  'quote.digest': {
    cases: [33, 35],
    meaning: 'The PCR values do not hash to the quoted digest in the order of the signed selection.',
    attack: 'Values of a good boot for a bad one, or in another order.',
    remedy: values,
  },
  'quote.clock.unsafe': {
    cases: [38],
    meaning: 'The TPM says that its clock may have gone back, and no reboot within the grace explains it.',
    attack: 'The TPM lost power without shutdown: counters may repeat.',
    remedy: 'None is needed: a first enrolment waits for the clock by itself, up to 70 minutes. Shutting the board down in order avoids it.',
  },
} as const satisfies ReasonTable

const continuityReasons = {
  'tpm.reset-count.lower': {
    cases: [38],
    meaning: 'resetCount is below the recorded one with the same SRK.',
    attack: 'A restored or forged TPM state.',
    remedy: 'After TPM2_Clear the device enrols again with a new SRK.',
  },
  'tpm.reset-count.unchanged': {
    cases: [38],
    meaning: 'The device shows another release than before without a reboot in between.',
    attack: 'PCRs of the new release over a TPM that never left the old boot.',
    remedy: 'Reboot the board and attest again.',
  },
  'tpm.reset-count.changed': {
    cases: [38],
    meaning: 'The TPM was reset between the statements of one answer.',
    attack: 'A reset attack: the PCRs are extended anew with good values while the system runs on.',
    remedy: tampered,
  },
  'tpm.reset-in-session': {
    cases: [38],
    meaning: 'The TPM was reset while the connection of its device went on.',
    attack: 'A reset attack: the PCRs are extended anew with good values while the system runs on.',
    remedy: tampered,
  },
  'tpm.restart-count.lower': {
    cases: [38],
    meaning: 'restartCount is below the recorded one within the same boot.',
    attack: 'A restored or forged TPM state.',
    remedy: tampered,
  },
  'tpm.clock.back': {
    cases: [38],
    meaning: "The TPM's clock is below the recorded one by more than the grace.",
    attack: 'A restored or forged TPM state.',
    remedy: tampered,
  },
  'tpm.firmware.below-floor': {
    cases: [39],
    meaning: "The TPM's firmware version is below the operator's floor for its maker.",
    attack: 'Firmware with known holes.',
    remedy: 'Update the TPM firmware.',
  },
  'tpm.firmware.denied': {
    cases: [4, 39],
    meaning: "The operator's deny list names the TPM's firmware version.",
    attack: 'Firmware with known holes.',
    remedy: 'Update the TPM firmware.',
  },
  'tpm.firmware.changed': {
    cases: [39],
    meaning: "The TPM's firmware version differs from the recorded one, and no update from the one to the other is recorded.",
    attack: 'Another TPM, or TPM firmware that the attacker chose.',
    remedy: 'Record the update (`updates` of the endorsement policy), then attest again.',
  },
} as const satisfies ReasonTable

/** Statements of the AK, PCR selection and values, counters and clock. */
export const quoteReasons = { ...quoteOnlyReasons, ...continuityReasons, ...statementReasons }
