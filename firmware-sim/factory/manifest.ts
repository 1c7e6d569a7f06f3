import { createHash, sign, type KeyObject } from 'node:crypto'

/** One board as the factory knows it. `ek`: the EK's TPMT_PUBLIC; `idevid`: SPKI of the IDevID key; neither: it has no key of its own. */
export interface BoardRecord {
  readonly serial: string
  readonly ek?: Uint8Array
  readonly idevid?: Uint8Array
}

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex')

const rowOf = ({ serial, ek, idevid }: BoardRecord) => ({
  serial,
  ...(ek === undefined ? {} : { ek: sha256(ek) }),
  ...(idevid === undefined ? {} : { idevid: sha256(idevid) }),
})

/** Batch manifest as JSON text (`fleetkey/batch/1`). */
export const manifestJson = (of: { batch: string; model: string; station: string }, boards: readonly BoardRecord[]): string =>
  `${JSON.stringify({ format: 'fleetkey/batch/1', batch: of.batch, model: of.model, station: of.station, rows: boards.map(rowOf) }, null, 1)}\n`

/** The same as CSV (RFC 4180), columns serial, ek, model, device; and idevid where not every board has a TPM. */
export const manifestCsv = (of: { model: string }, boards: readonly BoardRecord[]): string => {
  const rows = boards.map(rowOf)
  const all = rows.every(({ ek }) => ek !== undefined)
  const lines = rows.map(({ serial, ek = '', idevid = '' }) => `${serial},${ek},${of.model},${serial.toLowerCase()}${all ? '' : `,${idevid}`}`)
  return [`serial,ek,model,device${all ? '' : ',idevid'}`, ...lines, ''].join('\r\n')
}

/** Detached signature of the exact bytes of a file: ECDSA P-256 with SHA-256, DER, base64 text. */
export const detachedSignature = (content: string, station: KeyObject): string => `${sign('sha256', Buffer.from(content), station).toString('base64')}\n`
