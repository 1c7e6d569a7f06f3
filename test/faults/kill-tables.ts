import { cutPoints } from './cutting-bus.ts'

/** Where the matrices end a process: durable steps, `step` or `step#N` for its Nth time. The short run takes a share of them where it says so. */

const long = process.env['FLEETKEY_LONG'] === '1'

/** Of these points what is run: all of them in the long run, the first few otherwise. */
const share = (points: readonly string[], few: number): readonly string[] => (long ? points : points.slice(0, few))

/** Durable steps of the server, from its first start to a revocation. */
export const serverSteps = [
  'store.migrated',
  'kms.key-file',
  'kms.header',
  'kms.key',
  'kms.uses',
  'setup.tenant',
  'setup.kek',
  'setup.data-key',
  'setup.ca/root',
  'setup.ca/issuing',
  'setup.ca/role/challenge',
  'setup.ca/role/delivery',
  'setup.ca/role/group',
  'setup.ca/role/release',
  'setup.token',
  'setup.token-file',
  'station.add',
  'station.certified',
  'endorsement.import',
  'import.release',
  'firmware.approved',
  'import.batch',
  'group.create',
  'group.add',
  'key.create',
  'key.grant',
  'enrol.challenged',
  'enrol.spent',
  'issue.intended',
  'issue.signed',
  'enrol.issued',
  'deliver.recorded',
  'acknowledge.installed',
  'acknowledge.active',
  'acknowledge.retired',
  'ledger.page',
  'ledger.settled',
  'rotate.started',
  'rotate.targets',
  'rotate.prepare',
  'rotate.open-wave',
  'rotate.activate',
  'rotate.retire',
  'rotate.finish',
  'key.destroyed',
  'connect.certificate',
  'attest.boot',
  'attest.asked',
  'attest.accepted',
  'group.policy',
  'attest.quarantined',
  'appraisal.settled',
  'revoke.committed',
  'rotation.kicked',
  'rotation.started',
  'rotation.settled',
  'store.commit',
  'store.committed',
]

/** Durable steps of the agent; its TPM loses power with it. */
export const agentSteps = [
  'tpm-keys.written',
  'tpm-keys.renamed',
  'tpm-keys.durable',
  'tpm-keys.stored',
  'firmware.made',
  'approvals.written',
  'approvals.renamed',
  'approvals.durable',
  'firmware.learned',
  'firmware.settled',
  'enrol.hello',
  'enrol.answered',
  'enrol.stored',
  'identity.written',
  'identity.renamed',
  'identity.durable',
  'identity.stored',
  'usage.written',
  'usage.renamed',
  'usage.durable',
  'usage.counted',
  'keyring.written',
  'keyring.renamed',
  'keyring.durable',
  'key.installed',
  'key.used',
  'key.given',
  'key.settled',
  'key.erased',
  'attested',
  'acknowledged.installed',
  'acknowledged.active',
  'acknowledged.retired',
]

/** Later occurrences: the same step at another moment of the path. */
const later = (steps: readonly string[], counts: readonly number[]): readonly string[] => steps.flatMap((step) => counts.map((count) => `${step}#${count}`))

const range = (from: number, to: number): readonly number[] => Array.from({ length: to - from + 1 }, (_, at) => from + at)

