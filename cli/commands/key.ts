import type { BodyIn } from '@fleetkey/protocol/admin.ts'
import { duration, exit, required, text, UsageError, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { groupId } from './group.ts'
import { everyPage } from './paging.ts'
import { watchCampaign } from './campaign.ts'
import { policyOf, policyOptions, policyUsage, whole } from './campaign-policy.ts'
import { keyId } from './key-id.ts'

const cryptoperiodOptions = { 'rotate-every': { type: 'string' }, 'recipient-usage': { type: 'string' }, 'usage-limit': { type: 'string' } } as const

const cryptoperiodOf = (call: Invocation): BodyIn<'key.policy.set'> => {
  const recipientUsage = duration(call, 'recipient-usage')
  const originatorUsage = text(call, 'rotate-every') === 'never' ? null : duration(call, 'rotate-every')
  const usageLimit = text(call, 'usage-limit') === 'none' ? null : whole(call, 'usage-limit', 1, Number.MAX_SAFE_INTEGER)
  return {
    ...(recipientUsage === undefined ? {} : { recipientUsage }),
    ...(originatorUsage === undefined ? {} : { originatorUsage }),
    ...(usageLimit === undefined ? {} : { usageLimit }),
  }
}

export const keyCommands: readonly Command[] = [
  {
    name: 'key create',
    usage: 'KEY --protection sealed|tpm [--rotate-every 90d] [--recipient-usage 7d] [--usage-limit N]',
    summary: 'create a managed key: sealed (AES-256-GCM, opened in memory) or tpm (HMAC-SHA256, never leaves the TPM)',
    args: [1, 1],
    options: { protection: { type: 'string' }, ...cryptoperiodOptions },
    async run(call) {
      const protection = required(text(call, 'protection'), '--protection sealed|tpm')
      if (protection !== 'sealed' && protection !== 'tpm') throw new UsageError(`--protection takes sealed or tpm, not ${protection}`)
      const created = await call.client().call('key.create', { body: { id: keyId(call.args[0] ?? ''), protection, ...cryptoperiodOf(call) } })
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
          `${facts({ ...rest, rotatesAt: when(key.rotatesAt), createdAt: when(key.createdAt) })}\n\n${table([['EPOCH', 'STATE', 'USED', 'ACTIVATED', 'DEACTIVATED', 'DESTROYED', 'KEPT'], ...epochs.map((row) => [String(row.epoch), row.state, String(row.used), when(row.activatedAt), when(row.deactivatedAt), when(row.destroyedAt), row.overlap ? 'for devices that have not proven a newer one' : '-'])])}`,
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
    name: 'key policy set',
    usage: 'KEY [--rotate-every 90d|never] [--recipient-usage 7d] [--usage-limit N|none]',
    summary: 'how long and for how many messages an epoch is used before it is rotated by itself, and how long it is read afterwards',
    args: [1, 1],
    options: { ...cryptoperiodOptions },
    async run(call) {
      const id = keyId(call.args[0] ?? '')
      const key = await call.client().call('key.policy.set', { params: { id }, body: cryptoperiodOf(call) })
      call.out.result(key, () => `key ${key.id}: ${key.rotatesAt === null ? 'rotated when somebody says so' : `rotated at ${when(key.rotatesAt)}`}`)
      return exit.ok
    },
  },
  {
    name: 'key rotate',
    usage: `KEY ${policyUsage} [--may-cut N] [--compromised --reason WHY] [--watch]`,
    summary:
      'a new epoch: installed everywhere first, then activated, then the old one retired (docs/campaigns.md); --compromised: at once, the old one is in other hands',
    args: [1, 1],
    options: {
      ...policyOptions,
      'may-cut': { type: 'string' },
      compromised: { type: 'boolean', default: false },
      reason: { type: 'string' },
      watch: { type: 'boolean', default: false },
    },
    async run(call) {
      const params = { id: keyId(call.args[0] ?? '') }
      const policy = policyOf(call)
      const compromised = call.options['compromised'] === true
      if (compromised && Object.values(policy).some((value) => value !== undefined))
        throw new UsageError('--compromised has a policy of its own: it waits for nobody')
      const mayCut = whole(call, 'may-cut', 0, 100_000_000)
      const started = compromised
        ? await call.client().call('key.compromised', { params, body: { reason: required(text(call, 'reason'), '--reason WHY') } })
        : await call.client().call('key.rotate', { params, body: { ...policy, ...(mayCut === undefined ? {} : { mayCut }) } })
      if (call.options['watch'] === true) return await watchCampaign(call, started.campaign)
      call.out.result(started, () => `campaign ${started.campaign}: epoch ${started.epoch}; follow it with fleetkey campaign watch ${started.campaign}`)
      return exit.ok
    },
  },
]
