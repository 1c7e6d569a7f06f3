import { Problem } from '@fleetkey/protocol/problem.ts'
import { TpmFormatError } from '@fleetkey/tpm2/bytes.ts'
import { endorsementReasons } from './reasons/endorsement.ts'
import { idevidReasons } from './reasons/idevid.ts'
import { keyReasons } from './reasons/keys.ts'
import { logReasons } from './reasons/log.ts'
import { protocolReasons } from './reasons/protocol.ts'
import { quoteReasons } from './reasons/quote.ts'
import { tokenReasons } from './reasons/token.ts'
import type { Reason } from './reasons/reason.ts'

/** The one table of reasons for which evidence is refused. docs/attestation.md is written from it. */
export const reasons = { ...endorsementReasons, ...idevidReasons, ...tokenReasons, ...keyReasons, ...quoteReasons, ...logReasons, ...protocolReasons }

/** A stable reason code. `reference.pcr-4` is a `reference.pcr-N`. */
export type ReasonCode = Exclude<keyof typeof reasons, 'reference.pcr-N'> | `reference.pcr-${number}`

/** The row of a code, also of one that came as text (from an audit entry); undefined for none of ours. */
export const reasonOf = (code: string): Reason | undefined => {
  const row = code.replace(/^reference\.pcr-\d+$/, 'reference.pcr-N')
  return Object.hasOwn(reasons, row) ? (reasons as Readonly<Record<string, Reason>>)[row] : undefined
}

/** Refuses: the public code is always the same, the reason and its detail reach only the audit entry and `device show`. */
export const fail = (reason: ReasonCode, detail?: string): never => {
  throw new Problem('attestation-failed', detail ?? reasonOf(reason)?.meaning ?? reason, { reason })
}

const isReason = (code: string): code is ReasonCode => reasonOf(code) !== undefined

/** Runs a parser of tpm2: what it does not understand is refused with its own reason when it names one of ours, else with this one. */
export const parsed = <T>(reason: ReasonCode, read: () => T): T => {
  try {
    return read()
  } catch (error) {
    if (!(error instanceof TpmFormatError)) throw error
    return fail(error.reason !== undefined && isReason(error.reason) ? error.reason : reason, error.message)
  }
}
