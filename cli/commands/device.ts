import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { exit, number, required, text, UsageError, type Command } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { deviceId } from './group.ts'
import { everyPage } from './paging.ts'

const states = ['registered', 'enrolled', 'quarantined', 'revoked'] as const

const measuredText = ({ entries, pending, violations, unlisted, at }: NonNullable<ResponseOf<'device.show'>['ima']>): string =>
  [`${entries} proven (${when(at)})`, ...(pending > 0 ? [`${pending} not yet`] : []), `${violations} violations`, `${unlisted} not listed`].join(', ')

export const deviceCommands: readonly Command[] = [
  {
    name: 'device list',
    usage: '[--state registered|enrolled|quarantined|revoked] [--batch BATCH] [--limit N]',
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
      const device = await call.client().call('device.show', { params: { id: deviceId(call.args[0] ?? '') } })
      const { certificates, holdings, lastRefusal, claims, ima, keyGeneration, ...rest } = device
      call.out.result(device, () =>
        [
          facts({
            ...rest,
            registeredAt: when(device.registeredAt),
            enrolledAt: when(device.enrolledAt),
            lastSeenAt: when(device.lastSeenAt),
            quarantinedAt: when(device.quarantinedAt),
            verdictAt: when(device.verdictAt),
            revokedAt: when(device.revokedAt),
            measuredFiles: ima === null ? '-' : measuredText(ima),
            keyGeneration: keyGeneration === null ? '-' : `${keyGeneration.keys ?? 'unknown'} of ${keyGeneration.current}`,
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
    name: 'device revoke',
    usage: 'DEVICE --reason TEXT',
    summary: 'cut its session, refuse its certificates from now on, rotate the keys of its groups',
    args: [1, 1],
    options: { reason: { type: 'string' } },
    async run(call) {
      const id = deviceId(call.args[0] ?? '')
      const revoked = await call.client().call('device.revoke', { params: { id }, body: { reason: required(text(call, 'reason'), '--reason TEXT') } })
      call.out.result(
        revoked,
        () =>
          `${id} revoked; keys rotated: ${revoked.keys.join(', ') || 'none'}${revoked.campaigns.length === 0 ? '' : ` (campaigns ${revoked.campaigns.join(', ')})`}`,
      )
      return exit.ok
    },
  },
]
