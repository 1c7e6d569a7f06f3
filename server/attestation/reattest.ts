import type { Attest, Evidence } from '@fleetkey/protocol/messages.ts'
import { attestNonce, evidenceTranscript, qualifyingData } from '@fleetkey/protocol/transcript.ts'
import { handle } from '@fleetkey/tpm2/constants.ts'
import { qualifiedName } from '@fleetkey/tpm2/names.ts'
import { makeStateClaims, type StateClaims, type StateContent } from './claims.ts'
import { isClockExplained, isRecordedUpdate } from './continuity.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import { bankOf, checkLog } from './event-log.ts'
import { firmwareText } from './firmware.ts'
import { checkKey } from './keys.ts'
import { checkQuote } from './quote.ts'
import { fail, type ReasonCode } from './reasons.ts'

/** What the server knows that the evidence must agree with. `exporter`, `session`: of the connection that the evidence came through. */
export interface AskedOf {
  readonly tenant: string
  readonly device: string
  readonly exporter: Uint8Array
  readonly session: Uint8Array
  readonly attest: Attest
  /** TPMT_PUBLIC of the AK that enrolment proved. */
  readonly ak: Uint8Array
  /** What was last accepted: a clock that is not safe is accepted only when a reboot since then explains it. */
  readonly last: { readonly resetCount: number; readonly clock: bigint | null } | null
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
  const bank = bankOf(asked.attest.selection[0])
  const ak = checkKey('ak', asked.ak)
  const signers = [qualifiedName(handle.endorsement, ak.name)]
  const quote = checkQuote(evidence.quote, bank, { ak, nonce: qualifyingData('quote', nonce, transcript), signers })
  const { pcrs, events } = checkLog(evidence.eventLog, quote, bank, ak.public.scheme?.hash ?? 0)
  if (!quote.clockInfo.safe && !isClockExplained(asked.last, quote.clockInfo)) fail('quote.clock.unsafe')
  return makeStateClaims({
    pcrs,
    events,
    resetCount: quote.clockInfo.resetCount,
    restartCount: quote.clockInfo.restartCount,
    clockSafe: quote.clockInfo.safe,
    clock: quote.clockInfo.clock,
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
export const discontinuity = (
  before: Before,
  now: Pick<StateContent, 'resetCount' | 'restartCount' | 'firmwareVersion'>,
  updates: EndorsementPolicy['updates'] = [],
): Discontinuity | undefined => {
  const wrong = (reason: ReasonCode, detail: string): Discontinuity => ({ verdict: 'contraindicated', reason, detail })
  if (now.resetCount < before.resetCount) return wrong('tpm.reset-count.lower', `resetCount ${now.resetCount} below ${before.resetCount}`)
  if (before.restartCount !== null && now.resetCount === before.resetCount && now.restartCount < before.restartCount)
    return wrong('tpm.restart-count.lower', `restartCount ${now.restartCount} below ${before.restartCount} without a reset`)
  if (before.session !== null && now.resetCount !== before.session)
    return wrong('tpm.reset-in-session', `resetCount ${now.resetCount}, this connection began with ${before.session}`)
  const { firmwareVersion } = before
  if (firmwareVersion !== null && now.firmwareVersion !== firmwareVersion && !isRecordedUpdate(firmwareVersion, now.firmwareVersion, updates))
    return wrong('tpm.firmware.changed', `TPM firmware ${firmwareText(firmwareVersion)} became ${firmwareText(now.firmwareVersion)}`)
  return undefined
}
