import { exit, type Command } from '../command.ts'
import { table, when } from '../output.ts'

export const alertCommands: readonly Command[] = [
  {
    name: 'alert list',
    usage: '',
    summary: 'alerts that were raised, whether the webhook has taken them, and how it stands',
    args: [0, 0],
    async run(call) {
      const found = await call.client().call('alert.list')
      const { items, webhook } = found
      call.out.result(found, () =>
        [
          table([['RAISED', 'TYPE', 'STATE', 'WHAT'], ...items.map(({ raisedAt, type, state, text }) => [when(raisedAt), type, state, text])]),
          webhook === null
            ? 'no webhook is configured'
            : `webhook ${webhook.host}: ${webhook.state}, ${webhook.waiting} waiting${webhook.error === null ? '' : `; since ${when(webhook.since)}: ${webhook.error}`}`,
        ].join('\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'alert test',
    usage: '',
    summary: 'send a test message to the webhook now; exit 3 when it is not taken',
    args: [0, 0],
    async run(call) {
      const found = await call.client().call('alert.test')
      call.out.result(found, () => (found.taken ? 'taken' : `not taken: ${found.error ?? 'unknown'}`))
      return found.taken ? exit.ok : exit.refused
    },
  },
]
