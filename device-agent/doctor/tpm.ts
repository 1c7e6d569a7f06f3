import { unsafeClockText } from '@fleetkey/tpm2/clock.ts'
import { duration, lockoutText } from '@fleetkey/tpm2/lockout.ts'
import type { TpmReport } from '@fleetkey/tpm2/inspect.ts'
import type { BoardFacts, TpmKind } from './board.ts'
import { fail, ok, warn, type Finding } from './finding.ts'

const kinds: Readonly<Record<TpmKind, string>> = {
  discrete: 'a chip of its own',
  firmware: 'firmware of the processor',
  virtual: 'a program of this machine or its host',
  simulator: 'a simulator',
  unknown: 'of a kind that could not be told',
}

const identity = (report: TpmReport, kind: TpmKind, { bus }: BoardFacts): Finding => {
  const name = [report.manufacturer, report.vendor].filter((one) => one !== '').join(' ')
  const found = `${name}, firmware ${report.firmware}, TPM 2.0 revision ${report.revision}; ${kinds[kind]}${bus === null ? '' : ` on ${bus}`}`
  return kind === 'simulator' || kind === 'virtual'
    ? warn('TPM', found, 'good for tests; whoever administers it can copy its keys: real devices need a chip or a firmware TPM')
    : ok('TPM', found)
}

/** `spec`: as the agent opens it. */
const sharing = (report: TpmReport, spec: string): Finding => {
  if (report.managed) return ok('resource manager', 'the kernel shares the TPM between programs')
  if (spec.startsWith('device:'))
    return warn(
      'resource manager',
      `none: ${spec.slice(7)} is for one program alone`,
      'use device:/dev/tpmrm0: the agent frees what others have left in a raw TPM',
    )
  return ok('resource manager', 'none: the agent has this TPM alone')
}

const leftOver = ({ leftOver: left, limits }: TpmReport): readonly Finding[] => {
  if (left === null || left.objects + left.sessions === 0) return []
  const found = `${left.objects} objects and ${left.sessions} sessions of a program that has ended (room for ${limits.transientObjects ?? '?'} and ${limits.loadedSessions ?? '?'})`
  return [warn('left in the TPM', found, 'nothing: the agent frees them when it starts')]
}

const lacking = ({ missing, banks }: TpmReport): readonly Finding[] => {
  const remedy = (name: string): string =>
    name.includes('switched off') ? 'tpm2_pcrallocate sha256:all (owner of the platform), then restart the board' : 'another TPM or newer firmware for it'
  const named = banks.filter(({ pcrs }) => pcrs.length > 0).map(({ name }) => name)
  return [
    ...missing.map(({ name, for: purpose, needed }) => (needed ? fail : warn)('missing', `${name}, needed for ${purpose}`, remedy(name))),
    ...(missing.some(({ name }) => name.includes('bank')) ? [] : [ok('PCR banks', named.join(', '))]),
    ...(missing.length === 0 ? [ok('commands and algorithms', 'all that the agent uses')] : []),
  ]
}

const hierarchies = ({ enabled, passwordSet }: TpmReport, known: ReadonlySet<string>): readonly Finding[] => [
  ...(['owner', 'endorsement'] as const).flatMap((name) => {
    if (!enabled[name]) return [fail('hierarchies', `the ${name} hierarchy is switched off`, 'enable the TPM in the settings of the firmware')]
    if (passwordSet[name] && !known.has(name))
      return [
        fail('passwords', `the ${name} hierarchy has one, and none is configured`, `"tpmAuth": {"${name}AuthFile": "FILE"}, or run doctor with that --config`),
      ]
    return []
  }),
  ok(
    'passwords',
    (['owner', 'endorsement', 'lockout'] as const).map((name) => `${name} ${passwordSet[name] ? 'set' : 'not set'}`).join(', ') +
      (passwordSet.lockout ? '' : ' (without a lockout password every program with access can clear the TPM)'),
  ),
]

const lockout = ({ lockout: state }: TpmReport): Finding =>
  state.locked
    ? warn('lockout', lockoutText(state), "Fleetkey's own keys go on working: they are exempt. Find out which program tries passwords")
    : ok(
        'lockout',
        state.allowed === 0
          ? 'this TPM does not count failures'
          : `${state.failures} of ${state.allowed} failures; one is forgotten every ${duration(state.interval)}`,
      )

const clock = ({ clock: state }: TpmReport): Finding => {
  const { safe, resetCount, restartCount } = state
  const found = `started ${resetCount} times, resumed ${restartCount} times since`
  return safe
    ? ok('clock', found)
    : warn(
        'clock',
        `${found}; not safe: ${unsafeClockText(state)}`,
        'nothing: a first enrolment waits for it by itself; switching off in order (TPM2_Shutdown) avoids it',
      )
}

/** What the report says to the person before the machine. `known`: hierarchies whose password is configured. Pure. */
export const tpmFindings = (
  report: TpmReport,
  of: { readonly kind: TpmKind; readonly board: BoardFacts; readonly spec: string; readonly known: ReadonlySet<string> },
): readonly Finding[] => [
  identity(report, of.kind, of.board),
  sharing(report, of.spec),
  ...leftOver(report),
  ...lacking(report),
  ...hierarchies(report, of.known),
  lockout(report),
  clock(report),
]
