import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { exit, required, text, UsageError, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { aroundOrder, caRadiusText, dryRunOption, limitOption, wholeRadius } from './blast-radius.ts'
import { reasonOf, reasonOptions } from './reason.ts'

const number = (call: Invocation, option: string): number | undefined => {
  const given = text(call, option)
  if (given === undefined) return undefined
  if (!/^[1-9]\d{0,5}$/.test(given)) throw new UsageError(`--${option} ${given}: not the number of a generation`)
  return Number(given)
}

const units: Readonly<Record<string, number>> = { s: 1, m: 60, h: 3_600, d: 86_400 }
const seconds = (given: string): number => {
  const found = /^(\d{1,7})([smhd])$/.exec(given)
  const within = Number(found?.[1]) * (units[found?.[2] ?? ''] ?? Number.NaN)
  if (!(within <= 2_592_000)) throw new UsageError(`--within ${given}: a time such as 30m, 24h, 7d, at most 30d`)
  return within
}

const force = (call: Invocation): { reason: string } | null =>
  call.options['force'] === true ? { reason: required(text(call, 'reason'), '--reason TEXT with --force') } : null

type Outcome = ResponseOf<'ca.activate'>

const waits = (approval: string): string =>
  `nothing was done: another operator has to approve it (fleetkey approval grant ${approval}), then repeat this command`

/** Exit 3 while it waits for a second person: nothing was done. */
const tell = (call: Invocation, outcome: Outcome, done: string): number => {
  const { generation, already, approval } = outcome
  call.out.result(outcome, () => (approval === null ? `generation ${generation}: ${already ? 'nothing was left to do' : done}` : waits(approval)))
  return approval === null ? exit.ok : exit.refused
}

const spoken = ({ version, generations, roots, readiness }: ResponseOf<'ca.status'>): string =>
  [
    table([
      ['GENERATION', 'ROOT', 'STATE', 'SINCE', 'ISSUING CA', 'UNTIL', 'DEVICES'],
      ...generations.map((one) => [
        String(one.number),
        String(one.root),
        one.revoked !== null ? `revoked (${one.revoked.code})` : one.suspended === null ? one.state : `${one.state}, suspended`,
        one.since === 0 ? '-' : when(one.since),
        one.issuing,
        one.notAfter === null ? '-' : when(one.notAfter),
        one.devices !== null ? String(one.devices) : one.certificates !== null ? `at most ${one.certificates}` : '-',
      ]),
    ]),
    facts({
      roots: roots.map((root) => `${root.number} ${root.state}`).join(', '),
      'trust bundle': version === 1 ? '1 (that of the configuration)' : String(version),
      acknowledged: `${readiness.acknowledged} of ${readiness.devices} devices`,
      waiting: `${readiness.waiting} are connected and have not acknowledged it`,
      away: `${readiness.away} are away and come back${readiness.until === null ? '' : ` by certificates that end ${when(readiness.until)}`}`,
      stranded: `${readiness.stranded} are away and do not come back: they need the bundle of this server (fleetkey server bundle) by hand`,
      ...(readiness.first.length === 0 ? {} : { first: readiness.first.map(({ device, because }) => `${device} (${because})`).join(', ') }),
    }),
  ].join('\n')

const forcing = { force: { type: 'boolean', default: false }, reason: { type: 'string' } } as const

export const rolloverCommands: readonly Command[] = [
  {
    name: 'ca status',
    usage: '',
    summary: 'generations of the CA, and how many devices know the newest',
    args: [0, 0],
    async run(call) {
      const status = await call.client().call('ca.status')
      call.out.result(status, () => spoken(status))
      return exit.ok
    },
  },
  {
    name: 'ca prepare',
    usage: '[--root]',
    summary: 'make the next CA under the present root, with --root under a new one; nobody is told yet',
    args: [0, 0],
    options: { root: { type: 'boolean', default: false } },
    run: async (call) => tell(call, await call.client().call('ca.prepare', { body: { root: call.options['root'] === true } }), 'prepared; next: ca distribute'),
  },
  {
    name: 'ca distribute',
    usage: '',
    summary: 'tell every device of the next CA',
    args: [0, 0],
    run: async (call) => tell(call, await call.client().call('ca.distribute'), 'distributed; ca status shows who has acknowledged it; next: ca activate'),
  },
  {
    name: 'ca activate',
    usage: '[--force --reason TEXT]',
    summary: 'the next CA signs from now on; refused while a device would be stranded, unless another operator approves',
    args: [0, 0],
    options: forcing,
    run: async (call) =>
      tell(
        call,
        await call.client().call('ca.activate', { body: { force: force(call) } }),
        'active; the one before is accepted until it is retired; next: ca taint',
      ),
  },
  {
    name: 'ca taint',
    usage: '[GENERATION] [--within 24h]',
    summary: 'renew every device away from a CA that was superseded, spread over that time',
    args: [0, 1],
    options: { within: { type: 'string', default: '24h' } },
    async run(call) {
      const generation = number({ ...call, options: { generation: call.args[0] } }, 'generation')
      const body = { within: seconds(text(call, 'within') ?? '24h'), ...(generation === undefined ? {} : { generation }) }
      return tell(call, await call.client().call('ca.taint', { body }), 'tainted; ca status shows how many devices still depend on it; next: ca retire')
    },
  },
  {
    name: 'ca retire',
    usage: '[GENERATION] [--force --reason TEXT]',
    summary: 'refuse what a tainted CA has issued and destroy its key; refused while devices depend on it, unless another operator approves',
    args: [0, 1],
    options: forcing,
    async run(call) {
      const generation = number({ ...call, options: { generation: call.args[0] } }, 'generation')
      const body = { force: force(call), ...(generation === undefined ? {} : { generation }) }
      return tell(call, await call.client().call('ca.retire', { body }), 'retired; its key is destroyed')
    },
  },
  {
    name: 'ca blast-radius',
    usage: 'NAME|SERIAL [--limit N]',
    summary: 'what stands behind an issuing CA: devices, keys, epochs and topics, from when to when',
    args: [1, 1],
    options: limitOption,
    async run(call) {
      const params = { name: call.args[0] ?? '' }
      return await wholeRadius(call, async (query) => await call.client().call('ca.blast-radius', { params, query }), caRadiusText)
    },
  },
  {
    name: 'ca revoke',
    usage: 'NAME|SERIAL --reason TEXT [--code CODE] [--force] | --dry-run',
    summary:
      'for good, with the approval of another operator: cut what rests on an issuing CA, list it, destroy its key, rotate keys; --force for the one that signs',
    args: [1, 1],
    options: { ...reasonOptions, force: { type: 'boolean', default: false }, 'dry-run': { type: 'boolean', default: false } },
    async run(call) {
      const params = { name: call.args[0] ?? '' }
      const before = await call.client().call('ca.blast-radius', { params, query: {} })
      if (call.options['dry-run'] === true) {
        call.out.result(before, () => caRadiusText(before))
        return exit.ok
      }
      const outcome = await call.client().call('ca.revoke', { params, body: { ...reasonOf(call), force: call.options['force'] === true } })
      const { generation, already, approval, keys, campaigns } = outcome
      if (approval !== null) {
        call.out.result({ ...outcome, before }, () => `${caRadiusText(before)}\n\n${waits(approval)}`)
        return exit.refused
      }
      const after = await call.client().call('ca.blast-radius', { params, query: {} })
      call.out.result({ ...outcome, before, after }, () =>
        [
          already
            ? `generation ${generation} was revoked before`
            : `generation ${generation} revoked; keys rotated: ${keys.join(', ') || 'none'}${campaigns.length === 0 ? '' : ` (campaigns ${campaigns.join(', ')})`}`,
          `What stood behind it before:\n${caRadiusText(before)}`,
          `And now:\n${caRadiusText(after)}`,
        ].join('\n\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'ca suspend',
    usage: 'NAME|SERIAL --reason TEXT | --dry-run',
    summary:
      'accept nothing that an issuing CA which signs no more has issued, until it is reinstated: its devices prove themselves anew; shows what stands behind it',
    args: [1, 1],
    options: { reason: { type: 'string' }, ...dryRunOption },
    async run(call) {
      const params = { name: call.args[0] ?? '' }
      const body = { reason: call.options['dry-run'] === true ? '-' : required(text(call, 'reason'), '--reason TEXT') }
      return await aroundOrder<ResponseOf<'ca.blast-radius'>, Partial<Outcome>>(call, {
        radius: async () => await call.client().call('ca.blast-radius', { params, query: {} }),
        text: caRadiusText,
        preview: async () => ({}),
        order: async () => await call.client().call('ca.suspend', { params, body }),
        said: ({ generation, already }, dry) =>
          dry
            ? 'what it has issued would be refused, and no key rotated; the CA that signs cannot be suspended'
            : `generation ${generation} ${already === true ? 'was suspended before' : 'suspended; what it has issued is refused'}`,
      })
    },
  },
  {
    name: 'ca reinstate',
    usage: 'NAME|SERIAL',
    summary: 'accept again what a suspended CA has issued',
    args: [1, 1],
    run: async (call) => tell(call, await call.client().call('ca.reinstate', { params: { name: call.args[0] ?? '' } }), 'reinstated'),
  },
  {
    name: 'approval list',
    usage: '',
    summary: 'what waits for a second person',
    args: [0, 0],
    async run(call) {
      const { items } = await call.client().call('approval.list')
      call.out.result(items, () =>
        table([
          ['APPROVAL', 'STATE', 'WHAT', 'ASKED BY', 'BECAUSE', 'UNTIL', 'GRANTED BY', 'DETAIL'],
          ...items.map((one) => [one.id, one.state, one.what, one.askedBy, one.reason, when(one.expires), one.grantedBy ?? '-', one.detail]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'approval grant',
    usage: 'ID',
    summary: 'approve what another operator has asked for; nobody approves their own',
    args: [1, 1],
    async run(call) {
      const granted = await call.client().call('approval.grant', { params: { id: call.args[0] ?? '' } })
      call.out.result(granted, () => `${granted.what}: approved; ${granted.askedBy} can repeat the command until ${when(granted.expires)}`)
      return exit.ok
    },
  },
]
