import { createHash } from 'node:crypto'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { alg, handle } from '@fleetkey/tpm2/constants.ts'
import { qualifiedName } from '@fleetkey/tpm2/names.ts'
import type { PcrBank } from '@fleetkey/tpm2/structures.ts'
import { appraise } from './appraise.ts'
import { makeStateClaims } from './claims.ts'
import { isClockExplained, isRecordedUpdate } from './continuity.ts'
import { checkEkProfile, readEkCertificate, type EkCertificate } from './ek-certificate.ts'
import { ekNamesOf } from './ek-names.ts'
import { checkEk } from './ek-template.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import { checkEkDenied, vouchedFor, type EndorsementCa } from './endorsements.ts'
import { checkFirmware, firmwareNumber, firmwareText } from './firmware.ts'
import { checkForeignAk, type TpmKey } from './keys.ts'
import { measuredOffline, type OfflineMeasured } from './offline-measured.ts'
import { OfflinePolicy } from './offline-policy.ts'
import { acceptableBank, checkQuote, type Quote } from './quote.ts'
import { fail } from './reasons.ts'

/** Evidence that came on some way, in the TPM's own encodings. */
export interface OfflineEvidence {
  /** TPMT_PUBLIC or TPM2B_PUBLIC. */
  readonly ak: Uint8Array
  /** TPMS_ATTEST. */
  readonly quote: Uint8Array
  /** TPMT_SIGNATURE. */
  readonly signature: Uint8Array
  /** qualifyingData, all of it. */
  readonly nonce: Uint8Array
  readonly selection: PcrBank
  /** Lines `index hex`. */
  readonly pcrValues?: string
  readonly eventLog?: Uint8Array
  readonly ima?: Uint8Array
  /** EK public area, TPMT_PUBLIC or TPM2B_PUBLIC: the AK must be its child, or an endorsement primary. */
  readonly ek?: Uint8Array
  /** DER, with the CAs that may vouch for it. */
  readonly ekCertificate?: { readonly certificate: Uint8Array; readonly endorsements: readonly EndorsementCa[] }
  /** What is asked for besides authenticity. */
  readonly policy?: OfflinePolicy
}

/** What was proven, as JSON. `pcrs`: null when nothing but their digest is known. */
export interface OfflineClaims {
  readonly ak: { readonly name: string; readonly algorithm: string }
  readonly qualifiedSigner: string
  /** Whether the qualified signer follows from the EK that was given; null when none was. It binds only an AK that is known to be in a TPM. */
  readonly belowEk: boolean | null
  readonly bank: string
  readonly pcrDigest: string
  readonly pcrs: Readonly<Record<string, string>> | null
  readonly events: number | null
  readonly ima: { readonly proven: number; readonly pending: number } | null
  readonly resetCount: number
  readonly restartCount: number
  readonly clock: string
  readonly clockSafe: boolean
  readonly firmware: string
  readonly ek: { readonly manufacturer: string; readonly model: string; readonly version: string; readonly endorsement: string } | null
  readonly release: string | null
}

export type OfflineVerdict =
  | { readonly verdict: 'accepted'; readonly reason: null; readonly detail: string; readonly claims: OfflineClaims }
  | { readonly verdict: 'refused'; readonly reason: string; readonly detail: string; readonly claims: null }

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')

/** A TPM2B as its content: tools write public areas with their size before them. */
export const withoutSize = (bytes: Uint8Array): Uint8Array => ((bytes[0] ?? 0) * 256 + (bytes[1] ?? 0) === bytes.length - 2 ? bytes.subarray(2) : bytes)

const algorithmOf = ({ public: key }: TpmKey): string => (key.type === alg.rsa ? `RSA-${key.keyBits}` : key.curve === 4 ? 'P-384' : 'P-256')
const bankNames: Readonly<Record<number, string>> = { [alg.sha1]: 'sha1', [alg.sha256]: 'sha256', [alg.sha384]: 'sha384', [alg.sha512]: 'sha512' }

/** Qualified names that the AK may have when this is its EK; null when no EK is known. */
const signersOf = (ak: TpmKey, ekNames: readonly Uint8Array[] | null): readonly Uint8Array[] | null =>
  ekNames === null
    ? null
    : [qualifiedName(handle.endorsement, ak.name), ...ekNames.map((name) => qualifiedName(qualifiedName(handle.endorsement, name), ak.name))]

const vouched = (of: OfflineEvidence, policy: EndorsementPolicy, now: number): { read: EkCertificate; endorsement: string } | null => {
  if (of.ekCertificate === undefined) return null
  const read = checkEkProfile(readEkCertificate(of.ekCertificate.certificate))
  return { read, endorsement: vouchedFor(read, of.ekCertificate.endorsements, policy, now).root.subject }
}

const checkEkKey = (of: OfflineEvidence, ek: EkCertificate | undefined, policy: EndorsementPolicy): readonly Uint8Array[] | null => {
  if (of.ek === undefined) return ek === undefined ? null : ekNamesOf(ek.certificate.native.publicKey)
  const key = checkEk(withoutSize(of.ek))
  checkEkDenied(createHash('sha256').update(key.bytes).digest('hex'), policy)
  if (ek !== undefined && Buffer.compare(ek.certificate.native.publicKey.export({ format: 'der', type: 'spki' }), key.spki) !== 0) fail('ek.cert.other-key')
  return [key.name]
}

