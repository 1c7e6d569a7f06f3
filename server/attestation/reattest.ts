import type { Attest, Evidence } from '@fleetkey/protocol/messages.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { attestNonce, evidenceTranscript, qualifyingData } from '@fleetkey/protocol/transcript.ts'
import { handle } from '@fleetkey/tpm2/constants.ts'
import { authPolicyOf } from '@fleetkey/tpm2/firmware.ts'
import { qualifiedName } from '@fleetkey/tpm2/names.ts'
import type { PcrBank } from '@fleetkey/tpm2/structures.ts'
import { makeStateClaims, type StateClaims } from './claims.ts'
import { continuity, isClockExplained, type LastClock, type TpmRecord } from './continuity.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import { bankOf, checkLog, measuredOf, pcrValues, readLog } from './event-log.ts'
import { checkIma, type FileList, type ImaProgress } from './ima.ts'
import { checkKey } from './keys.ts'
import { checkCertification, checkQuote, type Quote } from './quote.ts'
import { fail } from './reasons.ts'

/** What is known of a measurement list before its next part is read. */
export interface AskedList {
  /** Where it goes on. */
  readonly progress: ImaProgress
  /** PCRs that reference values speak of; those that only the list needs are quoted beside them. */
  readonly appraised: readonly number[]
  /** The release with this state, and the files that may run under it. */
  readonly releaseOf: (pcrs: Readonly<Record<string, string>>) => FileList | null
}

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
  /** What the measurement list is held against that is asked for; null when none is. */
  readonly list: AskedList | null
}

/** `more`: the evidence is authentic as far as it goes, and proves nothing before the rest of the measurement list is there. */
export type Reattested = { readonly state: StateClaims } | { readonly more: ImaProgress }

/** What log and list prove together with the quote. */
const measure = (evidence: Evidence, asked: AskedOf, of: { readonly quote: Quote; readonly bank: PcrBank; readonly signedWith: number }) => {
  const { quote, bank, signedWith } = of
  if (evidence.ima === null || asked.list === null) return { measured: checkLog(evidence.eventLog, quote, bank, signedWith), ima: null }
  const logged = readLog(evidence.eventLog, bank)
  const { progress, appraised, releaseOf } = asked.list
  const pcrs = bank.pcrs.filter((pcr) => appraised.includes(pcr))
  const release = releaseOf(pcrValues(pcrs, logged.valueOf))
  const answer = checkIma({ list: evidence.ima.list, quote, signedWith, logged, progress, release })
  return answer.reached ? { measured: measuredOf(logged, pcrs), ima: answer.claims } : { more: answer.progress }
}

const checkListAsked = ({ ima }: Evidence, { attest }: AskedOf): void => {
  if (ima === null && attest.ima !== null) fail('ima.missing')
  if (ima !== null && ima.from !== attest.ima) fail('ima.unasked', attest.ima === null ? undefined : `from entry ${ima.from}, not ${attest.ima}`)
}

/**
 * The state that an enrolled device proves with a fresh quote by the AK it enrolled with. The message itself is signed by its LDevID key: the caller has
 * verified that. Throws Problem('attestation-failed') with a stable reason.
 */
export const reattest = (evidence: Evidence, asked: AskedOf): Reattested => {
  checkListAsked(evidence, asked)
  if ((evidence.recipient === null) !== (asked.attest.firmware === null)) return fail('recipient.unasked', 'a recipient key that was not asked for, or none')
  const nonce = attestNonce({ ...asked, challenge: asked.attest.challenge, random: asked.attest.random })
  const transcript = evidenceTranscript({ eventLog: evidence.eventLog, ima: evidence.ima, recipient: evidence.recipient?.public ?? null })
  const bank = bankOf(asked.attest.selection[0])
  const ak = checkKey('ak', asked.ak)
  const signers = [qualifiedName(handle.endorsement, ak.name)]
  const quote = checkQuote(evidence.quote, bank, { ak, nonce: qualifyingData('quote', nonce, transcript), signers })
  const found = measure(evidence, asked, { quote, bank, signedWith: ak.public.scheme?.hash ?? 0 })
  if (!quote.clockInfo.safe && !isClockExplained(asked.last, quote.clockInfo)) fail('quote.clock.unsafe')
  if (found.more !== undefined) return { more: found.more }
  const { resetCount, restartCount, safe, clock } = quote.clockInfo
  const { firmwareVersion } = quote
  return { state: makeStateClaims({ ...found.measured, resetCount, restartCount, clockSafe: safe, clock, firmwareVersion, ima: found.ima }) }
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
