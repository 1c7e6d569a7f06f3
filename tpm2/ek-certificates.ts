import { concat, TpmFormatError } from './bytes.ts'
import { TpmError } from './errors.ts'
import type { Tpm } from './tpm.ts'

/** NV indices of EK certificates (TCG EK credential profile for TPM family 2.0, §2.2.1.4 and §2.2.1.5): low and high range. Those that are used, in the order in which the agent prefers them. */
export const ekIndices: readonly { readonly index: number; readonly kind: string; readonly used: boolean }[] = [
  { index: 0x01c0_000a, kind: 'P-256 (L-2)', used: true },
  { index: 0x01c0_0016, kind: 'P-384 (H-3)', used: true },
  { index: 0x01c0_0002, kind: 'RSA-2048 (L-1)', used: true },
  { index: 0x01c0_0012, kind: 'RSA-2048 (H-1)', used: false },
  { index: 0x01c0_0014, kind: 'P-256 (H-2)', used: false },
  { index: 0x01c0_0018, kind: 'P-521 (H-4)', used: false },
  { index: 0x01c0_001a, kind: 'SM2 (H-5)', used: false },
  { index: 0x01c0_001c, kind: 'RSA-3072 (H-6)', used: false },
  { index: 0x01c0_001e, kind: 'RSA-4096 (H-7)', used: false },
]

export interface FoundEk {
  readonly index: number
  readonly kind: string
  /** The agent enrols with this one. */
  readonly used: boolean
  /** Padding cut; null when it cannot be read (see `problem`). */
  readonly der: Uint8Array | null
  readonly problem: string | null
}

/** NV areas are padded by some makers: the certificate ends where its DER says. */
export const derPrefix = (bytes: Uint8Array): Uint8Array => {
  const [tag = 0, first = 0, high = 0, low = 0] = bytes
  if (tag !== 0x30 || first !== 0x82) return bytes
  return concat(bytes.subarray(0, Math.min(bytes.length, 4 + high * 256 + low)))
}

/** The EK certificates in NV. The first of a template that the agent uses is the agent's. */
export const readEkCertificates = async (tpm: Tpm): Promise<readonly FoundEk[]> => {
  const found: FoundEk[] = []
  for (const { index, kind, used } of ekIndices) {
    if ((await tpm.nvSize(index)) === undefined) continue
    const mine = used && !found.some((one) => one.used)
    try {
      const bytes = await tpm.nvRead(index)
      if (bytes !== undefined) found.push({ index, kind, used: mine, der: derPrefix(bytes), problem: null })
    } catch (error) {
      if (!(error instanceof TpmError || error instanceof TpmFormatError)) throw error
      found.push({ index, kind, used: mine, der: null, problem: error.message })
    }
  }
  return found
}
