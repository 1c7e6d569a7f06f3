import { approvalState } from '../../access/approval.ts'
import { approvals } from '../second-person.ts'
import { date, day, failure, hour, minute, ok, unless, warning, type Check } from './check.ts'

const megabyte = 1 << 20

export const operationChecks: readonly Check[] = [
  {
    name: 'clock of the server',
    remedy: 'set it by NTP: an act in the log is later than now, and what is issued now is valid too early and ends too early',
    async examine(ctx) {
      const { size } = await ctx.store.checkpoint()
      const [last] = await ctx.store.audit({ after: Math.max(0, size - 1), limit: 1 })
      const back = last === undefined ? 0 : last.at - ctx.now()
      return back > minute ? failure(`${Math.round(back / 1000)} s behind the newest entry of the audit log`) : ok(new Date(ctx.now()).toISOString())
    },
  },
  {
    name: 'rollover',
    remedy:
      'fleetkey ca status: go on with the next command (distribute, activate, taint, retire), or restart the server when it is preparing, activating or retiring',
    examine(ctx) {
      const now = ctx.now()
      const { generations } = ctx.authority.rollover
      const stuck = generations.filter(({ state, since }) => ['preparing', 'activating', 'retiring'].includes(state) && since + 15 * minute < now)
      const long = generations.filter(({ state, since }) => {
        const patience = ['prepared', 'distributed'].includes(state) ? 14 * day : ['superseded', 'tainted'].includes(state) ? 90 * day : Infinity
        return since + patience < now
      })
      const said = (of: typeof generations): string => of.map(({ number, state, since }) => `generation ${number} is ${state} since ${date(since)}`).join('; ')
      return stuck.length > 0
        ? failure(said(stuck))
        : long.length > 0
          ? warning(said(long))
          : ok(`generations: ${generations.map(({ state }) => state).join(', ')}`)
    },
  },
  {
    name: 'approvals',
    remedy: 'another operator looks at fleetkey approval list, and grants or leaves it: it is void a day after it was asked for',
    async examine(ctx) {
      const waiting = (await approvals(ctx)).filter((one) => approvalState(one, ctx.now()) === 'waiting')
      const old = waiting.filter(({ askedAt }) => askedAt + 4 * hour < ctx.now())
      return unless(
        old.map(({ id, what, askedBy }) => `${id} (${what}, asked by ${askedBy}) waits for more than 4 hours`),
        `${waiting.length} waiting`,
        warning,
      )
    },
  },
  {
    name: 'second person',
    remedy: 'fleetkey operator add NAME --role owner: what strands devices or revokes a CA takes two people, and cannot wait for one to be found',
    async examine(ctx) {
      const tokens = await ctx.store.find('token', { limit: 1000 })
      const owners = new Set(
        tokens.filter(({ roles, expiresAt }) => roles.includes('owner') && (expiresAt === null || expiresAt > ctx.now())).map(({ operator }) => operator),
      )
      return owners.size < 2 ? warning(`${owners.size} with the role owner`) : ok(`${owners.size} with the role owner`)
    },
  },
  {
    name: 'webhook',
    remedy: 'fleetkey alert test sends a message now and says what is wrong; what waits is sent when it works',
    examine(_ctx, { webhook }) {
      const state = webhook()
      if (state === null) return ok('none is configured: alerts are only listed')
      const { host, failures, isDead, error, waiting } = state
      if (failures === 0) return ok(`${host}, ${waiting} waiting`)
      const found = `${host} has failed ${failures} times in a row (${error ?? 'unknown'}), ${waiting} waiting`
      return isDead ? failure(found) : warning(found)
    },
  },
  {
    name: 'disk',
    remedy: 'make room on the disk of the data folder; the reserve for revocations is taken again by itself',
    examine(_ctx, { disk }) {
      const { reserve, free } = disk()
      const found = `${Math.floor(free / megabyte)} MiB free, reserve for revocations ${reserve ? 'held' : 'not held'}`
      return !reserve || free < 64 * megabyte ? failure(found) : free < 512 * megabyte ? warning(found) : ok(found)
    },
  },
]
