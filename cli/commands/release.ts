import { exit, required, text, UsageError, type Command } from '../command.ts'
import { impactText } from './impact.ts'

const partsOf = (id: string): { model: string; name: string } => {
  const [model = '', name = '', ...more] = id.split('/')
  if (model === '' || name === '' || more.length > 0) throw new UsageError(`'${id}' is no release: MODEL/NAME, as release list shows it`)
  return { model, name }
}

export const releaseCommands: readonly Command[] = [
  {
    name: 'release withdraw',
    usage: 'MODEL/NAME --reason TEXT | --dry-run',
    summary: 'withdraw a release: devices that run it get no keys any more; --dry-run says which and changes nothing',
    args: [1, 1],
    options: { reason: { type: 'string' }, 'dry-run': { type: 'boolean', default: false } },
    async run(call) {
      const id = call.args[0] ?? ''
      const params = partsOf(id)
      if (call.options['dry-run'] === true) {
        const impact = await call.client().call('release.preview', { params })
        call.out.result(impact, () => impactText(impact, 'would be quarantined'))
        return exit.ok
      }
      const reason = required(text(call, 'reason'), '--reason TEXT')
      const impact = await call.client().call('release.withdraw', { params, body: { reason } })
      call.out.result(impact, () => `release ${id} withdrawn; ${impactText(impact, 'quarantined')}`)
      return exit.ok
    },
  },
]
