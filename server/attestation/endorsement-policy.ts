import type { EndorsementPolicyView } from '@fleetkey/protocol/admin.ts'
import type { z } from 'zod'

/**
 * The operator's word on endorsements: what is refused though a CA vouches for it, lowest TPM firmware per manufacturer, TPM firmware updates that were ordered,
 * and the only manufacturers allowed (null: all of the TCG registry). Manufacturers are written as in EK certificates: `id:` and four bytes in hex.
 */
export type EndorsementPolicy = z.output<typeof EndorsementPolicyView>

export const noEndorsementPolicy: EndorsementPolicy = { deny: [], floors: [], updates: [], manufacturers: null }
