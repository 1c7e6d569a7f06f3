import { duration, exit, number, required, text, UsageError, writeResult, type Command } from '../command.ts'
import { table, when } from '../output.ts'
import { deviceId } from './group.ts'
import { everyPage } from './paging.ts'

export const tokenCommands: readonly Command[] = [
  {
    name: 'token create',
    usage: '--batch BATCH [--device DEVICE | --count N] --expires DURATION [--out FILE]',
    summary: 'make single-use enrolment tokens for boards without a hardware key; each is shown this once (--out: one a line, for its owner only)',
    args: [0, 0],
    options: { batch: { type: 'string' }, device: { type: 'string' }, count: { type: 'string' }, expires: { type: 'string' }, out: { type: 'string' } },
    async run(call) {
      const [device, count] = [text(call, 'device'), number(call, 'count', 1, 10_000)]
      if (device !== undefined && count !== undefined) throw new UsageError('--device or --count, not both')
      const body = {
        batch: required(text(call, 'batch'), '--batch BATCH'),
        validFor: required(duration(call, 'expires'), '--expires DURATION, such as 7d'),
        ...(device === undefined ? {} : { device: deviceId(device) }),
        ...(count === undefined ? {} : { count }),
      }
      const { tokens } = await call.client().call('token.create', { body })
      const out = text(call, 'out')
      if (out === undefined) {
        call.out.result(tokens, () => table([['TOKEN', 'ID', 'UNTIL'], ...tokens.map(({ id, token, expiresAt }) => [token, id, when(expiresAt)])]))
        return exit.ok
      }
      writeResult(out, tokens.map(({ token }) => `${token}\n`).join(''), 0o600)
      call.out.result({ out, tokens: tokens.map(({ id, expiresAt }) => ({ id, expiresAt })) }, () => `${tokens.length} tokens written to ${out}`)
      return exit.ok
    },
  },
  {
    name: 'token list',
    usage: '[--batch BATCH]',
    summary: 'enrolment tokens: for whom, until when, who used them; never the tokens themselves',
    args: [0, 0],
    options: { batch: { type: 'string' } },
    async run(call) {
      const items = await everyPage((after) => call.client().call('token.list', { query: { after, batch: text(call, 'batch'), limit: 1000 } }))
      call.out.result(items, () =>
        table([
          ['ID', 'BATCH', 'FOR', 'STATE', 'UNTIL', 'USED BY', 'CREATED BY'],
          ...items.map((row) => [row.id, row.batch, row.device ?? 'any', row.state, when(row.expiresAt), row.spentBy ?? '-', row.createdBy]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'token revoke',
    usage: 'ID',
    summary: 'take back a token that nobody has used',
    args: [1, 1],
    async run(call) {
      const [id = ''] = call.args
      if (!/^[0-9a-f]{32}$/.test(id)) throw new UsageError(`'${id}' is no token id: 32 hexadecimal digits, as token list shows them`)
      await call.client().call('token.revoke', { params: { id } })
      call.out.result({ id }, () => `token ${id} revoked`)
      return exit.ok
    },
  },
]
