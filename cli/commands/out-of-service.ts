import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { exit, required, text, type Command, type Invocation } from '../command.ts'
import { table, when } from '../output.ts'
import { aroundOrder, batchRadiusText, dryRunOption, limitOption, stationRadiusText, wholeRadius } from './blast-radius.ts'
import { reasonOf, reasonOptions } from './reason.ts'

type Signed = ResponseOf<'station.signed'>

const suspension = (call: Invocation): { reason: string } => ({ reason: required(text(call, 'reason'), '--reason TEXT') })
const isDry = (call: Invocation): boolean => call.options['dry-run'] === true

const signedText = ({ batches, releases }: Signed): string =>
  table([
    ['IT SIGNED', 'NAME', 'DEVICES', 'IMPORTED', 'STANDING'],
    ...batches.map((batch) => ['batch', batch.id, String(batch.rows), when(batch.importedAt), batch.standing ?? '-']),
    ...releases.map((release) => ['release', release, '-', '-', '-']),
  ])

/** Against a station; `act` is called unless it is a dry run. */
const stationOrder = async (
  call: Invocation,
  of: { readonly verb: 'revoked' | 'suspended'; readonly act: (id: string) => Promise<Signed & { already: boolean }> },
): Promise<number> => {
  const [id = ''] = call.args
  const { client } = call
  return await aroundOrder<ResponseOf<'station.blast-radius'>, Signed & { already?: boolean }>(call, {
    radius: async () => await client().call('station.blast-radius', { params: { id }, query: {} }),
    text: stationRadiusText,
    preview: async () => await client().call('station.signed', { params: { id } }),
    order: async () => await of.act(id),
    said: (signed, dry) =>
      `station ${id} ${dry ? `would be ${of.verb}: nothing it signs is imported any more` : signed.already === true ? `was ${of.verb} before` : of.verb}; what it signed before stays\n\n${signedText(signed)}`,
  })
}

type BatchOutcome = ResponseOf<'batch.revoke'>

const batchText = (id: string, verb: string, done: BatchOutcome, dry: boolean): string => {
  if (done.already) return dry ? `batch ${id}: nothing is left to do` : `batch ${id} was ${verb} before`
  return `${done.devices} devices of batch ${id} ${dry ? 'would be ' : ''}${verb}; keys rotated: ${done.keys.join(', ') || 'none'}`
}

/** Against a batch; `act` is called unless it is a dry run. */
const batchOrder = async (
  call: Invocation,
  of: { readonly order: 'revoke' | 'suspend'; readonly verb: string; readonly act: (id: string) => Promise<BatchOutcome> },
): Promise<number> => {
  const [id = ''] = call.args
  const { client } = call
  return await aroundOrder<ResponseOf<'batch.blast-radius'>, BatchOutcome>(call, {
    radius: async () => await client().call('batch.blast-radius', { params: { id }, query: {} }),
    text: batchRadiusText,
    preview: async () => await client().call('batch.preview', { params: { id, order: of.order } }),
    order: async () => await of.act(id),
    said: (done, dry) => batchText(id, of.verb, done, dry),
  })
}

/** Stations and batches taken out of service, and back. */
export const outOfServiceCommands: readonly Command[] = [
  {
    name: 'station revoke',
    usage: 'NAME --reason TEXT [--code CODE] | --dry-run',
    summary:
      'for good: nothing it signed is imported any more, its key never returns; shows what it signed and what those devices could read, --dry-run only that',
    args: [1, 1],
    options: { ...reasonOptions, ...dryRunOption },
    async run(call) {
      const body = isDry(call) ? { reason: '-' } : reasonOf(call)
      return await stationOrder(call, { verb: 'revoked', act: async (id) => await call.client().call('station.revoke', { params: { id }, body }) })
    },
  },
  {
    name: 'station suspend',
    usage: 'NAME --reason TEXT | --dry-run',
    summary: 'import nothing more that it signed until it is reinstated; shows what it signed and what those devices could read, --dry-run only that',
    args: [1, 1],
    options: { reason: { type: 'string' }, ...dryRunOption },
    async run(call) {
      const body = isDry(call) ? { reason: '-' } : suspension(call)
      return await stationOrder(call, { verb: 'suspended', act: async (id) => await call.client().call('station.suspend', { params: { id }, body }) })
    },
  },
  {
    name: 'station reinstate',
    usage: 'NAME',
    summary: 'import again what a suspended station signs',
    args: [1, 1],
    async run(call) {
      const [id = ''] = call.args
      const done = await call.client().call('station.reinstate', { params: { id } })
      call.out.result(done, () => `station ${id} ${done.already ? 'was not suspended' : 'reinstated'}`)
      return exit.ok
    },
  },
  {
    name: 'station blast-radius',
    usage: 'NAME [--limit N]',
    summary: 'keys, epochs and topics that the devices it signed for could read, from when to when',
    args: [1, 1],
    options: limitOption,
    async run(call) {
      const [id = ''] = call.args
      return await wholeRadius(call, async (query) => await call.client().call('station.blast-radius', { params: { id }, query }), stationRadiusText)
    },
  },
  {
    name: 'batch revoke',
    usage: 'BATCH --reason TEXT [--code CODE] | --dry-run',
    summary: 'revoke every device of a batch for good; shows what they could read before and after, --dry-run how many, which keys are rotated, and that',
    args: [1, 1],
    options: { ...reasonOptions, ...dryRunOption },
    async run(call) {
      const body = isDry(call) ? { reason: '-' } : reasonOf(call)
      return await batchOrder(call, {
        order: 'revoke',
        verb: 'revoked',
        act: async (id) => await call.client().call('batch.revoke', { params: { id }, body }),
      })
    },
  },
  {
    name: 'batch suspend',
    usage: 'BATCH --reason TEXT | --dry-run',
    summary: 'suspend every device of a batch; shows what they could read before and after, --dry-run how many, which keys are rotated, and that',
    args: [1, 1],
    options: { reason: { type: 'string' }, ...dryRunOption },
    async run(call) {
      const body = isDry(call) ? { reason: '-' } : suspension(call)
      return await batchOrder(call, {
        order: 'suspend',
        verb: 'suspended',
        act: async (id) => await call.client().call('batch.suspend', { params: { id }, body }),
      })
    },
  },
  {
    name: 'batch reinstate',
    usage: 'BATCH | --dry-run',
    summary: 'reinstate the devices that were suspended with their batch; --dry-run says how many',
    args: [1, 1],
    options: dryRunOption,
    async run(call) {
      const [id = ''] = call.args
      const done = isDry(call)
        ? await call.client().call('batch.preview', { params: { id, order: 'reinstate' } })
        : await call.client().call('batch.reinstate', { params: { id } })
      call.out.result(done, () => batchText(id, 'reinstated', done, isDry(call)))
      return exit.ok
    },
  },
  {
    name: 'batch blast-radius',
    usage: 'BATCH [--limit N]',
    summary: 'keys, epochs and topics that its devices could read, from when to when',
    args: [1, 1],
    options: limitOption,
    async run(call) {
      const [id = ''] = call.args
      return await wholeRadius(call, async (query) => await call.client().call('batch.blast-radius', { params: { id }, query }), batchRadiusText)
    },
  },
]
