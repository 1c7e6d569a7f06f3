import { hashName } from '@fleetkey/tpm2/kdf.ts'
import type { PcrBank } from '@fleetkey/tpm2/structures.ts'
import { fail } from './reasons.ts'

const maxLines = 64

/**
 * PCR values as lines `index hex`, `tpm2_pcrread`'s own `index: 0xHEX` and its heading included: exactly the PCRs of the selection, each once, each as long as
 * the bank's hash.
 */
export const readPcrValues = (text: string, bank: PcrBank): ReadonlyMap<number, Uint8Array> => {
  const lines = text.split(/\r?\n/).filter((line) => line.trim() !== '' && !/^\s*sha(1|256|384|512)\s*:\s*$/.test(line))
  if (lines.length > maxLines) fail('quote.values.count', `${lines.length} lines`)
  const values = new Map<number, Uint8Array>()
  for (const line of lines) {
    const [, index, value] = /^\s*(\d{1,2})\s*[:\s]\s*(?:0[xX])?([0-9a-fA-F]+)\s*$/.exec(line) ?? []
    if (index === undefined || value === undefined || value.length !== hashName(bank.hash).size * 2) return fail('quote.values.malformed', line.slice(0, 80))
    const pcr = Number(index)
    if (values.has(pcr) || !bank.pcrs.includes(pcr)) fail('quote.values.index', `PCR ${pcr}`)
    values.set(pcr, new Uint8Array(Buffer.from(value, 'hex')))
  }
  if (values.size !== bank.pcrs.length) fail('quote.values.count', `${values.size} values for ${bank.pcrs.length} PCRs`)
  return values
}