const everyServerPoint = [
  // The first issuing steps are those of the CA and of the server's own TLS; these are the station's and a device's.
  'issue.signed#8',
  'issue.intended#9',
  'issue.signed#9',
  ...later(['store.committed'], [20, 30, 45, 60]),
  ...later(['store.commit', 'store.committed'], range(2, 71)).filter((point) => !/^store\.committed#(?:20|30|45|60)$/.test(point)),
  ...later(['deliver.recorded', 'acknowledge.active'], range(2, 6)),
]
export const serverPoints = share(everyServerPoint, 6)
const everyAgentPoint = [
  ...later(['keyring.renamed'], [5, 9, 13]),
  ...later(['keyring.written', 'keyring.renamed', 'keyring.durable'], range(2, 29)).filter((point) => !/^keyring\.renamed#(?:5|9|13)$/.test(point)),
]
export const agentPoints = share(everyAgentPoint, 3)

/** Durable steps at which the KMS process alone is ended: its own, and some of the server's, where it waits. */
export const kmsPoints = [
  'kms.key-file',
  'kms.header',
  'kms.key',
  'kms.key#4',
  'kms.uses',
  'kms.uses#3',
  'setup.ca/root',
  'enrol.spent',
  'issue.intended#7',
  'rotate.started',
]

/** Between the first connection and the end of both certificates' replacement. Two boards: counts leave their enrolments behind. */
export const renewal = {
  server: [
    'issue.intended#11',
    'issue.signed#11',
    'renew.issued',
    'renew.issued#2',
    'connect.certificate',
    'connect.certificate#2',
    'connect.certificate#3',
    'connect.certificate#4',
    // Of those that were returned with.
    'connect.certificate#5',
    ...(long ? ['connect.certificate#6'] : []),
    'enrol.challenged#3',
    'enrol.challenged#4',
    'enrol.spent#3',
    'issue.intended#13',
    'issue.signed#13',
    'enrol.issued#3',
    'enrol.issued#4',
  ],
  agent: [
    'renew.prepared',
    'renewal.written',
    'renewal.renamed',
    'renewal.durable',
    'renew.stored',
    'identity.written#3',
    'identity.durable#3',
    'identity.stored#5',
    'enrol.hello#3',
    'enrol.answered#3',
    'enrol.stored#3',
    'enrol.answered#4',
  ],
} as const

/** Of a group served by broadcast, from its first place to labels of a new generation; first those in the middle of the eviction. */
const everyGroupStep = [
  'group.remove',
  'broadcast.recorded',
  'group.generation',
  'rotate.started',
  'broadcast.signed#2',
  'group.placed#3',
  'group.placed',
  'group.placed#2',
  'key.grant#3',
  'broadcast.signed',
  'broadcast.signed#3',
  'broadcast.signed#4',
  'rotation.started',
  'rotation.settled',
  'rotate.activate',
  'rotate.activate#2',
  'group.add#2',
  'group.add#3',
]
const everyLabelStep = ['labels.stored#3', 'labels.stored', 'labels.stored#2', 'labels.stored#4']
export const eviction = { server: share(everyGroupStep, 3), agent: share(everyLabelStep, 1), all: { server: everyGroupStep, agent: everyLabelStep } } as const

/** Of five rotations that one of two devices misses, and of its return: what happens first is the rotations that go on without it. */
const everyMissedStep = [
  'rotate.activate#5',
  'acknowledge.active#8',
  'rotate.timed-out',
  'rotate.timed-out#5',
  'rotate.time-out#3',
  'rotate.started#3',
  'rotate.prepare#5',
  'rotate.targets#4',
  'rotate.activate#2',
  'deliver.recorded#12',
  'deliver.recorded#15',
  'acknowledge.installed#7',
  'acknowledge.installed#8',
  'rotate.retire',
  'rotate.finish',
  'acknowledge.retired',
]
const everyReturnStep = [
  'key.installed#9',
  'key.installed#10',
  'key.installed#11',
  'key.used#8',
  'key.given#8',
  'key.settled#8',
  'keyring.written#30',
  'keyring.renamed#30',
  'keyring.durable#33',
  'key.erased',
  'acknowledged.installed#7',
  'acknowledged.installed#8',
]
export const catchUp = {
  server: share(everyMissedStep, 1),
  agent: share(everyReturnStep, 1),
  all: { server: everyMissedStep, agent: everyReturnStep },
} as const

/** Every point of these matrices, by what is ended there. */
export const everyKillPoint: Readonly<Record<string, readonly string[]>> = {
  'server, from its first start over a campaign to a revocation': [...serverSteps, ...everyServerPoint],
  'KMS process': kmsPoints,
  'agent with its TPM': [...agentSteps, ...everyAgentPoint],
  'server, renewal and return': renewal.server,
  'agent, renewal and return': renewal.agent,
  'server, eviction': everyGroupStep,
  'agent, eviction': everyLabelStep,
  'server, catch-up': everyMissedStep,
  'agent, catch-up': everyReturnStep,
  'connection to the broker': cutPoints,
}
