import { ExportError, readExport } from '@fleetkey/server/audit/export.ts'
import { verifyLog, type LogVerdict } from '@fleetkey/server/audit/verify.ts'

export type { LogVerdict }

/**
 * Judges an audit export without a server: derives chain and tree from the first entry on, compares with the signed checkpoint at its end
 * and with checkpoints kept from earlier. `spki`: DER public key that signs checkpoints. Never throws for what a file holds.
 */
export const verifyExport = (content: string, spki: Uint8Array, keptCheckpoints: readonly string[]): LogVerdict => {
  try {
    const { checkpoint, entries } = readExport(content)
    return verifyLog(entries, { spki, checkpoint, kept: keptCheckpoints })
  } catch (error) {
    if (!(error instanceof ExportError)) throw error
    // Line 1 is the header, so that entry n stands on line n + 1.
    return { ok: false, entries: Math.max(0, error.line - 2), sequence: error.line > 1 ? error.line - 1 : null, what: error.message }
  }
}
