import { toProblem } from '@fleetkey/protocol/problem.ts'
import { issuerKeyOf, standings } from '../../ca/certificate.ts'
import { activeOf, nextOf } from '../../ca/rollover.ts'
import { dayText } from '../calendar.ts'
import type { Context } from '../context.ts'
import { endsByDay } from '../inventory.ts'
import { findAll } from '../rows.ts'
import { certificateMustCount } from '../station.ts'
import { oldestSuperseded } from '../superseded.ts'
import { readiness } from '../trust.ts'
import { date, day, failure, ok, unless, warning, type Check } from './check.ts'

/** Rows that are read to find the oldest of something. */
const most = 1000

const ending = async (ctx: Context, profile: string, from: string, to: string): Promise<number> =>
  (await endsByDay(ctx, { profile, from, to })).reduce((sum, { rows }) => sum + rows, 0)

const identified = async (ctx: Context): Promise<number> => {
  const counts = await Promise.all((['enrolled', 'quarantined'] as const).map(async (state) => await ctx.store.count('device', { state })))
  return counts.reduce((sum, count) => sum + count, 0)
}

const share = (part: number, whole: number): string => `${part} of ${whole}`

export const fleetChecks: readonly Check[] = [
  {
    name: 'devices past renewal',
    remedy:
      'fleetkey ca list --state expired --profile device-tls says which: switched off, cut off, or their agents fail (their logs); they come back by themselves',
    async examine(ctx) {
      // Of a device that renewed only the newest counts: those before it are superseded.
      const [past, all] = await Promise.all([ending(ctx, 'device-tls', '0000', dayText(ctx.now() - day)), identified(ctx)])
      return past > all / 10 ? warning(`${share(past, all)} have let their TLS certificate run out`) : ok(share(past, all))
    },
  },
  {
    name: 'identities that end',
    remedy:
      'fleetkey ca list --profile device-identity --expires-before DATE says which: each enrols anew by itself when its identity has ended, over its hardware',
    async examine(ctx) {
      const [soon, all] = await Promise.all([ending(ctx, 'device-identity', dayText(ctx.now()), dayText(ctx.now() + 30 * day)), identified(ctx)])
      return soon > all / 100 ? warning(`${share(soon, all)} end within 30 days`) : ok(`${share(soon, all)} within 30 days`)
    },
  },
  {
    name: 'recovery budgets',
    remedy: 'find out why they keep proving themselves anew (device show ID), then fleetkey device recover ID --reason TEXT',
    async examine(ctx) {
      const held = await ctx.store.count('device', { held: 'held' })
      const first = held === 0 ? [] : await ctx.store.find('device', { where: { held: 'held' }, limit: 10 })
      return held === 0 ? ok('none is spent') : warning(`${held} devices wait for a person: ${first.map(({ id }) => id).join(', ')}`)
    },
  },
  {
    name: 'suspended devices',
    remedy: 'decide: fleetkey device reinstate ID, or fleetkey device revoke ID; a certificate on hold is on every list',
    async examine(ctx) {
      const rows = await ctx.store.find('device', { where: { state: 'suspended' }, limit: most })
      const long = rows.filter((row) => row.state === 'suspended' && row.suspendedAt + 30 * day < ctx.now())
      return long.length === 0
        ? ok(`${rows.length}`)
        : warning(
            `${long.length} for more than 30 days: ${long
              .slice(0, 10)
              .map(({ id }) => id)
              .join(', ')}`,
          )
    },
  },
  {
    name: 'trust bundle',
    remedy: 'fleetkey ca status says who waits: look at those agents; stranded devices need fleetkey server bundle by hand',
    async examine(ctx) {
      const { rollover } = ctx.authority
      if (rollover.version === 1) return ok('that of the configuration')
      const target = nextOf(rollover)
      const judged = target === undefined || target.state === 'preparing' || target.state === 'prepared' ? activeOf(rollover) : target
      const { devices, acknowledged, stranded, waiting } = await readiness(ctx, rollover.version, judged)
      const since = rollover.history.at(-1)?.at ?? 0
      const found = `version ${rollover.version} of ${date(since)}: acknowledged by ${share(acknowledged, devices)}, ${waiting} waiting, ${stranded} stranded`
      if (stranded > 0) return failure(found)
      return acknowledged < devices && since + 7 * day < ctx.now() ? warning(found) : ok(found)
    },
  },
  {
    name: 'superseded certificates',
    remedy: 'the log says why they are not removed: the store refuses the commit, or more come to their end than are removed in a minute',
    async examine(ctx, { retention }) {
      const rows = await ctx.store.tally('certificate', 'calendar', { from: 'superseded/device-tls/', to: 'superseded/device-tls/~' })
      const count = `${rows.reduce((sum, one) => sum + one.rows, 0)} TLS certificates of devices`
      if (retention === null) return ok(`${count}, kept for good`)
      const oldest = await oldestSuperseded(ctx, retention)
      const found = `${count}, removed ${retention / day} days after their end`
      return oldest !== undefined && oldest + retention + day < ctx.now() ? warning(`${found}; one that ended on ${date(oldest)} is still there`) : ok(found)
    },
  },
  {
    name: 'station certificates',
    remedy: 'let the key of the station be certified again: fleetkey station certify NAME --csr FILE (docs/operations.md, "Certificates of stations")',
    async examine(ctx) {
      const [wrong, soon]: [string[], string[]] = [[], []]
      let certified = 0
      for (const station of await findAll(ctx.store, 'station')) {
        if (station.certificate === undefined || station.revoked !== undefined || station.suspended !== undefined) continue
        certified++
        const why = await certificateMustCount(ctx, station).then(
          () => undefined,
          (thrown: unknown) => toProblem(thrown).reason ?? 'no record',
        )
        const row = await ctx.store.get('certificate', station.certificate)
        if (row === undefined || why !== undefined) wrong.push(`${station.id}: ${why ?? ''}`)
        else if (row.notAfter - ctx.now() < (row.notAfter - row.notBefore) / 6) soon.push(`${station.id} until ${date(row.notAfter)}`)
        else if (issuerKeyOf(row) !== ctx.authority.key) soon.push(`${station.id}: certified by a CA that another one has followed`)
      }
      return wrong.length > 0 ? unless(wrong, '') : unless(soon, `${certified} in force`, warning)
    },
  },
  {
    name: 'certificates in force',
    remedy: 'none is in force: no device can connect; see CA end and the clock',
    async examine(ctx) {
      const counts = await Promise.all(
        standings.map(async (standing) => {
          const rows = await ctx.store.tally('certificate', 'calendar', { from: `${standing}/`, to: `${standing}/~` })
          return [standing, rows.reduce((sum, one) => sum + one.rows, 0)] as const
        }),
      )
      const inForce = await ctx.store.scan('certificate', 'calendar', { from: `valid/server-signing/`, to: `valid/server-signing/~`, limit: 1 })
      const found = counts.map(([standing, count]) => `${count} ${standing}`).join(', ')
      return inForce.length === 0 ? failure(found) : ok(found)
    },
  },
]
