import { concat, sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { resetValue } from '@fleetkey/tpm2/event-log.ts'
import { imaLimits, imaPcr, parseIma, type ImaEntry } from '@fleetkey/tpm2/ima.ts'
import { afterEntry, checkBootAggregate, checkTemplateHash } from '@fleetkey/tpm2/ima-replay.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import type { ImaClaims, StateContent } from './claims.ts'
import type { Logged } from './event-log.ts'
import type { Quote } from './quote.ts'
import { fail, parsed } from './reasons.ts'

/** PCRs that boot_aggregate is the digest of, and the one that files are measured into: quoted whenever a list is asked for. */
export const imaPcrs: readonly number[] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, imaPcr]

/** What one attestation may cost. */
export const catchUpLimits = {
  /** Entries of one boot. */
  entries: 2_000_000,
  /** Answers until the quoted PCR 10 is reached. */
  rounds: 128,
  /** A list of so many bytes may have been cut; a shorter one ends where the kernel's ended when it was read. */
  cut: imaLimits.wire.maxBytes / 2,
} as const

/** TPM counters that no two boots of a TPM share. */
type Boot = Pick<StateContent, 'resetCount' | 'restartCount'>

type Aggregate = Pick<ImaEntry, 'path' | 'violation' | 'hash' | 'digest'>

/** Where the replay of a list stands. What `entries` led to counts only once a quote has confirmed a later value: PCR 10 is a hash chain. */
export interface ImaProgress extends Omit<ImaClaims, 'pending' | 'value'> {
  /** Null before the first entry. */
  readonly boot: Boot | null
  readonly value: Uint8Array | null
  /** The digest over PCRs 0 to 9 that this boot's list begins with, not confirmed yet; null once it is. */
  readonly aggregate: Aggregate | null
  readonly rounds: number
  /** The digest of the first quote of this catch-up that its list did not explain. Every list that is read later does, or never will. */
  readonly awaited: Uint8Array | null
}

/** Before the first entry. */
export const fromBoot: ImaProgress = {
  boot: null,
  value: null,
  entries: 0,
  violations: 0,
  comparedWith: null,
  unlisted: 0,
  firstUnlisted: null,
  aggregate: null,
  rounds: 0,
  awaited: null,
}

/** Where a proven list ended: the next attestation of the same boot goes on there. */
export const progressAfter = ({ ima, resetCount, restartCount }: StateContent): ImaProgress => {
  if (ima === null) return fromBoot
  const { value, pending: _, ...rest } = ima
  return { ...fromBoot, ...rest, boot: { resetCount, restartCount }, value: new Uint8Array(Buffer.from(value, 'hex')) }
}

/** A release with the digests (hex) of the files that may run under it; null: it lists none. */
export interface FileList {
  readonly id: string
  readonly files: ReadonlySet<string> | null
}

export interface ImaQuestion {
  readonly list: Uint8Array
  readonly quote: Quote
  /** TPM_ALG_ID of the hash that the quote was signed with. */
  readonly signedWith: number
  readonly logged: Logged
  readonly progress: ImaProgress
  /** The release that the log leads to. */
  readonly release: FileList | null
}

/** `reached`: log and list are what was quoted. `more`: what is missing, or is of another boot, is to be asked for; nothing is proven yet. */
export type ImaAnswer = { readonly reached: true; readonly claims: ImaClaims } | { readonly reached: false; readonly progress: ImaProgress }

/** Which quote covers PCR 10 with this value, and every other PCR with the log's: the one of this answer, the one that is awaited, or none. */
const quotedWith = ({ quote, signedWith, logged, progress }: ImaQuestion): ((value: Uint8Array) => 'now' | 'before' | null) => {
  const valuesOf = (pcrs: readonly number[]): Uint8Array => concat(...pcrs.map(logged.valueOf))
  const start = valuesOf(logged.bank.pcrs.filter((pcr) => pcr < imaPcr))
  const values = concat(start, resetValue(imaPcr, logged.bank.hash), valuesOf(logged.bank.pcrs.filter((pcr) => pcr > imaPcr)))
  return (value) => {
    values.set(value, start.length)
    const reached = digest(signedWith, values)
    if (sameBytes(reached, quote.pcrDigest)) return 'now'
    return progress.awaited !== null && sameBytes(reached, progress.awaited) ? 'before' : null
  }
}

const checkAggregate = (entry: Aggregate | undefined, { bank, valueOf }: Logged): void =>
  parsed('ima.boot-aggregate', () => checkBootAggregate(entry, new Map([[bank.hash, new Map(imaPcrs.map((pcr) => [pcr, valueOf(pcr)]))]])))

const described = ({ digest: own, path }: ImaEntry): string =>
  `${Buffer.from(own).toString('hex')} called ${JSON.stringify(path.replaceAll(/[^ -~]/g, '?').slice(0, 120))}`

