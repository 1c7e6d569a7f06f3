import { statSync } from 'node:fs'
import { join } from 'node:path'
import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { Refused, Unreachable } from '../client.ts'
import { exit, UsageError, type Command, type Invocation } from '../command.ts'
import { table } from '../output.ts'

type Grade = 'ok' | 'warning' | 'failure'
interface Finding {
  readonly check: string
  readonly grade: Grade
  readonly found: string
  readonly remedy: string
}

const day = 86_400_000
const finding = (check: string, grade: Grade, found: string, remedy = ''): Finding => ({ check, grade, found, remedy: grade === 'ok' ? '' : remedy })

/** Checks of what the server says of itself; pure. `now` is this machine's clock. */
export const judge = (status: ResponseOf<'status'>, now: number): readonly Finding[] => {
  const skew = Math.abs(status.now - now)
  return [
    finding(
      'clock',
      skew > 30_000 ? 'warning' : 'ok',
      `${Math.round(skew / 1000)} s apart`,
      'set both clocks by NTP: certificates are valid from 5 minutes before they are made',
    ),
    finding(
      'store',
      status.writable ? 'ok' : 'failure',
      status.writable ? 'writable' : (status.reason ?? 'read-only'),
      'make room on the disk of the data folder; writing resumes by itself',
    ),
    finding('store engine', 'ok', status.store),
    finding(
      'KMS',
      status.kms.startsWith('file, key file') ? 'warning' : 'ok',
      status.kms,
      'the key file lies beside the database: use --passphrase-file, or fleetkey seal split --only, for production',
    ),
    finding(
      'test endorsements',
      status.testEndorsements.length === 0 ? 'ok' : 'warning',
      status.testEndorsements.length === 0 ? 'none' : status.testEndorsements.join('; '),
      "simulated hardware is admitted: remove the simulator's CA before real devices count on this server",
    ),
    finding(
      'audit log',
      status.audit.size > 0 ? 'ok' : 'failure',
      `${status.audit.size} entries`,
      'an empty log after the first start was removed by somebody: restore it',
    ),
    finding(
      'enrolled devices',
      'ok',
      `${status.devices.enrolled} enrolled, ${status.devices.registered} registered, ${status.devices.suspended} suspended, ${status.devices.revoked} revoked, ${status.connections} connected`,
    ),
    finding(
      'quarantined devices',
      status.devices.quarantined === 0 ? 'ok' : 'warning',
      `${status.devices.quarantined}`,
      'fleetkey device list --state quarantined says which, and device show why; they get no keys until they attest acceptable firmware',
    ),
    ...status.certificates.map(({ name, notAfter }) =>
      finding(
        `certificate ${name}`,
        notAfter < now ? 'failure' : notAfter < now + 14 * day ? 'warning' : 'ok',
        `until ${new Date(notAfter).toISOString().slice(0, 10)}`,
        'restart the server: it renews its own TLS and signing certificates at start; a CA needs a rollover',
      ),
    ),
  ]
}

/** Whether the keys are open, and whether what opens them is in order; pure. */
export const judgeSeal = ({ sealed, reason, sets, wrong }: ResponseOf<'seal.status'>): readonly Finding[] => {
  const handedIn = sets.map(({ set, threshold, gathered }) => `${gathered.length} of ${threshold} shares of set ${set} handed in`).join(', ')
  if (sealed)
    return [
      finding(
        'seal',
        'failure',
        [reason ?? 'sealed', ...(sets.length === 0 ? ['never split into shares'] : [handedIn])].join('; '),
        `bring back what is missing${sets.length === 0 ? '' : ', or hand in shares: fleetkey seal unseal'}; it opens by itself`,
      ),
    ]
  const unconfirmed = sets.find(({ confirmed }) => !confirmed)
  return [
    finding(
      'seal',
      unconfirmed === undefined ? 'ok' : 'warning',
      unconfirmed === undefined
        ? `open; ${sets.map(({ shares, threshold }) => `${threshold} of ${shares} shares open it`).join(', ') || 'not split into shares'}`
        : `set ${unconfirmed.set} was never confirmed`,
      'if its keepers have their shares: fleetkey seal confirm SET; else fleetkey seal split again',
    ),
    finding(
      'wrong shares',
      wrong === 0 ? 'ok' : 'warning',
      `${wrong} since the keys were last opened by shares`,
      'the log names the networks they came from: ask the keepers; the count starts anew when shares open the keys',
    ),
  ]
}

/** Files that hold secrets must be their owner's alone. */
const files = (data: string): readonly Finding[] =>
  ['cli.json', 'sealing.pem', 'kms', 'kms/master.key', 'store', 'store/fleetkey.db'].flatMap((name) => {
    try {
      const { mode } = statSync(join(data, name))
      const open = (mode & 0o077) !== 0
      return [finding(`mode of ${name}`, open ? 'failure' : 'ok', (mode & 0o777).toString(8), `chmod go= ${join(data, name)}`)]
    } catch {
      return []
    }
  })

const examine = async (call: Invocation): Promise<readonly Finding[]> => {
  const local = files(call.data)
  try {
    const seal = judgeSeal(await call.sealedClient().call('seal.status'))
    // A sealed server is asked nothing else: it shows another certificate, and no token is for it.
    if (seal.some(({ grade }) => grade === 'failure')) return [...seal, ...local]
    const client = call.client()
    const ready = await client.probe('/readyz')
    const reached = finding(
      'server',
      ready.status === 200 ? 'ok' : 'failure',
      `${client.server} ${ready.status === 200 ? 'is ready' : `is not ready: ${ready.body.trim().slice(0, 200)}`}`,
      'see the reason; fleetkey server start shows more',
    )
    const { findings } = await client.call('doctor')
    return [reached, ...seal, ...judge(await client.call('status'), Date.now()), ...findings, ...local]
  } catch (error) {
    if (error instanceof Unreachable)
      return [finding('server', 'failure', error.message, 'is it running? fleetkey server start; does --ca name its root?'), ...local]
    if (error instanceof Refused)
      return [finding('token', 'failure', `${error.code}: ${error.message}`, 'use the token of cli.json, or one that has not expired'), ...local]
    if (error instanceof UsageError) return [finding('connection', 'failure', error.message, 'fleetkey server start --data DIR writes DIR/cli.json'), ...local]
    throw error
  }
}

export const doctorCommands: readonly Command[] = [
  {
    name: 'doctor',
    usage: '',
    summary: 'check server, seal, CA, keys, lists, fleet, clock, disk, file modes; each finding with its remedy; exit 5 when something fails',
    args: [0, 0],
    async run(call) {
      const findings = await examine(call)
      call.out.result(findings, () =>
        table([
          ['CHECK', 'GRADE', 'FOUND', 'REMEDY'],
          ...findings.map(({ check, grade, found, remedy }) => [check, grade === 'ok' ? 'ok' : grade.toUpperCase(), found, remedy]),
        ]),
      )
      return findings.some(({ grade }) => grade === 'failure') ? exit.notReady : exit.ok
    },
  },
]
