import { date, exit, readInput, required, text, UsageError, type Command } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { everyPage } from './paging.ts'
import { reasonOf, reasonOptions } from './reason.ts'

/** The text of a PEM file with this label; another kind of file is told apart here, before it is sent anywhere. */
const pem = (path: string, label: string): string => {
  const content = readInput(path).toString('utf8')
  if (!content.includes(`-----BEGIN ${label}-----`)) throw new UsageError(`${path}: no PEM file with a ${label}`)
  return content
}

/** A signed file and its detached signature (`FILE.sig`, base64) as the API takes them. */
const signedFile = (path: string, signature: string | undefined, station: string | undefined): { content: string; signature: string; station: string } => ({
  content: readInput(path).toString('base64'),
  signature: readInput(signature ?? `${path}.sig`)
    .toString('utf8')
    .trim(),
  station: required(station, '--station NAME (whose key signed the file)'),
})

const signedOptions = { signature: { type: 'string' }, station: { type: 'string' } } as const

export const factoryCommands: readonly Command[] = [
  {
    name: 'station add',
    usage: 'NAME PUBLIC-KEY.pem',
    summary: 'admit the public key of a factory station',
    args: [2, 2],
    async run(call) {
      const [id = '', path = ''] = call.args
      await call.client().call('station.add', { body: { id, publicKey: pem(path, 'PUBLIC KEY') } })
      call.out.result({ id }, () => `station ${id} added`)
      return exit.ok
    },
  },
  {
    name: 'station list',
    usage: '',
    summary: 'factory stations',
    args: [0, 0],
    async run(call) {
      const { items } = await call.client().call('station.list')
      call.out.result(items, () =>
        table([
          ['STATION', 'ADDED', 'SUSPENDED', 'REVOKED'],
          ...items.map(({ id, addedAt, ...barred }) => [
            id,
            when(addedAt),
            ...[barred.suspended, barred.revoked].map((one) => (one === null ? '-' : `${when(one.at)}: ${one.reason}`)),
          ]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'station remove',
    usage: 'NAME',
    summary: 'remove a station: its signatures count no more',
    args: [1, 1],
    async run(call) {
      const [id = ''] = call.args
      await call.client().call('station.remove', { params: { id } })
      call.out.result({ id }, () => `station ${id} removed`)
      return exit.ok
    },
  },
  {
    name: 'station revoke',
    usage: 'NAME --reason TEXT [--code CODE] | --dry-run',
    summary: 'for good: nothing it signed is imported any more, its key never returns; shows what it signed, --dry-run only that',
    args: [1, 1],
    options: { ...reasonOptions, 'dry-run': { type: 'boolean', default: false } },
    async run(call) {
      const [id = ''] = call.args
      const isDry = call.options['dry-run'] === true
      const signed = isDry
        ? await call.client().call('station.signed', { params: { id } })
        : await call.client().call('station.revoke', { params: { id }, body: reasonOf(call) })
      call.out.result(signed, () =>
        [
          ...(isDry ? [] : [`station ${id} ${'already' in signed && signed.already ? 'was revoked before' : 'revoked'}`]),
          table([
            ['IT SIGNED', 'NAME', 'DEVICES', 'IMPORTED', 'STANDING'],
            ...signed.batches.map((batch) => ['batch', batch.id, String(batch.rows), when(batch.importedAt), batch.standing ?? '-']),
            ...signed.releases.map((release) => ['release', release, '-', '-', '-']),
          ]),
        ].join('\n\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'station suspend',
    usage: 'NAME --reason TEXT',
    summary: 'import nothing more that it signed until it is reinstated; shows what it signed before',
    args: [1, 1],
    options: { reason: { type: 'string' } },
    async run(call) {
      const [id = ''] = call.args
      const signed = await call.client().call('station.suspend', { params: { id }, body: { reason: required(text(call, 'reason'), '--reason TEXT') } })
      call.out.result(signed, () => {
        const names = [...signed.batches.map((batch) => `batch ${batch.id}`), ...signed.releases.map((release) => `release ${release}`)]
        return `station ${id} ${signed.already ? 'was suspended before' : 'suspended'}; it signed ${names.join(', ') || 'nothing'}`
      })
      return exit.ok
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
  ...(['revoke', 'suspend', 'reinstate'] as const).map((order): Command => ({
    name: `batch ${order}`,
    usage: `BATCH ${{ revoke: '--reason TEXT [--code CODE] |', suspend: '--reason TEXT |', reinstate: '|' }[order]} --dry-run`,
    summary: {
      revoke: 'revoke every device of a batch for good; --dry-run says how many, and which keys are rotated',
      suspend: 'suspend every device of a batch; --dry-run says how many, and which keys are rotated',
      reinstate: 'reinstate the devices that were suspended with their batch',
    }[order],
    args: [1, 1],
    options: {
      ...(order === 'revoke' ? reasonOptions : order === 'suspend' ? { reason: { type: 'string' } } : {}),
      'dry-run': { type: 'boolean', default: false },
    },
    async run(call) {
      const [id = ''] = call.args
      const isDry = call.options['dry-run'] === true
      const client = call.client()
      const done = isDry
        ? await client.call('batch.preview', { params: { id, order } })
        : order === 'revoke'
          ? await client.call('batch.revoke', { params: { id }, body: reasonOf(call) })
          : order === 'suspend'
            ? await client.call('batch.suspend', { params: { id }, body: { reason: required(text(call, 'reason'), '--reason TEXT') } })
            : await client.call('batch.reinstate', { params: { id } })
      const verb = { revoke: 'revoked', suspend: 'suspended', reinstate: 'reinstated' }[order]
      call.out.result(done, () =>
        done.already && !isDry
          ? `batch ${id} was ${verb} before`
          : `${done.devices} devices of batch ${id} ${isDry ? 'would be ' : ''}${verb}; keys rotated: ${done.keys.join(', ') || 'none'}`,
      )
      return exit.ok
    },
  })),
  {
    name: 'batch import',
    usage: 'FILE.json|FILE.csv --station NAME [--batch NAME] [--claim-until DATE] [--signature FILE]',
    summary: 'import a signed batch manifest, all rows or none',
    args: [1, 1],
    options: { ...signedOptions, batch: { type: 'string' }, 'claim-until': { type: 'string' } },
    async run(call) {
      const [path = ''] = call.args
      const [batch, claimUntil] = [text(call, 'batch'), date(call, 'claim-until')]
      const body = {
        ...signedFile(path, text(call, 'signature'), text(call, 'station')),
        format: path.endsWith('.csv') ? ('csv' as const) : ('json' as const),
        ...(batch === undefined ? {} : { batch }),
        ...(claimUntil === undefined ? {} : { claimUntil }),
      }
      const imported = await call.client().call('batch.import', { body })
      call.out.result(imported, () => `batch ${imported.batch}: ${imported.rows} devices registered`)
      return exit.ok
    },
  },
  {
    name: 'batch list',
    usage: '',
    summary: 'batches',
    args: [0, 0],
    async run(call) {
      const items = await everyPage((after) => call.client().call('batch.list', { query: { after } }))
      call.out.result(items, () =>
        table([
          ['BATCH', 'STATION', 'DEVICES', 'IMPORTED', 'BY', 'STANDING'],
          ...items.map((row) => [row.id, row.station, String(row.rows), when(row.importedAt), row.importedBy, row.standing?.state ?? '-']),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'batch show',
    usage: 'BATCH',
    summary: 'one batch and how far its devices are',
    args: [1, 1],
    async run(call) {
      const [id = ''] = call.args
      const batch = await call.client().call('batch.show', { params: { id } })
      const { states, ...said } = batch
      call.out.result(batch, () => facts({ ...said, importedAt: when(batch.importedAt), claimUntil: when(batch.claimUntil), ...states }))
      return exit.ok
    },
  },
  {
    name: 'batch window',
    usage: 'BATCH --claim-until DATE|none',
    summary: 'until when devices of a batch may enrol for the first time',
    args: [1, 1],
    options: { 'claim-until': { type: 'string' } },
    async run(call) {
      const [id = ''] = call.args
      const given = required(text(call, 'claim-until'), '--claim-until DATE|none')
      const body = { claimUntil: given === 'none' ? null : (date(call, 'claim-until') ?? null) }
      const { claimUntil } = await call.client().call('batch.window', { params: { id }, body })
      call.out.result({ id, claimUntil }, () =>
        claimUntil === null ? `batch ${id} has no claim window` : `batch ${id} can be claimed until ${when(claimUntil)}`,
      )
      return exit.ok
    },
  },
  {
    name: 'release import',
    usage: 'FILE.json --station NAME [--signature FILE]',
    summary: 'import the signed reference values of a firmware release',
    args: [1, 1],
    options: signedOptions,
    async run(call) {
      const [path = ''] = call.args
      const imported = await call.client().call('release.import', { body: signedFile(path, text(call, 'signature'), text(call, 'station')) })
      call.out.result(imported, () => `release ${imported.id} imported`)
      return exit.ok
    },
  },
  {
    name: 'release list',
    usage: '',
    summary: 'firmware releases',
    args: [0, 0],
    async run(call) {
      const items = await everyPage((after) => call.client().call('release.list', { query: { after } }))
      call.out.result(items, () =>
        table([
          ['RELEASE', 'NUMBER', 'KIND', 'IMPORTED', 'WITHDRAWN'],
          ...items.map((row) => [
            row.id,
            String(row.number),
            row.debug ? 'DEBUG' : 'release',
            when(row.importedAt),
            row.withdrawn === null ? '-' : `${when(row.withdrawn.at)}: ${row.withdrawn.reason}`,
          ]),
        ]),
      )
      return exit.ok
    },
  },
]