/** What one more entry adds. Its path is what the kernel called the file, and says nothing of what it is: only the digest is compared. */
const withEntry = (progress: ImaProgress, entry: ImaEntry, of: { readonly hash: number; readonly release: FileList | null }): ImaProgress => {
  const first = progress.entries === 0
  const value = afterEntry(progress.value ?? resetValue(imaPcr, of.hash), entry, of.hash)
  const files = of.release?.files ?? null
  const isUnlisted = !first && !entry.violation && files !== null && !files.has(Buffer.from(entry.digest).toString('hex'))
  return {
    ...progress,
    value,
    entries: progress.entries + 1,
    violations: progress.violations + (entry.violation ? 1 : 0),
    unlisted: progress.unlisted + (isUnlisted ? 1 : 0),
    firstUnlisted: progress.firstUnlisted ?? (isUnlisted ? described(entry) : null),
    // A copy: it outlives the message that it came in.
    aggregate: first ? { path: entry.path, violation: entry.violation, hash: entry.hash, digest: Uint8Array.from(entry.digest) } : progress.aggregate,
  }
}

/** Where to start with this quote: what is known is of this boot and was compared with this release, or everything is asked for again. */
const isOf = (progress: ImaProgress, { quote, release }: ImaQuestion): boolean =>
  progress.boot === null ||
  (progress.boot.resetCount === quote.clockInfo.resetCount &&
    progress.boot.restartCount === quote.clockInfo.restartCount &&
    progress.comparedWith === (release?.id ?? null))

const claimsOf = ({ entries, value, violations, comparedWith, unlisted, firstUnlisted }: ImaProgress, pending: number, hash: number): ImaClaims => ({
  entries,
  value: Buffer.from(value ?? resetValue(imaPcr, hash)).toString('hex'),
  pending,
  violations,
  comparedWith,
  unlisted,
  firstUnlisted,
})

/** One more round, or the end of all patience. */
const anotherRound = (progress: ImaProgress): ImaAnswer => {
  const rounds = progress.rounds + 1
  if (progress.entries > catchUpLimits.entries || rounds >= catchUpLimits.rounds)
    return fail('ima.limit.entries', `${progress.entries} entries in ${rounds} answers, and no end`)
  return { reached: false, progress: { ...progress, rounds } }
}

/** Where the list was when a quote confirmed it, and how many of its entries had been read. */
interface Confirmed {
  readonly progress: ImaProgress
  readonly read: number
  readonly by: 'now' | 'before'
}

/** Reads the list to the last value that a quote confirms; `confirmed` null when none does. */
const follow = (list: readonly ImaEntry[], start: ImaProgress, question: ImaQuestion): { readonly end: ImaProgress; readonly confirmed: Confirmed | null } => {
  const quoted = quotedWith(question)
  const of = { hash: question.logged.bank.hash, release: question.release }
  let progress = start
  let confirmed: Confirmed | null = null
  for (let read = 0; ; read++) {
    const by = progress.value === null ? null : quoted(progress.value)
    if (by !== null) confirmed = { progress, read, by }
    const entry = list[read]
    // What stands behind this answer's own quote is proven by nothing, and not looked at.
    if (by === 'now' || entry === undefined) return { end: progress, confirmed }
    parsed('ima.template-hash', () => checkTemplateHash(entry, progress.entries))
    progress = withEntry(progress, entry, of)
  }
}

/**
 * Holds the next part of a measurement list against a quote that covers `imaPcrs`. List and quote are not made at the same instant. The part that leads to the
 * quoted PCR 10 counts, and what stands behind it is counted as pending. A list that ends before is asked for from where it ends: what was read after a quote
 * explains it, so the next part must, unless it is so long that it was cut. Pure. Throws Problem('attestation-failed') with a reason `ima.…`.
 */
export const checkIma = (question: ImaQuestion): ImaAnswer => {
  const { quote, logged, release, progress: known } = question
  const { resetCount, restartCount } = quote.clockInfo
  if (!isOf(known, question)) return anotherRound({ ...fromBoot, rounds: known.rounds })
  const list = parsed('ima.malformed', () => parseIma(question.list, imaLimits.wire))
  // Against the log as it is now, and again by the answer that proves that log.
  if (known.entries === 0 && list.length > 0) checkAggregate(list[0], logged)
  const { end, confirmed } = follow(list, { ...known, boot: { resetCount, restartCount }, comparedWith: release?.id ?? null }, question)
  if (confirmed !== null) {
    const { progress, read, by } = confirmed
    // This answer's own quote may cover an entry that its list does not have.
    const pending = Math.max(list.length - read, by === 'before' ? 1 : 0)
    if (progress.aggregate !== null) checkAggregate(progress.aggregate, logged)
    return { reached: true, claims: claimsOf(progress, pending, logged.bank.hash) }
  }
  if (known.awaited !== null && question.list.length < catchUpLimits.cut)
    return fail('ima.no-prefix', `${end.entries} entries do not lead to the quoted PCR 10`)
  return anotherRound({ ...end, awaited: known.awaited ?? quote.pcrDigest })
}
