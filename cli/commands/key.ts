import { KeyId } from '@fleetkey/protocol/ids.ts'
import { duration, exit, number, required, text, UsageError, type Command } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { groupId } from './group.ts'
import { everyPage } from './paging.ts'
import { watchCampaign } from './campaign.ts'

/** A key's name, or a usage error. */
export const keyId = (value: string): KeyId => {
  const parsed = KeyId.safeParse(value)
  if (!parsed.success) throw new UsageError(`'${value}' is no key name: lower-case letters, digits and dashes, at most 64`)
  return parsed.data
}

const waves = (given: string | undefined): number[] | undefined => {
  if (given === undefined) return undefined
  const shares = given.split(',').map(Number)
  const ascending = shares.every((share, at) => share > (shares[at - 1] ?? 0) && share <= 1)
  if (!ascending || shares.at(-1) !== 1) throw new UsageError(`--waves takes ascending shares that end with 1, such as 0.1,0.5,1, not ${given}`)
  return shares
}

export const keyCommands: readonly Command[] = [
  {
    name: 'key create',
    usage: 'KEY --protection sealed|tpm [--recipient-usage 7d]',
    summary: 'create a managed key: sealed (AES-256-GCM, opened in memory) or tpm (HMAC-SHA256, never leaves the TPM)',
    args: [1, 1],
    options: { protection: { type: 'string' }, 'recipient-usage': { type: 'string' } },
    async run(call) {
      const protection = required(text(call, 'protection'), '--protection sealed|tpm')
      if (protection !== 'sealed' && protection !== 'tpm') throw new UsageError(`--protection takes sealed or tpm, not ${protection}`)
      const recipientUsage = duration(call, 'recipient-usage')
      const created = await call
        .client()
        .call('key.create', { body: { id: keyId(call.args[0] ?? ''), protection, ...(recipientUsage === undefined ? {} : { recipientUsage }) } })
      call.out.result(created, () => `key ${created.id} created, epoch ${created.epoch}`)
      return exit.ok
    },
  },
  {
    name: 'key list',
    usage: '',
    summary: 'managed keys',
    args: [0, 0],
    async run(call) {
      const items = await everyPage((after) => call.client().call('key.list', { query: { after } }))
      call.out.result(items, () =>
        table([
          ['KEY', 'ALGORITHM', 'PROTECTION', 'CURRENT', 'LATEST', 'GRANTED TO'],
          ...items.map((row) => [row.id, row.algorithm, row.protection, String(row.current), String(row.latest), row.grants.join(' ') || '-']),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'key show',
    usage: 'KEY',
    summary: 'one key with its epochs',
    args: [1, 1],
    async run(call) {
      const key = await call.client().call('key.show', { params: { id: keyId(call.args[0] ?? '') } })
      const { epochs, ...rest } = key
      call.out.result(
        key,
        () =>
          `${facts({ ...rest, createdAt: when(key.createdAt) })}\n\n${table([['EPOCH', 'STATE', 'ACTIVATED', 'DEACTIVATED', 'DESTROYED'], ...epochs.map((row) => [String(row.epoch), row.state, when(row.activatedAt), when(row.deactivatedAt), when(row.destroyedAt)])])}`,
      )
      return exit.ok
    },
  },
  {
    name: 'key grant',
    usage: 'KEY GROUP [--history]',
    summary: 'let the members of a group hold a key; they receive it at once, epochs from before only with --history',
    args: [2, 2],
    options: { history: { type: 'boolean', default: false } },
    async run(call) {
      const [key = '', group = ''] = call.args
      const granted = await call
        .client()
        .call('key.grant', { params: { id: keyId(key) }, body: { group: groupId(group), history: call.options['history'] === true } })
      call.out.result(granted, () => `${key} granted to ${group}: ${granted.devices} devices`)
      return exit.ok
    },
  },
  {
    name: 'key rotate',
    usage: 'KEY [--waves 0.1,0.5,1] [--success-threshold 0.9] [--error-threshold 0.1] [--deadline 10m] [--watch]',
    summary: 'a new epoch: installed everywhere first, then activated, then the old one retired',
    args: [1, 1],
    options: {
      waves: { type: 'string' },
      'success-threshold': { type: 'string' },
      'error-threshold': { type: 'string' },
      deadline: { type: 'string' },
      watch: { type: 'boolean', default: false },
    },
    async run(call) {
      const policy = {
        waves: waves(text(call, 'waves')),
        successThreshold: number(call, 'success-threshold', 0, 1),
        errorThreshold: number(call, 'error-threshold', 0, 1),
        deadline: duration(call, 'deadline'),
      }
      const started = await call.client().call('key.rotate', { params: { id: keyId(call.args[0] ?? '') }, body: policy })
      if (call.options['watch'] === true) return await watchCampaign(call, started.campaign)
      call.out.result(started, () => `campaign ${started.campaign}: epoch ${started.epoch}; follow it with fleetkey campaign watch ${started.campaign}`)
      return exit.ok
    },
  },
]
