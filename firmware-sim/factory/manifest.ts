import { createHash, sign, type KeyObject } from 'node:crypto'

/** One board as the factory knows it. `ek`: the EK's TPMT_PUBLIC. */
export interface BoardRecord {
  readonly serial: string
  readonly ek: Uint8Array
}

const ekHash = (ek: Uint8Array): string => createHash('sha256').update(ek).digest('hex')

/** Batch manifest as JSON text (`fleetkey/batch/1`). */
export const manifestJson = (of: { batch: string; model: string; station: string }, boards: readonly BoardRecord[]): string =>
  `${JSON.stringify({ format: 'fleetkey/batch/1', batch: of.batch, model: of.model, station: of.station, rows: boards.map(({ serial, ek }) => ({ serial, ek: ekHash(ek) })) }, null, 1)}\n`

/** The same as CSV (RFC 4180), columns serial, ek, model, device. */
export const manifestCsv = (of: { model: string }, boards: readonly BoardRecord[]): string =>
  ['serial,ek,model,device', ...boards.map(({ serial, ek }) => `${serial},${ekHash(ek)},${of.model},${serial.toLowerCase()}`), ''].join('\r\n')

/** Detached signature of the exact bytes of a file: ECDSA P-256 with SHA-256, DER, base64 text. */
export const detachedSignature = (content: string, station: KeyObject): string => `${sign('sha256', Buffer.from(content), station).toString('base64')}\n`
