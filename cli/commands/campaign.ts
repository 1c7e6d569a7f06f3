import { setTimeout as sleep } from 'node:timers/promises'
import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { duration, exit, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { everyPage } from './paging.ts'

type Campaign = ResponseOf<'campaign.show'>
const ended: readonly string[] = ['done', 'halted', 'aborted']

const stagesOf = (counts: Campaign['counts']): string =>
  Object.entries(counts)
    .filter(([, count]) => count > 0)
    .map(([stage, count]) => `${stage} ${count}`)
    .join(', ')

/** `installing  wave 2/3  [######----] installed 12, pending 10` */
const bar = (campaign: Campaign): string => {
  const proven = (['active', 'retired', 'already-current', 'left'] as const).reduce((sum, stage) => sum + (campaign.counts[stage] ?? 0), 0)
  const width = 20
  const filled = campaign.targets === 0 ? width : Math.floor((proven / campaign.targets) * width)
  return `${campaign.state.padEnd(10)} wave ${campaign.wave + 1}/${campaign.waves} [${'#'.repeat(filled)}${'-'.repeat(width - filled)}] ${stagesOf(campaign.counts)}`
}

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
  const why = campaign.because === '' ? '' : `, ${campaign.because}`
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

const act = (verb: 'pause' | 'resume' | 'abort', summary: string): Command => ({
  name: `campaign ${verb}`,
  usage: 'CAMPAIGN',
  summary,
  args: [1, 1],
  async run(call) {
    const [id = ''] = call.args
    const campaign = await call.client().call(`campaign.${verb}`, { params: { id } })
    call.out.result(campaign, () => `campaign ${id}: ${campaign.state}`)
    return exit.ok
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
    usage: 'CAMPAIGN',
    summary: 'one campaign and the devices that have not proven the new epoch',
    args: [1, 1],
    async run(call) {
      const params = { id: call.args[0] ?? '' }
      const campaign = await call.client().call('campaign.show', { params })
      const targets = await everyPage((after) => call.client().call('campaign.targets', { params, query: { after, limit: 1000 } }))
      const open = targets.filter(({ stage }) => !['active', 'retired', 'already-current', 'left'].includes(stage))
      const { waveCounts, counts, ...rest } = campaign
      call.out.result({ ...campaign, open }, () =>
        [
          facts({ ...rest, createdAt: when(campaign.createdAt), finishedAt: when(campaign.finishedAt), stages: stagesOf(counts) }),
          table([['WAVE', 'STAGES'], ...waveCounts.map((of, wave) => [String(wave + 1), stagesOf(of)])]),
          open.length === 0
            ? 'every device has proven the new epoch'
            : table([
                ['NOT PROVEN', 'WAVE', 'STAGE', 'SINCE', 'WHY'],
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
  act('pause', 'pause: nothing more is sent until it is resumed'),
  act('resume', 'resume a paused or halted campaign'),
  act('abort', 'abort: what is installed stays readable, nothing more is sent'),
]
