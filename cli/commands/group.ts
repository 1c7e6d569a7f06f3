import { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'
import { exit, text, UsageError, type Command } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { everyPage } from './paging.ts'

export const groupId = (value: string): GroupId => {
  const parsed = GroupId.safeParse(value)
  if (!parsed.success) throw new UsageError(`'${value}' is no group name: lower-case letters, digits and dashes, at most 64`)
  return parsed.data
}

export const deviceId = (value: string): DeviceId => {
  const parsed = DeviceId.safeParse(value)
  if (!parsed.success) throw new UsageError(`'${value}' is no device id: lower-case letters, digits and dashes, at most 64, not starting with e-`)
  return parsed.data
}

export const groupCommands: readonly Command[] = [
  {
    name: 'group create',
    usage: "GROUP [--query 'batch=B1 AND tag.site=berlin']",
    summary: 'create a group of devices; with a query its members are the devices that it asks for',
    args: [1, 1],
    options: { query: { type: 'string' } },
    async run(call) {
      const id = groupId(call.args[0] ?? '')
      const query = text(call, 'query')
      await call.client().call('group.create', { body: { id, ...(query === undefined ? {} : { query }) } })
      call.out.result({ id }, () => `group ${id} created`)
      return exit.ok
    },
  },
  {
    name: 'group query',
    usage: "GROUP 'FIELD=VALUE[,VALUE…] [AND FIELD!=VALUE …]' | GROUP --none",
    summary: 'have the members follow a query (fields batch, model, serial, release, assurance, tag.NAME), or add and remove them by hand again',
    args: [1, 2],
    options: { none: { type: 'boolean', default: false } },
    async run(call) {
      const [group = '', query] = call.args
      if ((query === undefined) !== (call.options['none'] === true)) throw new UsageError('name a query, or --none')
      const changed = await call.client().call('group.query', { params: { id: groupId(group) }, body: { query: query ?? null } })
      call.out.result(
        changed,
        () => `${changed.members} members of ${group} ${query === undefined ? 'stay; they are added and removed by hand' : `follow ${query}`}`,
      )
      return exit.ok
    },
  },
  {
    name: 'group list',
    usage: '',
    summary: 'groups',
    args: [0, 0],
    async run(call) {
      const items = await everyPage((after) => call.client().call('group.list', { query: { after } }))
      call.out.result(items, () =>
        table([
          ['GROUP', 'MEMBERS', 'KEYS', 'CONNECTION-PROOF'],
          ...items.map((row) => [row.id, String(row.members), row.keys.join(' ') || '-', row.policy.connectionProof ? 'on' : 'off']),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'group show',
    usage: 'GROUP',
    summary: 'one group and its members',
    args: [1, 1],
    async run(call) {
      const params = { id: groupId(call.args[0] ?? '') }
      const group = await call.client().call('group.show', { params })
      const members = await everyPage((after) => call.client().call('group.members', { params, query: { after, limit: 1000 } }))
      call.out.result(
        { ...group, memberList: members },
        () =>
          `${facts({ ...group, createdAt: when(group.createdAt) })}\n${table([['DEVICE', 'JOINED'], ...members.map((row) => [row.device, when(row.joinedAt)])])}`,
      )
      return exit.ok
    },
  },
  {
    name: 'group add',
    usage: 'GROUP [DEVICE …] [--batch BATCH]',
    summary: 'add devices, or every device of a batch',
    args: [1, 10_001],
    options: { batch: { type: 'string' } },
    async run(call) {
      const [group = '', ...devices] = call.args
      const batch = text(call, 'batch')
      if (devices.length === 0 && batch === undefined) throw new UsageError('name devices or a --batch')
      const body = { ...(devices.length === 0 ? {} : { devices: devices.map(deviceId) }), ...(batch === undefined ? {} : { batch }) }
      const added = await call.client().call('group.add', { params: { id: groupId(group) }, body })
      call.out.result(added, () => `${added.added} added to ${group}, ${added.already} were in it`)
      return exit.ok
    },
  },
  {
    name: 'group remove',
    usage: 'GROUP DEVICE',
    summary: 'remove a device; keys are rotated when the policy says so',
    args: [2, 2],
    async run(call) {
      const [group = '', device = ''] = call.args
      await call.client().call('group.remove', { params: { id: groupId(group), device: deviceId(device) } })
      call.out.result({ group, device }, () => `${device} removed from ${group}`)
      return exit.ok
    },
  },
]
