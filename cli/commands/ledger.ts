import type { OperationName, ResponseOf } from '@fleetkey/protocol/admin.ts'
import { date, exit, number, required, text, UsageError, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { deviceId } from './group.ts'
import { keyId } from './key-id.ts'
import { everyPage } from './paging.ts'

type Item<N extends OperationName> = ResponseOf<N> extends { items: (infer I)[] } ? I : never

const stages = ['not-enrolled', 'quarantined', 'suspended', 'not-entitled', 'pending', 'delivered', 'installed', 'failed'] as const
const windowOptions = { from: { type: 'string' }, until: { type: 'string' }, limit: { type: 'string' } } as const
const window = (call: Invocation): { from: number; until: number | undefined } => ({
  from: required(date(call, 'from', 'start'), '--from TIME'),
  until: date(call, 'until'),
})
const most = (call: Invocation): number => number(call, 'limit', 1, 1_000_000) ?? Infinity

const readersText = (items: readonly Item<'key.readers'>[]): string =>
  table([
    ['DEVICE', 'KEY', 'EPOCH', 'PROOF', 'COULD READ', 'HELD FROM', 'ERASED'],
    ...items.map((row) => [
      row.device,
      row.key,
      String(row.epoch),
      row.proof,
      row.when === 'then' ? 'at the time' : 'later, a recording',
      when(row.heldFrom),
      when(row.heldUntil),
    ]),
  ])

/** Questions that the ledger answers. */
export const ledgerCommands: readonly Command[] = [
  {
    name: 'key unproven',
    usage: 'KEY [--epoch N] [--stage STAGE] [--limit N]',
    summary: 'devices that have proven neither an epoch (the newest) nor a newer one, and why',
    args: [1, 1],
    options: { epoch: { type: 'string' }, stage: { type: 'string' }, limit: { type: 'string' } },
    async run(call) {
      const id = keyId(call.args[0] ?? '')
      const epoch = number(call, 'epoch', 1, 0xffff_ffff)
      const given = text(call, 'stage')
      const stage = stages.find((known) => known === given)
      if (given !== undefined && stage === undefined) throw new UsageError(`--stage takes ${stages.join(', ')}, not ${given}`)
      let counts = { epoch: 0, proven: 0 }
      const items = await everyPage(async (after) => {
        const found = await call.client().call('key.unproven', { params: { id }, query: { after, epoch } })
        counts = { epoch: found.epoch, proven: found.proven }
        return { items: found.items.filter((row) => stage === undefined || row.stage === stage), next: found.next }
      }, most(call))
      call.out.result({ ...counts, items }, () =>
        [
          `epoch ${counts.epoch} of ${id}: ${counts.proven} devices use it`,
          table([
            ['DEVICE', 'STAGE', 'SINCE', 'LAST SEEN', 'ONLINE', 'WHY'],
            ...items.map((row) => [row.device, row.stage, when(row.since), when(row.lastSeenAt), row.online ? 'yes' : 'no', row.reason]),
          ]),
        ].join('\n\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'key readers',
    usage: 'KEY --from TIME [--until TIME] [--limit N]',
    summary: 'devices that could read what a key protected between two times, then or from a recording later',
    args: [1, 1],
    options: windowOptions,
    async run(call) {
      const id = keyId(call.args[0] ?? '')
      const between = window(call)
      const items = await everyPage((after) => call.client().call('key.readers', { params: { id }, query: { after, ...between } }), most(call))
      call.out.result(items, () => readersText(items))
      return exit.ok
    },
  },
  {
    name: 'topic readers',
    usage: 'TOPIC --from TIME [--until TIME] [--limit N]',
    summary: 'the same for a topic: by the keys that protected it at the time (key topics)',
    args: [1, 1],
    options: windowOptions,
    async run(call) {
      const topic = call.args[0] ?? ''
      const between = window(call)
      const items = await everyPage((after) => call.client().call('topic.readers', { query: { after, topic, ...between } }), most(call))
      call.out.result(items, () => readersText(items))
      return exit.ok
    },
  },
  {
    name: 'key topics',
    usage: 'KEY [TOPIC …] [--none]',
    summary: 'say which topics or MQTT filters applications protect with a key, from now on; without topics: show them',
    args: [1, 65],
    options: { none: { type: 'boolean', default: false } },
    async run(call) {
      const [name = '', ...topics] = call.args
      const id = keyId(name)
      const none = call.options['none'] === true
      if (none && topics.length > 0) throw new UsageError('--none, or topics')
      const shows = topics.length === 0 && !none
      const key = await (shows ? call.client().call('key.show', { params: { id } }) : call.client().call('key.topics', { params: { id }, body: { topics } }))
      call.out.result({ id, topics: key.topics }, () => key.topics.join('\n') || '-')
      return exit.ok
    },
  },
  {
    name: 'device held',
    usage: 'DEVICE [--at TIME]',
    summary: 'what a device held at a time (now): epochs, groups, keys it was entitled to',
    args: [1, 1],
    options: { at: { type: 'string' } },
    async run(call) {
      const id = deviceId(call.args[0] ?? '')
      const at = date(call, 'at')
      let last: ResponseOf<'device.held'> | undefined
      const items = await everyPage(async (after) => (last = await call.client().call('device.held', { params: { id }, query: { after, at } })))
      const { groups = [], granted = [], at: moment } = last ?? {}
      call.out.result({ device: id, at: moment, groups, granted, items }, () =>
        [
          facts({ at: when(moment), groups: groups.join(', ') || '-', 'granted to them': granted.join(', ') || '-' }),
          table([
            ['KEY', 'EPOCH', 'EPOCH WAS', 'PROOF', 'HELD FROM', 'ERASED'],
            ...items.map((row) => [row.key, String(row.epoch), row.state, row.proof, when(row.heldFrom), when(row.heldUntil)]),
          ]),
        ].join('\n\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'revocation preview',
    usage: 'device|batch|station|ca ID',
    summary: 'keys that revoking it would rotate; a ca by the number of its generation',
    args: [2, 2],
    async run(call) {
      const [what = '', id = ''] = call.args
      if (!['device', 'batch', 'station', 'ca'].includes(what)) throw new UsageError(`device, batch, station or ca, not ${what}`)
      const found = await call.client().call('revocation.preview', { params: { what, id } })
      call.out.result(found, () =>
        facts({ 'keys to rotate': found.keys.join(', ') || 'none', 'through groups': found.groups.join(', ') || '-', devices: found.devices ?? 'not counted' }),
      )
      return exit.ok
    },
  },
]
