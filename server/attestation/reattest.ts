import type { Attest, Evidence } from '@fleetkey/protocol/messages.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { attestNonce, evidenceTranscript, qualifyingData } from '@fleetkey/protocol/transcript.ts'
import { handle } from '@fleetkey/tpm2/constants.ts'
import { authPolicyOf } from '@fleetkey/tpm2/firmware.ts'
import { qualifiedName } from '@fleetkey/tpm2/names.ts'
import { makeStateClaims, type StateClaims } from './claims.ts'
import { continuity, isClockExplained, type LastClock, type TpmRecord } from './continuity.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import { bankOf, checkLog } from './event-log.ts'
import { checkKey } from './keys.ts'
import { checkCertification, checkQuote } from './quote.ts'
import { fail } from './reasons.ts'

/** What the server knows that the evidence must agree with. `exporter`, `session`: of the connection that the evidence came through. */
export interface AskedOf {
  readonly tenant: string
  readonly device: string
  readonly exporter: Uint8Array
  readonly session: Uint8Array
  readonly attest: Attest
  /** TPMT_PUBLIC of the AK that enrolment proved. */
  readonly ak: Uint8Array
  /** TPMT_PUBLIC of the SRK on record. */
  readonly srk: Uint8Array
  /** What was last accepted: a clock that is not safe is accepted only when a reboot since then explains it. */
  readonly last: LastClock | null
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

/**
 * The recipient key (TPMT_PUBLIC) that evidence presents because a new one was asked for, proven to be in the same TPM, in the same boot, under exactly the
 * policy that was asked for; null when none was. For evidence whose state is proven. Throws Problem('attestation-failed') with a stable reason.
 */
export const renewedRecipient = (evidence: Evidence, asked: AskedOf, state: StateClaims): Uint8Array | null => {
  const { recipient } = evidence
  const { firmware, challenge, random } = asked.attest
  if (recipient === null || firmware === null) return null
  const key = checkKey('recipient', recipient.public, authPolicyOf(firmware))
  const nonce = attestNonce({ ...asked, challenge, random })
  const transcript = evidenceTranscript({ eventLog: evidence.eventLog, ima: evidence.ima, recipient: recipient.public })
  const ak = checkKey('ak', asked.ak)
  const expected = (role: 'recipient' | 'srk') => ({
    ak,
    nonce: qualifyingData(role, nonce, transcript),
    signers: [qualifiedName(handle.endorsement, ak.name)],
  })
  const { clockInfo } = checkCertification('recipient', recipient.certify, key.name, expected('recipient'))
  if (recipient.srk !== null) checkCertification('srk', recipient.srk, checkKey('srk', asked.srk).name, expected('srk'))
  if (clockInfo.resetCount !== state.resetCount || clockInfo.restartCount !== state.restartCount)
    return fail('tpm.reset-count.changed', `resetCount ${state.resetCount} and ${clockInfo.resetCount}`)
  return key.bytes
}

/** What cannot be the same TPM going on as it was. */
export interface Discontinuity {
  readonly verdict: 'contraindicated'
  readonly reason: string
  readonly detail: string
}

/** What is known of before. `session`: resetCount of the first report of this connection; null before it. */
export interface Before {
  readonly record: TpmRecord
  readonly session: number | null
}

type Now = Omit<Parameters<typeof continuity>[1], 'srkPublic'>

/**
 * A TPM that goes on as its record says (`continuity`), and was not reset under a running connection: that is a reset attack. Re-attestation proves no keys
 * anew, so the SRK is that of the record. `undefined` when nothing is wrong. Throws what is no refusal.
 */
export const discontinuity = ({ record, session }: Before, now: Now, policy: Pick<EndorsementPolicy, 'updates'>): Discontinuity | undefined => {
  try {
    continuity(record, { ...now, srkPublic: record.srk }, policy)
    if (session !== null && now.resetCount !== session) fail('tpm.reset-in-session', `resetCount ${now.resetCount}, this connection began with ${session}`)
    return undefined
  } catch (thrown) {
    const problem = toProblem(thrown)
    if (problem.code !== 'attestation-failed') throw problem
    return { verdict: 'contraindicated', reason: problem.reason ?? problem.code, detail: problem.message }
  }
}
