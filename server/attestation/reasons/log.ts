import type { ReasonTable } from './reason.ts'

const whole = 'Send the log of this boot, whole, as the firmware or kernel keeps it (binary_bios_measurements, ascii or binary_runtime_measurements).'
const bound = 'Attack on memory: huge counts and sizes.'
const differ = 'What two parsers read differently.'
const boot = 'Compare with the boot of a healthy board of the same release; reinstall the release.'

/** Event log (TCG PC Client PFP) and IMA list. */
export const logReasons = {
  'log.malformed': { cases: [41, 46], meaning: 'The event log is not a TCG crypto-agile log.', attack: differ, remedy: whole },
  'log.header': { cases: [46], meaning: 'The log does not start with a Spec ID event of version 2.', attack: differ, remedy: whole },
  'log.sha1-format': {
    cases: [31, 46],
    meaning: 'The log is one of TPM 1.2, with SHA-1 digests only.',
    attack: 'Digests whose collisions can be had.',
    remedy: whole,
  },
  'log.truncated': { cases: [41], meaning: 'The log ends inside an event.', attack: 'The events that do not suit are cut off.', remedy: whole },
  'log.replay.mismatch': {
    cases: [42, 43, 45],
    meaning: 'The events do not lead to the quoted PCRs.',
    attack: 'Events dropped, added, edited, re-typed to be skipped, or the log of another boot.',
    remedy: whole,
  },
  'log.data.mismatch': {
    cases: [44],
    meaning: 'The data of an event whose type says that its digest is that of its data (separator, EFI action, CRTM version, driver variable) was edited.',
    attack: 'Event data under a digest of something else: no decision may rest on it.',
    remedy: whole,
  },
  'log.pcr': { cases: [46], meaning: 'An event is of a PCR that does not exist.', attack: differ, remedy: whole },
  'log.bank.count': { cases: [46], meaning: 'The header announces no bank or too many.', attack: bound, remedy: whole },
  'log.bank.duplicate': { cases: [46], meaning: 'A bank stands twice in the header or an event.', attack: differ, remedy: whole },
  'log.bank.unknown': { cases: [46], meaning: 'An event has a digest of a bank that the header does not announce.', attack: differ, remedy: whole },
  'log.bank.missing': {
    cases: [46],
    meaning: 'The log has no digests of the quoted bank.',
    attack: 'A weaker bank is replayed than was quoted.',
    remedy: 'Enable the SHA-256 bank in firmware.',
  },
  'log.digest.size': { cases: [46], meaning: 'The header announces a digest size that the algorithm does not have.', attack: differ, remedy: whole },
  'log.digest.count': { cases: [46], meaning: 'An event has more or fewer digests than the header announces banks.', attack: differ, remedy: whole },
  'log.limit.bytes': { cases: [46], meaning: 'The log is larger than 1 MiB.', attack: bound, remedy: whole },
  'log.limit.events': { cases: [46], meaning: 'The log has more than 4,096 events.', attack: bound, remedy: whole },
  'log.limit.event': { cases: [46], meaning: 'An event is larger than 64 KiB.', attack: bound, remedy: whole },
  'log.no-action.digest': {
    cases: [45],
    meaning: 'An EV_NO_ACTION event has a digest that is not zero.',
    attack: 'A measurement re-typed so that the replay skips it.',
    remedy: whole,
  },
  'log.startup-locality': {
    cases: [45],
    meaning: 'StartupLocality is given twice, late, or with a locality that does not exist.',
    attack: 'The start of PCR 0 is chosen to fit.',
    remedy: whole,
  },
  'log.separator.missing': {
    cases: [46],
    meaning: 'A firmware PCR (0 to 7) has no separator.',
    attack: 'What runs later measures as if it were firmware.',
    remedy: boot,
  },
  'log.separator.duplicate': {
    cases: [46],
    meaning: 'A firmware PCR has more than one separator.',
    attack: 'A second boot is measured after the first.',
    remedy: boot,
  },
  'log.separator.value': {
    cases: [46],
    meaning: 'An event calls itself a separator and is none, or reports that the firmware failed.',
    attack: 'The end of the firmware part is feigned.',
    remedy: boot,
  },
  'log.after-separator': {
    cases: [46],
    meaning: 'Something was measured into a firmware PCR after its separator.',
    attack: 'What runs later measures as if it were firmware.',
    remedy: boot,
  },
  'ima.malformed': { cases: [48], meaning: 'The IMA list is not one of ima-ng or ima-sig entries.', attack: differ, remedy: whole },
  'ima.truncated': { cases: [48], meaning: 'The IMA list ends inside an entry.', attack: 'Entries that do not suit are cut off.', remedy: whole },
  'ima.pcr': { cases: [48], meaning: 'An IMA entry is of another PCR than 10.', attack: differ, remedy: whole },
  'ima.template': {
    cases: [48],
    meaning: 'An IMA entry has a template that is not judged (ima, or unknown).',
    attack: 'SHA-1 or fields that nobody reads.',
    remedy: 'Boot with ima_template=ima-ng or ima-sig.',
  },
  'ima.template-hash': {
    cases: [48],
    meaning: 'The template hash of an IMA entry is not that of its fields.',
    attack: 'A file is shown under the measurement of another.',
    remedy: whole,
  },
  'ima.boot-aggregate': {
    cases: [48],
    meaning: 'boot_aggregate is not the hash of the quoted PCRs 0 to 9.',
    attack: 'The list of another boot.',
    remedy: whole,
  },
  'ima.violation': {
    cases: [48],
    meaning: 'The list has a violation: a file changed while it was measured.',
    attack: 'What ran is not what was measured.',
    remedy: 'Find out which file is written while it is executed.',
  },
  'ima.no-prefix': {
    cases: [48],
    meaning: 'No prefix of the list leads, together with the event log, to the quoted PCRs, also when the rest is asked for.',
    attack: 'Entries dropped, added or edited.',
    remedy: whole,
  },
  'ima.tail': {
    cases: [48],
    meaning: 'Entries stand behind the quoted PCR 10: they are not proven yet.',
    attack: 'Entries that nobody signed.',
    remedy: 'Quote again and send the rest.',
  },
  'ima.file': {
    cases: [48],
    meaning: 'A file of the list is not among those that the release lists or policy allows, or has another hash.',
    attack: 'Software that nobody approved.',
    remedy: 'Add the file to the reference values, or remove it from the board.',
  },
  'ima.no-list': {
    cases: [48],
    meaning: 'Policy allows only files that the release lists, and the release lists none.',
    attack: 'Software that nobody approved.',
    remedy: 'Import a release whose reference values have "files", or set the policy ima to required.',
  },
  'ima.missing': {
    cases: [48],
    meaning: 'An IMA list was asked for, and the device sent none: its kernel measures nothing, or its agent cannot read the list.',
    attack: 'What runs is kept out of sight.',
    remedy: 'Boot with ima_policy=tcb and let the agent read the list ("imaList"); "fleetkey-agent doctor" says what is there.',
  },
  'ima.awaited': {
    cases: [48, 50],
    meaning: 'The device is quarantined, policy needs an IMA list, and its evidence has none because none was asked for (an enrolment).',
    attack: 'A device comes back without showing what it was quarantined for.',
    remedy: 'Nothing: it is asked for the list when it connects.',
  },
  'ima.limit.bytes': { cases: [48], meaning: 'The IMA list is too large.', attack: bound, remedy: 'Ask for it by offset.' },
  'ima.limit.entries': { cases: [48], meaning: 'The IMA list has too many entries.', attack: bound, remedy: 'Ask for it by offset.' },
  'ima.limit.entry': { cases: [48], meaning: 'An entry of the IMA list is too large.', attack: bound, remedy: whole },
} as const satisfies ReasonTable