const checkState = (quote: Quote, policy: OfflinePolicy, endorsement: EndorsementPolicy): void => {
  const { resetCount, restartCount, clock, safe } = quote.clockInfo
  const { last } = policy
  if (!safe && policy.clock === 'safe' && !isClockExplained(last === undefined ? null : { resetCount: last.resetCount, quoted: null }, quote.clockInfo))
    fail('quote.clock.unsafe')
  if (last === undefined) return
  if (resetCount < last.resetCount) fail('tpm.reset-count.lower', `resetCount ${resetCount} below ${last.resetCount}`)
  if (resetCount === last.resetCount && restartCount < (last.restartCount ?? 0)) fail('tpm.restart-count.lower', `restartCount ${restartCount}`)
  if (clock < BigInt(last.clock ?? 0)) fail('tpm.clock.back', `clock ${clock} ms after ${last.clock} ms`)
  const before = last.firmware === undefined ? undefined : firmwareNumber(last.firmware)
  if (before !== undefined && before !== quote.firmwareVersion && !isRecordedUpdate(before, quote.firmwareVersion, endorsement.updates))
    fail('tpm.firmware.changed', `TPM firmware ${last.firmware} became ${firmwareText(quote.firmwareVersion)}`)
}

/** Id of the release whose reference values match; null when none was asked for. */
const releaseOf = (quote: Quote, measured: OfflineMeasured, policy: OfflinePolicy): string | null => {
  if (policy.releases === undefined) return null
  const { resetCount, restartCount, clock, safe } = quote.clockInfo
  const state = { events: measured.events ?? 0, resetCount, restartCount, clock, clockSafe: safe, firmwareVersion: quote.firmwareVersion, ima: null }
  const pcrs = measured.pcrs ?? fail('quote.values.count', 'reference values are compared with PCR values, and none were given')
  const references = policy.releases.map(({ id, model, name, number, debug, withdrawn, pcrs }) => ({
    id: id ?? `${model ?? ''}/${name ?? ''}`,
    model: 'any',
    number,
    debug,
    withdrawn: withdrawn ? { at: 0, reason: 'withdrawn' } : null,
    pcrs,
  }))
  const grave = { onUnknown: 'quarantine', onWithdrawn: 'quarantine', onDebug: 'quarantine', onUnlisted: 'quarantine' } as const
  const rules = { ...grave, floor: policy.floor, releases: 'any', minimumRelease: 0, ima: 'ignored' } as const
  const result = appraise(makeStateClaims({ ...state, pcrs }), 'any', references, rules)
  if (result.verdict === 'contraindicated') throw new Problem('attestation-failed', result.detail, { reason: result.reason })
  return result.release
}

const judged = (of: OfflineEvidence, now: number): OfflineClaims => {
  const policy = of.policy ?? OfflinePolicy.parse({})
  const { endorsement } = policy
  const ak = checkForeignAk(withoutSize(of.ak))
  const ek = vouched(of, endorsement, now)
  const ekNames = checkEkKey(of, ek?.read, endorsement)
  if (of.nonce.length < 8) fail('quote.nonce.short', `${of.nonce.length} bytes`)
  if (!acceptableBank(of.selection.hash)) fail('quote.selection.bank', 'SHA-1 was asked for')
  const signed = { attest: of.quote, signature: of.signature }
  const quote = checkQuote(signed, of.selection, { ak, nonce: of.nonce, signers: signersOf(ak, ekNames) })
  checkState(quote, policy, endorsement)
  checkFirmware(quote.firmwareVersion, ek?.read.tpm.manufacturer ?? null, endorsement)
  const measured = measuredOffline({ ...of, quote, bank: of.selection, signedWith: ak.public.scheme?.hash ?? 0, policy })
  const { resetCount, restartCount, clock, safe } = quote.clockInfo
  return {
    ak: { name: hex(ak.name), algorithm: algorithmOf(ak) },
    qualifiedSigner: hex(quote.qualifiedSigner),
    belowEk: ekNames === null ? null : true,
    bank: bankNames[of.selection.hash] ?? String(of.selection.hash),
    pcrDigest: hex(quote.pcrDigest),
    ...measured,
    resetCount,
    restartCount,
    clock: String(clock),
    clockSafe: safe,
    firmware: firmwareText(quote.firmwareVersion),
    ek:
      ek === null
        ? null
        : {
            manufacturer: ek.read.tpm.manufacturer,
            model: ek.read.tpm.model,
            version: `${ek.read.tpm.version >>> 16}.${ek.read.tpm.version & 0xffff}`,
            endorsement: ek.endorsement,
          },
    release: releaseOf(quote, measured, policy),
  }
}

/**
 * Judges a quote without a server: authentic (AK attributes, signature in the AK's own scheme, magic, nonce, exact selection), and what it proves. RSA (RSASSA,
 * PSS; 2048 bits and up), P-256 and P-384 with SHA-256 and up. What the caller must know by other means: that this AK is in a TPM (`make-credential`). `now`:
 * milliseconds since 1970. Never throws for what the evidence holds.
 */
export const appraiseOffline = (evidence: OfflineEvidence, now: number): OfflineVerdict => {
  try {
    const claims = judged(evidence, now)
    return { verdict: 'accepted', reason: null, detail: 'authentic', claims }
  } catch (error) {
    if (!(error instanceof Problem) || error.reason === undefined) throw error
    return { verdict: 'refused', reason: error.reason, detail: error.message, claims: null }
  }
}
