import { parseAttest, type Attest } from '@fleetkey/tpm2/attest.ts'
import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { alg, generated, tag } from '@fleetkey/tpm2/constants.ts'
import type { PcrBank } from '@fleetkey/tpm2/structures.ts'
import type { TpmKey } from './keys.ts'
import type { StatementRole } from './reasons/quote.ts'
import { fail, parsed } from './reasons.ts'
import { checkSignature } from './signature.ts'

export interface Signed {
  /** TPMS_ATTEST. */
  readonly attest: Uint8Array
  /** TPMT_SIGNATURE. */
  readonly signature: Uint8Array
}

export type Quote = Extract<Attest, { readonly type: 'quote' }>
export type Certification = Extract<Attest, { readonly type: 'certify' }>

/** What a statement must be, whoever makes it. */
export interface StatementExpectation {
  readonly ak: TpmKey
  /** qualifyingData, all of it. */
  readonly nonce: Uint8Array
  /** Qualified names that the signer may have; null when nothing is known of where the AK is. */
  readonly signers: readonly Uint8Array[] | null
}

const start = (bytes: Uint8Array): { magic: number; type: number } => {
  const head = Buffer.from(bytes.subarray(0, 6))
  return head.length < 6 ? { magic: -1, type: -1 } : { magic: head.readUInt32BE(0), type: head.readUInt16BE(4) }
}

/** The type of a statement as it must be by role. */
const types: ReadonlySet<number> = new Set([tag.attestQuote, tag.attestCertify])

/**
 * A statement of the TPM: signed by this AK in the AK's own scheme, made by a TPM (magic), over exactly this nonce, by a signer in the right hierarchy.
 * Signature first: nothing is read from bytes that nobody vouches for.
 */
const statement = (role: StatementRole, of: Signed, expected: StatementExpectation): Attest => {
  checkSignature(role, expected.ak, of.attest, of.signature)
  const { magic, type } = start(of.attest)
  if (magic !== generated) fail(`${role}.magic`)
  if (!types.has(type)) fail(`${role}.type`, `attestation type ${type.toString(16)}`)
  const attest = parsed(`${role}.statement`, () => parseAttest(of.attest))
  if (!sameBytes(attest.extraData, expected.nonce)) fail(`${role}.nonce`)
  if (expected.signers?.some((signer) => sameBytes(signer, attest.qualifiedSigner)) === false) fail(`${role}.signer`)
  return attest
}

/** The AK vouches that its TPM holds the object of this name. */
export const checkCertification = (role: Exclude<StatementRole, 'quote'>, of: Signed, name: Uint8Array, expected: StatementExpectation): Certification => {
  const attest = statement(role, of, expected)
  if (attest.type !== 'certify') return fail(`${role}.type`, 'not a certification')
  if (!sameBytes(attest.name, name)) fail(role === 'srk' ? 'key.parent-not-certified' : `${role}.name`)
  return attest
}

/** A quote of exactly this bank and these PCRs. */
export const checkQuote = (of: Signed, asked: PcrBank, expected: StatementExpectation): Quote => {
  const attest = statement('quote', of, expected)
  if (attest.type !== 'quote') return fail('quote.type', 'not a quote')
  checkSelection(attest.selection, asked)
  return attest
}

/** PCRs that software may reset from locality 0 (PC Client PTP §4.6): debug and application. */
const resettable: readonly number[] = [16, 23]

const checkSelection = (selection: readonly PcrBank[], asked: PcrBank): void => {
  const named = (hash: number): readonly PcrBank[] => selection.filter((bank) => bank.hash === hash)
  if (selection.some(({ hash }) => named(hash).length > 1)) fail('quote.selection.duplicate')
  if (selection.length === 0) fail('quote.selection.empty')
  const [bank] = named(asked.hash)
  if (bank === undefined)
    return fail('quote.selection.bank', `bank ${selection.map(({ hash }) => hash.toString(16)).join()} where ${asked.hash.toString(16)} was asked`)
  if (selection.length > 1) fail('quote.selection.extra-bank')
  if (bank.pcrs.length === 0) fail('quote.selection.empty')
  if (bank.pcrs.every((pcr) => resettable.includes(pcr))) fail('quote.selection.resettable')
  const missing = asked.pcrs.filter((pcr) => !bank.pcrs.includes(pcr))
  if (missing.length > 0) fail('quote.selection.missing', `PCRs ${missing.join()} are not quoted`)
  const extra = bank.pcrs.filter((pcr) => !asked.pcrs.includes(pcr))
  if (extra.length > 0) fail('quote.selection.extra', `PCRs ${extra.join()} were not asked for`)
}

/** A bank that is worth quoting: SHA-1 never is. */
export const acceptableBank = (hash: number): boolean => hash === alg.sha256 || hash === alg.sha384 || hash === alg.sha512

/** All statements of one answer come from one boot: a TPM reset in between is the reset attack. */
export const checkOneBoot = (statements: readonly Attest[]): void => {
  const [first] = statements
  if (first === undefined) return
  for (const { clockInfo, firmwareVersion } of statements)
    if (
      clockInfo.resetCount !== first.clockInfo.resetCount ||
      clockInfo.restartCount !== first.clockInfo.restartCount ||
      firmwareVersion !== first.firmwareVersion
    )
      fail('tpm.reset-count.changed', `resetCount ${first.clockInfo.resetCount} and ${clockInfo.resetCount}`)
}
