import { sameBytes, TpmFormatError } from './bytes.ts'
import { alg } from './constants.ts'
import { resetValue } from './event-log.ts'
import type { ImaEntry } from './ima.ts'
import { digest, hashName } from './kdf.ts'

const refuse = (reason: string, detail: string): never => {
  throw new TpmFormatError(`measurement list: ${detail}`, `ima.${reason}`)
}

export interface ImaReplay {
  /** PCR 10 as quoted. */
  readonly quoted: Uint8Array
  /** The bank it was quoted from; SHA-256 unless given. */
  readonly hash?: number
  /** PCRs 0 to 9 per bank, quoted or replayed: the first entry of a list that starts with the boot must be their digest. */
  readonly boot: ReadonlyMap<number, ReadonlyMap<number, Uint8Array>>
  /** PCR 10 after the entries that are known already: then `list` is what follows them. From the boot unless given. */
  readonly after?: Uint8Array
  /** Whether violations are accepted: then nobody knows what those files were. Refused unless given. */
  readonly allowViolations?: boolean
}

export interface ImaMeasured {
  /** How many entries lead to the quoted PCR 10. What follows them was measured later, or never: it has to be asked for again with the next quote. */
  readonly length: number
  /** PCR 10 after them. */
  readonly value: Uint8Array
  /** Whether the first of them is the boot's boot_aggregate. */
  readonly fromBoot: boolean
}

/**
 * The digest of boot_aggregate over what the firmware measured (security/integrity/ima/ima_crypto.c): PCRs 0 to 9 of the bank of its algorithm, PCRs 0 to
 * 7 when that is SHA-1. Undefined when the bank is not known.
 */
export const bootAggregate = (boot: ImaReplay['boot'], hash: number): Uint8Array | undefined => {
  const values = boot.get(hash)
  if (values === undefined) return undefined
  const pcrs = Array.from({ length: hash === alg.sha1 ? 8 : 10 }, (_, pcr) => values.get(pcr) ?? resetValue(pcr, hash))
  return digest(hash, ...pcrs)
}

/**
 * Ties a list to this boot by its first entry: else that of another boot, or of another machine in the same state, would do. Throws TpmFormatError with
 * reason `ima.boot-aggregate`.
 */
export const checkBootAggregate = (first: Pick<ImaEntry, 'path' | 'violation' | 'hash' | 'digest'> | undefined, boot: ImaReplay['boot']): void => {
  if (first === undefined || first.path !== 'boot_aggregate' || first.violation) return refuse('boot-aggregate', 'does not start with boot_aggregate')
  const expected = bootAggregate(boot, first.hash)
  if (expected === undefined || !sameBytes(expected, first.digest)) refuse('boot-aggregate', 'boot_aggregate is not the digest of PCRs 0 to 9')
}

/** PCR 10 of this bank after one more entry: the kernel extends the entry's template hash in that bank, or ones for a violation. */
export const afterEntry = (value: Uint8Array, entry: ImaEntry, hash: number): Uint8Array =>
  digest(hash, value, entry.violation ? new Uint8Array(hashName(hash).size).fill(0xff) : digest(hash, entry.templateData))

/** An entry that contradicts itself: its template hash is not that of its fields. Throws TpmFormatError with reason `ima.template-hash`. */
export const checkTemplateHash = (entry: ImaEntry, at: number): void => {
  if (!entry.violation && !sameBytes(digest(alg.sha1, entry.templateData), entry.templateHash)) refuse('template-hash', `entry ${at} has another hash`)
}

/**
 * The entries that lead to the quoted PCR 10: a list that was read after the quote is longer than what was quoted, and its tail proves nothing. Throws
 * TpmFormatError with a reason: `ima.boot-aggregate`, `ima.template-hash` (the list contradicts itself), `ima.violation`, `ima.no-prefix`. Kernels before
 * 5.8, which extend the SHA-256 bank with a padded SHA-1, end in `ima.no-prefix`.
 */
export const replayIma = (list: readonly ImaEntry[], of: ImaReplay): ImaMeasured => {
  const hash = of.hash ?? alg.sha256
  const fromBoot = of.after === undefined
  let value = of.after ?? resetValue(10, hash)
  if (fromBoot) checkBootAggregate(list[0], of.boot)
  else if (sameBytes(value, of.quoted)) return { length: 0, value, fromBoot }
  for (const [at, entry] of list.entries()) {
    checkTemplateHash(entry, at)
    if (entry.violation && of.allowViolations !== true) refuse('violation', `entry ${at} is a violation`)
    value = afterEntry(value, entry, hash)
    if (sameBytes(value, of.quoted)) return { length: at + 1, value, fromBoot }
  }
  return refuse('no-prefix', `no part of ${list.length} entries leads to the quoted PCR 10`)
}

/** A file that was measured; for a comparison with a list of what may run. */
export interface MeasuredFile {
  readonly path: string
  /** TPM_ALG_ID of `digest`. */
  readonly hash: number
  readonly digest: Uint8Array
  readonly signature: Uint8Array | null
}

/** The files of the entries that `replayIma` found authentic: boot_aggregate is none, and what a violation read is unknown. */
export const measuredFiles = (list: readonly ImaEntry[], measured: ImaMeasured): readonly MeasuredFile[] =>
  list
    .slice(0, measured.length)
    .filter((entry, at) => !entry.violation && !(measured.fromBoot && at === 0))
    .map(({ path, hash, digest: own, signature }) => ({ path, hash, digest: own, signature }))
