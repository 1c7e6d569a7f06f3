import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { exit, number, required, text, UsageError, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { aroundOrder, deviceRadiusText, dryRunOption } from './blast-radius.ts'
import { deviceId } from './group.ts'
import { everyPage } from './paging.ts'
import { reasonOf, reasonOptions } from './reason.ts'

const states = ['registered', 'enrolled', 'quarantined', 'suspended', 'revoked'] as const

const campaignsText = (campaigns: readonly string[]): string => (campaigns.length === 0 ? '' : ` (campaigns ${campaigns.join(', ')})`)

const isDry = (call: Invocation): boolean => call.options['dry-run'] === true

type Outcome = ResponseOf<'device.revoke'>

/** Against a device; `act` is called unless it is a dry run. */
const deviceOrder = async (
  call: Invocation,
  of: { readonly order: 'revoke' | 'suspend'; readonly verb: string; readonly act: (id: DeviceId) => Promise<Outcome> },
): Promise<number> => {
  const id = deviceId(call.args[0] ?? '')
  const said = ({ already, keys, campaigns }: Outcome, dry: boolean): string =>
    already
      ? dry
        ? `${id}: nothing is left to do`
        : `${id} was ${of.verb} before`
      : `${id} ${dry ? 'would be ' : ''}${of.verb}; keys rotated: ${keys.join(', ') || 'none'}${campaignsText(campaigns)}`
  return await aroundOrder<ResponseOf<'device.blast-radius'>, Outcome>(call, {
    radius: async () => await call.client().call('device.blast-radius', { params: { id } }),
    text: deviceRadiusText,
    preview: async () => await call.client().call('device.preview', { params: { id, order: of.order } }),
    order: async () => await of.act(id),
    said,
  })
}

const measuredText = ({ entries, pending, violations, unlisted, at }: NonNullable<ResponseOf<'device.show'>['ima']>): string =>
  [`${entries} proven (${when(at)})`, ...(pending > 0 ? [`${pending} not yet`] : []), `${violations} violations`, `${unlisted} not listed`].join(', ')

const recoveryText = (id: string, { left, budget, days, attempts, heldAt }: NonNullable<ResponseOf<'device.show'>['recovery']>): string =>
  heldAt !== null
    ? `HELD since ${when(heldAt)}: device recover ${id}`
    : `${left} of ${budget} left in ${days} days${attempts === 0 ? '' : `, one under way (${attempts} certificates issued, none used)`}`

export const deviceCommands: readonly Command[] = [
  {
    name: 'device list',
    usage: '[--state registered|enrolled|quarantined|suspended|revoked] [--batch BATCH] [--limit N]',
    summary: 'devices',
    args: [0, 0],
    options: { state: { type: 'string' }, batch: { type: 'string' }, limit: { type: 'string' } },
    async run(call) {
      const given = text(call, 'state')
      const state = states.find((known) => known === given)
      if (given !== undefined && state === undefined) throw new UsageError(`--state takes ${states.join(', ')}, not ${given}`)
      const most = number(call, 'limit', 1, 1_000_000) ?? Infinity
      const items = await everyPage(
        (after) => call.client().call('device.list', { query: { after, state, batch: text(call, 'batch'), limit: Math.min(most, 1000) } }),
        most,
      )
      call.out.result(items, () =>
        table([
          ['DEVICE', 'SERIAL', 'MODEL', 'STATE', 'ONLINE', 'RELEASE', 'ASSURANCE', 'VERDICT', 'LAST REFUSAL'],
          ...items.map((row) => [
            row.id,
            row.serial,
            row.model,
            row.state,
            row.online ? 'yes' : 'no',
            row.release ?? '-',
            row.assurance ?? '-',
            row.verdict === null ? '-' : `${row.verdict} ${row.verdictReason ?? ''}`,
            row.refusal ?? '-',
          ]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'device show',
    usage: 'DEVICE',
    summary: 'one device: identity, verdict and claims, certificates, keys it holds, why it was refused last',
    args: [1, 1],
    async run(call) {
      const id = deviceId(call.args[0] ?? '')
      const device = await call.client().call('device.show', { params: { id } })
      const { certificates, holdings, lastRefusal, claims, ima, keyGeneration, renewal, recovery, ...rest } = device
      call.out.result(device, () =>
        [
          facts({
            ...rest,
            registeredAt: when(device.registeredAt),
            enrolledAt: when(device.enrolledAt),
            lastSeenAt: when(device.lastSeenAt),
            trust: device.trust === null ? 'that of its configuration' : `bundle ${device.trust.version}, acknowledged ${when(device.trust.at)}`,
            quarantinedAt: when(device.quarantinedAt),
            verdictAt: when(device.verdictAt),
            suspendedAt: when(device.suspendedAt),
            revokedAt: when(device.revokedAt),
            measuredFiles: ima === null ? '-' : measuredText(ima),
            keyGeneration: keyGeneration === null ? '-' : `${keyGeneration.keys ?? 'unknown'} of ${keyGeneration.current}`,
            tlsNotAfter: when(device.tlsNotAfter),
            ldevidNotAfter: when(device.ldevidNotAfter),
            renewal: renewal === null ? '-' : `${renewal.serial} until ${when(renewal.notAfter)}, issued ${when(renewal.issuedAt)}, not used yet`,
            recovery: recovery === null ? '-' : recoveryText(id, recovery),
            refusal: lastRefusal === null ? '-' : `${lastRefusal.reason} (${when(lastRefusal.at)})`,
          }),
          table([['CLAIM', 'VALUE'], ...claims.map(({ name, value }) => [name, value])]),
          table([
            ['CERTIFICATE', 'PROFILE', 'STATUS', 'FROM', 'UNTIL'],
            ...certificates.map((row) => [row.serial, row.profile, row.status, when(row.notBefore), when(row.notAfter)]),
          ]),
          table([
            ['KEY', 'EPOCH', 'STAGE', 'INSTALLED', 'ACTIVE', 'REASON'],
            ...holdings.map((row) => [row.key, String(row.epoch), row.stage, when(row.installedAt), when(row.activeAt), row.reason ?? '-']),
          ]),
        ].join('\n\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'device tag',
    usage: 'DEVICE NAME=VALUE … [NAME= …]',
    summary: 'write tags on a device, which groups can ask for; an empty value takes one away',
    args: [2, 33],
    async run(call) {
      const [device = '', ...given] = call.args
      const id = deviceId(device)
      const tags = Object.fromEntries(
        given.map((one): [string, string | null] => {
          const [, name = '', value = ''] = /^([a-z][a-z0-9-]{0,31})=(.*)$/.exec(one) ?? []
          if (name === '') throw new UsageError(`'${one}' is no tag: NAME=VALUE, the name in lower case`)
          return [name, value === '' ? null : value]
        }),
      )
      const result = await call.client().call('device.tag', { params: { id }, body: { tags } })
      call.out.result({ id, ...result }, () => facts(result.tags))
      return exit.ok
    },
  },
  {
    name: 'device attest',
    usage: 'DEVICE',
    summary: 'ask a device to attest now; one that is offline is asked when it next connects',
    args: [1, 1],
    async run(call) {
      const id = deviceId(call.args[0] ?? '')
      const { asked } = await call.client().call('device.attest', { params: { id } })
      call.out.result({ id, asked }, () =>
        asked === 'asked' ? `${id} asked: device show ${id} tells the verdict` : `${id} is offline: asked when it next connects`,
      )
      return exit.ok
    },
  },
  {
    name: 'device recover',
    usage: 'DEVICE --reason TEXT',
    summary: 'let a device that spent its recovery budget prove itself anew again',
    args: [1, 1],
    options: { reason: { type: 'string' } },
    async run(call) {
      const id = deviceId(call.args[0] ?? '')
      const result = await call.client().call('device.recover', { params: { id }, body: { reason: required(text(call, 'reason'), '--reason TEXT') } })
      call.out.result({ id, ...result }, () => `${id} ${result.held ? 'is not held any more' : 'was not held'}: its recovery budget is whole`)
      return exit.ok
    },
  },
  {
    name: 'device revoke',
    usage: 'DEVICE --reason TEXT [--code CODE] | --dry-run',
    summary: 'for good: cut its session, refuse its certificates, rotate the keys of its groups; shows what it could read, --dry-run only that',
    args: [1, 1],
    options: { ...reasonOptions, ...dryRunOption },
    async run(call) {
      const body = isDry(call) ? { reason: '-' } : reasonOf(call)
      return await deviceOrder(call, {
        order: 'revoke',
        verb: 'revoked',
        act: async (id) => await call.client().call('device.revoke', { params: { id }, body }),
      })
    },
  },
  {
    name: 'device suspend',
    usage: 'DEVICE --reason TEXT | --dry-run',
    summary: 'cut its session and refuse it until it is reinstated; its memberships stay; shows what it could read, --dry-run only that',
    args: [1, 1],
    options: { reason: { type: 'string' }, ...dryRunOption },
    async run(call) {
      const body = { reason: isDry(call) ? '-' : required(text(call, 'reason'), '--reason TEXT') }
      return await deviceOrder(call, {
        order: 'suspend',
        verb: 'suspended',
        act: async (id) => await call.client().call('device.suspend', { params: { id }, body }),
      })
    },
  },
  {
    name: 'device reinstate',
    usage: 'DEVICE',
    summary: 'end a suspension: it connects, is sent what it missed, and attests anew',
    args: [1, 1],
    async run(call) {
      const id = deviceId(call.args[0] ?? '')
      const done = await call.client().call('device.reinstate', { params: { id } })
      call.out.result(done, () => (done.already ? `${id} was not suspended` : `${id} reinstated`))
      return exit.ok
    },
  },
  {
    name: 'device blast-radius',
    usage: 'DEVICE',
    summary: 'keys, epochs and topics that it could read, from when to when',
    args: [1, 1],
    async run(call) {
      const radius = await call.client().call('device.blast-radius', { params: { id: deviceId(call.args[0] ?? '') } })
      call.out.result(radius, () => deviceRadiusText(radius))
      return exit.ok
    },
  },
]
