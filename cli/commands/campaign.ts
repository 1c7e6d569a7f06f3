import { setTimeout as sleep } from 'node:timers/promises'
import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { duration, exit, number, required, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { policyFacts, policyOf, policyOptions, policyUsage, whole } from './campaign-policy.ts'
import { keyId } from './key-id.ts'
import { everyPage } from './paging.ts'

type Campaign = ResponseOf<'campaign.show'>
const ended: readonly string[] = ['done', 'halted', 'aborted', 'rolled-back']

const stagesOf = (counts: Campaign['counts']): string =>
  Object.entries(counts)
    .filter(([, count]) => count > 0)
    .map(([stage, count]) => `${stage} ${count}`)
    .join(', ')

const waits: Readonly<Record<Campaign['waitsFor'], string>> = {
  approval: 'waits for another person: campaign approve',
  'start-time': 'waits for its start time',
  window: 'waits for the maintenance window',
  devices: 'waits for devices',
  soak: 'soaks',
  person: 'waits for a person: campaign advance',
  readers: 'the old epoch can still be read',
  stragglers: 'the old epoch is kept for devices that have not proven the new one',
  confirmation: 'waits for a person: campaign confirm',
  nothing: '',
}

/** `waits for the maintenance window until 2027-01-02 22:00:00Z` */
const waiting = ({ waitsFor, until }: Campaign): string =>
  waits[waitsFor] === '' ? '' : `${waits[waitsFor]}${until === null || waitsFor === 'devices' ? '' : ` until ${when(until)}`}`

/** `installing  wave 2/3  [######----] installed 12, pending 10` */
const bar = (campaign: Campaign): string => {
  const proven = (['active', 'retired', 'already-current', 'left'] as const).reduce((sum, stage) => sum + (campaign.counts[stage] ?? 0), 0)
  const width = 20
  const filled = campaign.targets === 0 ? width : Math.floor((proven / campaign.targets) * width)
  const wait = waiting(campaign)
  return `${campaign.state.padEnd(10)} wave ${campaign.wave + 1}/${campaign.waves} [${'#'.repeat(filled)}${'-'.repeat(width - filled)}] ${stagesOf(campaign.counts)}${wait === '' || campaign.waitsFor === 'devices' ? '' : `; ${wait}`}`
}

/** Rows of a list that are printed. */
const most = (call: Invocation): number => whole(call, 'limit', 1, 1_000_000) ?? 100

const countOf = (campaign: Campaign, ...stages: readonly (keyof Campaign['counts'])[]): number =>
  stages.reduce((sum, stage) => sum + (campaign.counts[stage] ?? 0), 0)

/** Every device has proven the new epoch or was given up. What is left is to retire the old one, when its time for reading is over: days, by default. */
const isProven = (campaign: Campaign): boolean =>
  (campaign.state === 'activating' || campaign.state === 'retiring') && countOf(campaign, 'pending', 'delivered', 'installed') === 0

const verdict = (campaign: Campaign): number => {
  if (campaign.state !== 'done' && !isProven(campaign)) return exit.partial
  return countOf(campaign, 'failed', 'timed-out', 'quarantined') > 0 ? exit.partial : exit.ok
}

const outcome = (campaign: Campaign): string => {
  const why = `${campaign.because === '' ? '' : `, ${campaign.because}`}${campaign.halted === null ? '' : ` (${campaign.halted})`}`
  const what = campaign.state === 'activating' ? `epoch ${campaign.to} in use, epoch ${campaign.from} can still be read` : campaign.state
  return `campaign ${campaign.id}: ${what}${why}: ${stagesOf(campaign.counts)}`
}

/**
 * Follows a campaign until every device has proven the new epoch or was given up; with `retired` until the old one is retired as well. `--json`: a line for
 * every change. Exit 0 only if every device has proven it.
 */
export const watchCampaign = async (
  call: Invocation,
  id: string,
  of: { readonly until?: number | undefined; readonly retired?: boolean } = {},
): Promise<number> => {
  const { until } = of
  let last = ''
  for (;;) {
    const campaign = await call.client().call('campaign.show', { params: { id } })
    const line = bar(campaign)
    if (line !== last) {
      if (call.out.json || !process.stderr.isTTY) call.out.line(campaign, line)
      else call.out.progress(line)
    }
    last = line
    if (ended.includes(campaign.state) || (of.retired !== true && isProven(campaign))) {
      call.out.done()
      if (!call.out.json) call.out.line(campaign, outcome(campaign))
      return verdict(campaign)
    }
    if (until !== undefined && Date.now() >= until) {
      call.out.done()
      call.out.warn(`campaign ${id} is still ${campaign.state}: ${stagesOf(campaign.counts)}`)
      return exit.partial
    }
    await sleep(250)
  }
}

const answer = (call: Invocation, campaign: Campaign): number => {
  const wait = waiting(campaign)
  call.out.result(campaign, () => `campaign ${campaign.id}: ${campaign.state}${wait === '' || campaign.waitsFor === 'devices' ? '' : `, ${wait}`}`)
  return exit.ok
}

const act = (verb: 'pause' | 'abort' | 'approve' | 'advance' | 'retry' | 'rollback', summary: string): Command => ({
  name: `campaign ${verb}`,
  usage: 'CAMPAIGN',
  summary,
  args: [1, 1],
  async run(call) {
    const [id = ''] = call.args
    return answer(call, await call.client().call(`campaign.${verb}`, { params: { id } }))
  },
})

export const campaignCommands: readonly Command[] = [
  {
    name: 'campaign list',
    usage: '',
    summary: 'rotation campaigns',
    args: [0, 0],
    async run(call) {
      const items = await everyPage((after) => call.client().call('campaign.list', { query: { after } }))
      call.out.result(items, () =>
        table([
          ['CAMPAIGN', 'KEY', 'EPOCH', 'STATE', 'WAVE', 'STAGES', 'STARTED'],
          ...items.map((row) => [
            row.id,
            row.key,
            `${row.from}→${row.to}`,
            row.state,
            `${row.wave + 1}/${row.waves}`,
            stagesOf(row.counts),
            when(row.createdAt),
          ]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'campaign show',
    usage: 'CAMPAIGN [--limit 100]',
    summary: 'one campaign and the devices that have not proven the new epoch: those that the end of the old one would cut',
    args: [1, 1],
    options: { limit: { type: 'string' } },
    async run(call) {
      const params = { id: call.args[0] ?? '' }
      const campaign = await call.client().call('campaign.show', { params })
      const open = await everyPage((after) => call.client().call('campaign.targets', { params, query: { after, limit: 1000, behind: 'true' } }), most(call))
      const { waveCounts, counts, policy, until, ...rest } = campaign
      call.out.result({ ...campaign, open }, () =>
        [
          facts({
            ...rest,
            createdAt: when(campaign.createdAt),
            finishedAt: when(campaign.finishedAt),
            until: when(until),
            mayCut: campaign.mayCut ?? 'any',
            stages: stagesOf(counts),
          }),
          facts(policyFacts(policy)),
          table([['WAVE', 'STAGES'], ...waveCounts.map((of, wave) => [String(wave + 1), stagesOf(of)])]),
          open.length === 0
            ? 'every device has proven the new epoch'
            : table([
                [`NOT PROVEN (${open.length} of ${campaign.behind})`, 'WAVE', 'STAGE', 'SINCE', 'WHY'],
                ...open.map((row) => [row.device, String(row.wave + 1), row.stage, when(row.changedAt), row.reason ?? '-']),
              ]),
        ].join('\n\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'campaign watch',
    usage: 'CAMPAIGN [--for 10m] [--retired]',
    summary: 'follow a campaign until every device has proven the new epoch (--retired: and the old one is retired); exit 0 only if all have, else 4',
    args: [1, 1],
    options: { for: { type: 'string' }, retired: { type: 'boolean' } },
    async run(call) {
      const patience = duration(call, 'for')
      const until = patience === undefined ? undefined : Date.now() + patience
      return await watchCampaign(call, call.args[0] ?? '', { until, retired: call.options['retired'] === true })
    },
  },
  {
    name: 'campaign create',
    usage: `KEY ${policyUsage} [--watch]`,
    summary: 'bring every device to the epoch in use, without a new one: those that have proven it are already current',
    args: [1, 1],
    options: { ...policyOptions, watch: { type: 'boolean', default: false } },
    async run(call) {
      const started = await call.client().call('campaign.create', { body: { key: keyId(call.args[0] ?? ''), ...policyOf(call) } })
      if (call.options['watch'] === true) return await watchCampaign(call, started.campaign)
      call.out.result(started, () => `campaign ${started.campaign}: epoch ${started.epoch}; follow it with fleetkey campaign watch ${started.campaign}`)
      return exit.ok
    },
  },
  {
    name: 'campaign preview',
    usage: 'KEY [--limit 100]',
    summary: 'devices that a rotation concerns, and those that a strict end of the old epoch could cut off, as things stand',
    args: [1, 1],
    options: { limit: { type: 'string' } },
    async run(call) {
      const params = { id: keyId(call.args[0] ?? '') }
      const { items, next: _, ...counts } = await call.client().call('campaign.preview', { params, query: { limit: 1 } })
      const listed =
        items.length === 0 ? [] : await everyPage((after) => call.client().call('campaign.preview', { params, query: { after, limit: 1000 } }), most(call))
      call.out.result({ ...counts, items: listed }, () =>
        [
          `${counts.devices} devices; ${counts.count} of them could be cut off by a strict end of the old epoch${counts.count > 0 ? ` (--overlap strict --may-cut ${counts.count})` : ''}`,
          ...(listed.length === 0
            ? []
            : [
                table([
                  ['DEVICE', 'WHY', 'LAST SEEN'],
                  ...listed.map((row) => [row.device, row.because === 'away' ? 'not connected' : 'has not proven the epoch in use', when(row.lastSeenAt)]),
                ]),
              ]),
        ].join('\n\n'),
      )
      return exit.ok
    },
  },
  act('approve', 'approve a campaign that another person has ordered: it starts, now or at its time'),
  act('advance', 'let a campaign with manual waves pass the newest one'),
  act('pause', 'pause: nothing more is sent until it is resumed'),
  {
    name: 'campaign resume',
    usage: 'CAMPAIGN [--error-threshold 0.2]',
    summary: 'resume what is paused or halted; one that halted halts again unless its devices were tried again (campaign retry) or the threshold is another',
    args: [1, 1],
    options: { 'error-threshold': { type: 'string' } },
    async run(call) {
      const errorThreshold = number(call, 'error-threshold', 0, 1)
      return answer(
        call,
        await call.client().call('campaign.resume', { params: { id: call.args[0] ?? '' }, body: errorThreshold === undefined ? {} : { errorThreshold } }),
      )
    },
  },
  act('abort', 'abort: what is installed stays readable, nothing more is sent'),
  act('retry', 'try the devices again that failed or were given up; a campaign that stands still goes on'),
  act('rollback', 'take back a campaign that halted or is paused: to the epoch before it, or to a further one when its own is in use already'),
  {
    name: 'campaign confirm',
    usage: 'CAMPAIGN --cut N',
    summary: 'agree that N devices lose the old epoch without having proven the new one (policy --overlap strict)',
    args: [1, 1],
    options: { cut: { type: 'string' } },
    async run(call) {
      const devices = whole(call, 'cut', 0, 100_000_000)
      return answer(call, await call.client().call('campaign.confirm', { params: { id: call.args[0] ?? '' }, body: { devices: required(devices, '--cut N') } }))
    },
  },
]
