import { Problem } from '@fleetkey/protocol/problem.ts'
import { TpmFormatError } from '@fleetkey/tpm2/bytes.ts'

/** Reason of the typed refusal that this throws; `accepted` when it throws nothing. Anything else that is thrown is no refusal, and goes on. */
export const reasonOf = (run: () => unknown): string => {
  try {
    run()
    return 'accepted'
  } catch (error) {
    if (error instanceof TpmFormatError || error instanceof Problem) return error.reason ?? 'no reason'
    throw error
  }
}
