import { OperatorRole } from '@fleetkey/protocol/admin.ts'
import { exit, required, text, UsageError, type Command } from '../command.ts'
import { table, when } from '../output.ts'

const rolesOf = (given: string): (typeof OperatorRole.options)[number][] =>
  given.split(',').map((role) => {
    const read = OperatorRole.safeParse(role)
    if (!read.success) throw new UsageError(`--role takes ${OperatorRole.options.join(', ')}, not ${role}`)
    return read.data
  })

export const operatorCommands: readonly Command[] = [
  {
    name: 'operator add',
    usage: 'NAME --role ROLE[,ROLE]',
    summary: 'another operator (owner, operator, factory, auditor); prints the token this once',
    args: [1, 1],
    options: { role: { type: 'string' } },
    async run(call) {
      const roles = rolesOf(required(text(call, 'role'), '--role'))
      const added = await call.client().call('operator.add', { body: { id: call.args[0] ?? '', roles } })
      call.out.result(added, () => added.token)
      return exit.ok
    },
  },
  {
    name: 'operator list',
    usage: '',
    summary: 'operators and their roles; never their tokens',
    args: [0, 0],
    async run(call) {
      const { items } = await call.client().call('operator.list')
      call.out.result(items, () => table([['OPERATOR', 'ROLES', 'SINCE'], ...items.map((one) => [one.id, one.roles.join(', '), when(one.createdAt)])]))
      return exit.ok
    },
  },
  {
    name: 'operator remove',
    usage: 'NAME',
    summary: 'take the token of an operator back, at once; what they asked for or approved, and nobody used yet, is void',
    args: [1, 1],
    async run(call) {
      const [id = ''] = call.args
      const done = await call.client().call('operator.remove', { params: { id } })
      call.out.result(done, () => `operator ${id} removed`)
      return exit.ok
    },
  },
]
