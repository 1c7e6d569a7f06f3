import type { Attest, Evidence } from '@fleetkey/protocol/messages.ts'
import { attestNonce, evidenceTranscript, qualifyingData } from '@fleetkey/protocol/transcript.ts'
import { makeStateClaims, type StateClaims, type StateContent } from './claims.ts'
import { fail, measured } from './tpm2.ts'

/** What the server knows that the evidence must agree with. `exporter`, `session`: of the connection that the evidence came through. */
export interface AskedOf {
  readonly tenant: string
  readonly device: string
  readonly exporter: Uint8Array
  readonly session: Uint8Array
  readonly attest: Attest
  /** TPMT_PUBLIC of the AK that enrolment proved. */
  readonly ak: Uint8Array
}

/**
 * The state that an enrolled device proves with a fresh quote by the AK it enrolled with. The message itself is signed by its LDevID key: the caller has
 * verified that. Throws Problem('attestation-failed') with a stable reason.
 */
export const reattest = (evidence: Evidence, asked: AskedOf): StateClaims => {
  if ((evidence.ima === null) !== (asked.attest.ima === null)) return fail('ima.unasked', 'an IMA list that was not asked for, or none that was')
  if ((evidence.recipient === null) !== (asked.attest.firmware === null)) return fail('recipient.unasked', 'a recipient key that was not asked for, or none')
  const nonce = attestNonce({ ...asked, challenge: asked.attest.challenge, random: asked.attest.random })
  const transcript = evidenceTranscript({ eventLog: evidence.eventLog, ima: evidence.ima, recipient: evidence.recipient?.public ?? null })
  const [selection] = asked.attest.selection
  if (selection === undefined) return fail('quote.selection.bank')
  const { quote, pcrs, events } = measured(asked.ak, evidence, selection, qualifyingData('quote', nonce, transcript))
  return makeStateClaims({
    pcrs,
    events,
    resetCount: quote.clockInfo.resetCount,
    restartCount: quote.clockInfo.restartCount,
    clockSafe: quote.clockInfo.safe,
    firmwareVersion: quote.firmwareVersion,
  })
}

/** What cannot be the same TPM going on as it was; `undefined` when nothing is wrong. */
export interface Discontinuity {
  readonly verdict: 'warning' | 'contraindicated'
  readonly reason: string
  readonly detail: string
}

/** What was last proven of a TPM. `restartCount`, `firmwareVersion`: null when the last evidence did not verify. */
export interface Before {
  readonly resetCount: number
  readonly restartCount: number | null
  readonly firmwareVersion: bigint | null
  /** resetCount of the first report of this connection; null before it. */
  readonly session: number | null
}

/** Counters never go back while the TPM is not cleared (TPM 2.0 Part 1, §36), and a TPM is not reset under a running connection: that is a reset attack. */
export const discontinuity = (before: Before, now: Pick<StateContent, 'resetCount' | 'restartCount' | 'firmwareVersion'>): Discontinuity | undefined => {
  const wrong = (reason: string, detail: string): Discontinuity => ({ verdict: 'contraindicated', reason, detail })
  if (now.resetCount < before.resetCount) return wrong('tpm.reset-count.lower', `resetCount ${now.resetCount} below ${before.resetCount}`)
  if (before.restartCount !== null && now.resetCount === before.resetCount && now.restartCount < before.restartCount)
    return wrong('tpm.restart-count.lower', `restartCount ${now.restartCount} below ${before.restartCount} without a reset`)
  if (before.session !== null && now.resetCount !== before.session)
    return wrong('tpm.reset-in-session', `resetCount ${now.resetCount}, this connection began with ${before.session}`)
  if (before.firmwareVersion !== null && now.firmwareVersion !== before.firmwareVersion)
    return {
      verdict: now.firmwareVersion < before.firmwareVersion ? 'contraindicated' : 'warning',
      reason: now.firmwareVersion < before.firmwareVersion ? 'tpm.firmware.lower' : 'tpm.firmware.changed',
      detail: `TPM firmware ${before.firmwareVersion.toString(16)} became ${now.firmwareVersion.toString(16)}`,
    }
  return undefined
}
