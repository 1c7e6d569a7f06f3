import { writeFileSync } from 'node:fs'
import { date, exit, readInput, required, text, UsageError, type Command } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { everyPage } from './paging.ts'

/** The text of a PEM file with this label; another kind of file is told apart here, before it is sent anywhere. */
const pem = (path: string, label: string): string => {
  const content = readInput(path).toString('utf8')
  if (!content.includes(`-----BEGIN ${label}-----`)) throw new UsageError(`${path}: no PEM file with a ${label}`)
  return content
}

/** The certificate is issued whatever becomes of the file. */
const write = (path: string, content: string, serial: string): void => {
  try {
    writeFileSync(path, content)
  } catch (error) {
    throw new UsageError(`--out: ${error instanceof Error ? error.message : String(error)}; fleetkey ca show ${serial} has the certificate`)
  }
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
          ['STATION', 'ADDED', 'CERTIFICATE', 'DEVICES', 'SUSPENDED', 'REVOKED'],
          ...items.map(({ id, addedAt, certificate, quota, ...barred }) => [
            id,
            when(addedAt),
            certificate === null ? '-' : `${certificate.state} until ${when(certificate.notAfter)}`,
            quota === null ? '-' : `${quota.admitted} of ${quota.devices}`,
            ...[barred.suspended, barred.revoked].map((one) => (one === null ? '-' : `${when(one.at)}: ${one.reason}`)),
          ]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'station show',
    usage: 'NAME',
    summary: 'one factory station: until when its signatures count, and for how many devices more',
    args: [1, 1],
    async run(call) {
      const [id = ''] = call.args
      const found = await call.client().call('station.show', { params: { id } })
      const { certificate, quota } = found
      const barred = (one: { at: number; reason: string } | null): string => (one === null ? '-' : `${when(one.at)}: ${one.reason}`)
      call.out.result(found, () =>
        facts({
          station: found.id,
          'public key': found.spki,
          added: when(found.addedAt),
          certificate: certificate === null ? 'none: what it signs counts without' : `${certificate.serial}, ${certificate.state}`,
          ...(certificate === null ? {} : { 'in force': `${when(certificate.notBefore)} to ${when(certificate.notAfter)}` }),
          devices: quota === null ? 'any number' : `${quota.admitted} of ${quota.devices}`,
          suspended: barred(found.suspended),
          revoked: barred(found.revoked),
        }),
      )
      return exit.ok
    },
  },
  {
    name: 'station certify',
    usage: 'NAME --csr FILE [--devices N] [--out FILE]',
    summary: 'certify the key of a station, or certify it again: what it signs is imported while its newest certificate is in force',
    args: [1, 1],
    options: { csr: { type: 'string' }, devices: { type: 'string' }, out: { type: 'string' } },
    async run(call) {
      const [id = ''] = call.args
      const csr = readInput(required(text(call, 'csr'), '--csr FILE (a request by the key of the station)')).toString('base64')
      const [devices, out] = [text(call, 'devices'), text(call, 'out')]
      if (devices !== undefined && !/^[1-9]\d{0,8}$/.test(devices)) throw new UsageError(`--devices: ${devices} is no number of devices`)
      const body = { csr, ...(devices === undefined ? {} : { devices: Number(devices) }) }
      const made = await call.client().call('station.certify', { params: { id }, body })
      const pem = `${made.pem}${made.chain}`
      if (out !== undefined) write(out, pem, made.serial)
      call.out.result({ id, ...made }, () => {
        const said = `station ${id}: certificate ${made.serial} until ${when(made.notAfter)}, ${devices === undefined ? 'any number of devices' : `${devices} devices`}`
        return out === undefined ? `${said}\n${pem.trimEnd()}` : `${said}, in ${out}`
      })
      return exit.ok
    },
  },
  {
    name: 'station remove',
    usage: 'NAME',
    summary: 'remove a station: its signatures count no more, its certificates are revoked',
    args: [1, 1],
    async run(call) {
      const [id = ''] = call.args
      await call.client().call('station.remove', { params: { id } })
      call.out.result({ id }, () => `station ${id} removed`)
      return exit.ok
    },
  },
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
