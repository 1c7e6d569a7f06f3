import { createHash } from 'node:crypto'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { z } from 'zod'
import type { Caller } from '../access/caller.ts'
import { earlier, windowText } from './claim-window.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import { inChunks } from './rows.ts'
import { admitDevices, stationSigned, type Signed } from './station.ts'

/** 100,000 rows of a manifest are about 12 MB. */
const maxBytes = 16 << 20
const maxRows = 100_000
const name = z.string().regex(/^[a-z0-9][a-z0-9-]{0,63}$/)
const sha256 = z.string().regex(/^[0-9a-f]{64}$/)
/** `ek`, `idevid`: what the hardware is known by; a row with neither is of a board that only a token lets in. Printable ASCII without comma and quotes: the same serial in CSV, JSON and a certificate. */
const Row = z.strictObject({
  serial: z.string().regex(/^(?!.*[,"'])[\x21-\x7e]{1,64}$/),
  ek: sha256.optional(),
  idevid: sha256.optional(),
  device: DeviceId.optional(),
  model: name.optional(),
})
const Header = z.strictObject({
  format: z.literal('fleetkey/batch/1'),
  batch: name,
  model: name,
  station: name,
  claimUntil: z.iso.datetime().optional(),
  rows: z.array(z.unknown()).min(1).max(maxRows),
})

export interface BatchInput extends Signed {
  readonly format: 'json' | 'csv'
  /** Name of the batch: needed with CSV, which carries none; with JSON it must agree. */
  readonly batch?: string | undefined
  /** Milliseconds since 1970. Of this and what a JSON manifest says itself the earlier counts. */
  readonly claimUntil?: number | undefined
}

interface ManifestRow {
  readonly serial: string
  /** Key of the manifest (fleet/device.ts). */
  readonly hardware: string
  readonly device: DeviceId
  readonly model: string
}

interface Manifest {
  readonly batch: string
  readonly claimUntil: number | null
  readonly rows: readonly ManifestRow[]
}

const refuseRow = (at: number, why: string): never => {
  throw new Problem('malformed', `row ${at + 1}: ${why}`, { reason: 'batch.row' })
}

/** One row, numbered from 1 without the header. The device id is the column `device`, else the lower-cased serial. */
const parseRow = (value: unknown, at: number, model: string | undefined): ManifestRow => {
  const row = Row.safeParse(value)
  if (!row.success) return refuseRow(at, `${row.error.issues[0]?.path.join('.') ?? ''} ${row.error.issues[0]?.message ?? 'malformed'}`.trim())
  const device = DeviceId.safeParse(row.data.device ?? row.data.serial.toLowerCase())
  if (!device.success) return refuseRow(at, `serial ${row.data.serial} makes no device id: give one in the column device`)
  const { serial, ek, idevid, model: own } = row.data
  const of = own ?? model
  if (of === undefined) return refuseRow(at, 'no model')
  // Two ways in would make the board as strong as the weaker of them.
  if (ek !== undefined && idevid !== undefined) return refuseRow(at, 'ek and idevid: a board is known by one of them')
  return { serial, hardware: ek ?? (idevid === undefined ? `serial/${serial}` : `idevid/${idevid}`), device: device.data, model: of }
}

const text = (bytes: Uint8Array): string => {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes)
  } catch (cause) {
    throw new Problem('malformed', 'the manifest is not UTF-8', { cause })
  }
}

const parseJson = (content: string, input: BatchInput): Manifest => {
  let value: unknown
  try {
    value = JSON.parse(content)
  } catch (cause) {
    throw new Problem('malformed', 'the manifest is not JSON', { cause })
  }
  const header = Header.safeParse(value)
  if (!header.success) throw new Problem('malformed', `manifest ${header.error.issues[0]?.path.join('.') ?? ''}: ${header.error.issues[0]?.message ?? ''}`)
  const { batch, model, station, claimUntil, rows } = header.data
  if (station !== input.station) throw new Problem('malformed', `the manifest names station ${station}, not ${input.station}`)
  if (input.batch !== undefined && input.batch !== batch) throw new Problem('malformed', `the manifest is batch ${batch}, not ${input.batch}`)
  return { batch, claimUntil: claimUntil === undefined ? null : Date.parse(claimUntil), rows: rows.map((row, at) => parseRow(row, at, model)) }
}

/** The header decides how many fields there are; the fifth is for boards that are known by an IDevID. */
const headers: readonly string[] = ['serial,ek,model,device', 'serial,ek,model,device,idevid']

/** CSV with exactly one of our headers, no quoting (no field can hold a comma), LF or CRLF. An empty `ek`, `device` or `idevid` is none. */
const parseCsv = (content: string, input: BatchInput): Manifest => {
  const batch = name.safeParse(input.batch)
  if (!batch.success) throw new Problem('malformed', 'a CSV manifest needs the name of its batch')
  const lines = content.split('\n').map((line) => (line.endsWith('\r') ? line.slice(0, -1) : line))
  if (lines.at(-1) === '') lines.pop()
  const header = lines[0] ?? ''
  if (!headers.includes(header)) throw new Problem('malformed', `the first line must be ${headers.join(' or ')}`)
  const columns = header.split(',').length
  if (lines.length < 2 || lines.length > maxRows + 1) throw new Problem('malformed', `between 1 and ${maxRows} rows, not ${lines.length - 1}`)
  const rows = lines.slice(1).map((line, at) => {
    const fields = line.split(',')
    if (fields.length !== columns) return refuseRow(at, `${columns} fields expected, ${fields.length} found`)
    const [serial, ek, model, device, idevid = ''] = fields
    const given = Object.fromEntries(Object.entries({ ek, device, idevid }).filter(([, value]) => value !== ''))
    return parseRow({ serial, model, ...given }, at, undefined)
  })
  return { batch: batch.data, claimUntil: null, rows }
}

/** `ek ab12…`, `idevid ab12…`: as the manifest's author wrote it. */
const nameOf = (hardware: string): string => (hardware.includes('/') ? hardware.replace('/', ' ') : `ek ${hardware}`)

const refuseDoubles = (rows: readonly ManifestRow[]): void => {
  for (const field of ['serial', 'hardware', 'device'] as const) {
    const seen = new Map<string, number>()
    for (const [at, row] of rows.entries()) {
      const earlier = seen.get(row[field])
      if (earlier !== undefined) refuseRow(at, `${field === 'hardware' ? nameOf(row.hardware) : `${field} ${row[field]}`} already stands in row ${earlier + 1}`)
      seen.set(row[field], at)
    }
  }
}

const refuseKnown = async (ctx: Context, rows: readonly ManifestRow[]): Promise<void> => {
  const conflict = (at: number, why: string): never => {
    throw new Problem('conflict', `row ${at + 1}: ${why}`, { reason: 'batch.row-known' })
  }
  await inChunks(rows, 200, async (row, at) => {
    const [hardware, device, serial] = await Promise.all([
      ctx.store.get('manifest', row.hardware),
      ctx.store.get('device', row.device),
      ctx.store.find('device', { where: { serial: row.serial }, limit: 1 }),
    ])
    if (hardware !== undefined) conflict(at, `${nameOf(row.hardware)} belongs to device ${hardware.device} of batch ${hardware.batch}`)
    if (serial[0] !== undefined) conflict(at, `serial ${row.serial} belongs to device ${serial[0].id} of batch ${serial[0].batch}`)
    if (device !== undefined) conflict(at, `device ${row.device} exists in batch ${device.batch}`)
  })
}

/**
 * Imports a factory's batch manifest: one commit for all rows or none. The signature (detached, by a registered station) is
 * checked over the exact bytes before anything is parsed. Every refusal of a row names its number, counted from 1.
 */
export const importBatch = async (ctx: Context, caller: Caller, input: BatchInput): Promise<{ batch: string; rows: number }> => {
  const manifestHash = createHash('sha256').update(input.content).digest('hex')
  const subject = (input.batch ?? manifestHash.slice(0, 16)).slice(0, 64)
  const imported = await perform(ctx, { caller, action: 'batch.import', subject }, async (tx) => {
    if (input.content.length > maxBytes) throw new Problem('malformed', `a manifest of more than ${maxBytes} bytes`)
    const station = await stationSigned(ctx, input)
    const { batch, claimUntil: signedUntil, rows } = input.format === 'json' ? parseJson(text(input.content), input) : parseCsv(text(input.content), input)
    refuseDoubles(rows)
    if ((await ctx.store.get('batch', batch)) !== undefined) throw new Problem('conflict', `batch ${batch} was imported before`)
    await refuseKnown(ctx, rows)
    admitDevices(tx, station, rows.length)
    const at = ctx.now()
    const importedBy = `${caller.kind}:${caller.id}`
    const claimUntil = earlier(signedUntil, input.claimUntil ?? null)
    tx.insert('batch', { id: batch, station: input.station, rows: rows.length, manifestHash, importedAt: at, importedBy, claimUntil })
    for (const { serial, hardware, device, model } of rows) {
      tx.insert('manifest', { id: hardware, device, serial, model, batch, importedAt: at })
      tx.insert('device', { id: device, state: 'registered', serial, model, batch, registeredAt: at, lastRefusal: null })
    }
    tx.note(`batch ${batch}, ${rows.length} rows, sha256 ${manifestHash}, signed by station ${input.station}, ${windowText(claimUntil)}`)
    return { batch, rows: rows.length }
  })
  // A crash before the commit: nothing of the batch exists. After it: all of it does; importing again says so.
  ctx.step('import.batch')
  return imported
}
