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

const verdict = (campaign: Campaign): number => {
  if (campaign.state !== 'done') return exit.partial
  return (campaign.counts['failed'] ?? 0) + (campaign.counts['timed-out'] ?? 0) > 0 ? exit.partial : exit.ok
}

/** Follows a campaign to its end. `--json`: a line for every change. Exit 0 only if every device has proven the new epoch. */
export const watchCampaign = async (call: Invocation, id: string, until?: number): Promise<number> => {
  let last = ''
  for (;;) {
    const campaign = await call.client().call('campaign.show', { params: { id } })
    const line = bar(campaign)
    if (line !== last) {
      if (call.out.json || !process.stderr.isTTY) call.out.line(campaign, line)
      else call.out.progress(line)
    }
    last = line
    if (ended.includes(campaign.state)) {
      call.out.done()
      if (!call.out.json)
        call.out.line(campaign, `campaign ${id}: ${campaign.state}${campaign.because === '' ? '' : `, ${campaign.because}`}: ${stagesOf(campaign.counts)}`)
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
    usage: 'CAMPAIGN [--for 10m]',
    summary: 'follow a campaign to its end; exit 0 only if every device has proven the new epoch, else 4',
    args: [1, 1],
    options: { for: { type: 'string' } },
    async run(call) {
      const patience = duration(call, 'for')
      return await watchCampaign(call, call.args[0] ?? '', patience === undefined ? undefined : Date.now() + patience)
    },
  },
  act('pause', 'pause: nothing more is sent until it is resumed'),
  act('resume', 'resume a paused or halted campaign'),
  act('abort', 'abort: what is installed stays readable, nothing more is sent'),
]
