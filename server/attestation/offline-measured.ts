import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { checkSeparators, separatorProfiles } from '@fleetkey/tpm2/event-log-rules.ts'
import { parseEventLog, replay, resetValue, type Event } from '@fleetkey/tpm2/event-log.ts'
import { imaLimits, imaPcr, parseIma, type ImaEntry } from '@fleetkey/tpm2/ima.ts'
import { afterEntry, measuredFiles, replayIma } from '@fleetkey/tpm2/ima-replay.ts'
import type { PcrBank } from '@fleetkey/tpm2/structures.ts'
import { checkData, logLimits, quotedDigest } from './event-log.ts'
import type { OfflinePolicy } from './offline-policy.ts'
import { readPcrValues } from './pcr-values.ts'
import type { Quote } from './quote.ts'
import { fail, parsed } from './reasons.ts'

export interface OfflineMeasured {
  readonly pcrs: Readonly<Record<string, string>> | null
  readonly events: number | null
  readonly ima: { readonly proven: number; readonly pending: number } | null
}

interface Question {
  readonly quote: Quote
  readonly bank: PcrBank
  readonly signedWith: number
  readonly policy: OfflinePolicy
  readonly pcrValues?: string
  readonly eventLog?: Uint8Array
  readonly ima?: Uint8Array
}

type Values = ReadonlyMap<number, Uint8Array>

/** What PCR 10 is after each entry, from the boot on. */
const progressOf = (entries: readonly ImaEntry[], hash: number): readonly Uint8Array[] => {
  let value = resetValue(imaPcr, hash)
  return entries.map((entry) => (value = afterEntry(value, entry, hash)))
}

const fits = ({ quote, bank, signedWith }: Question, values: Values): boolean =>
  sameBytes(
    quote.pcrDigest,
    quotedDigest(signedWith, bank.pcrs, (pcr) => values.get(pcr) ?? resetValue(pcr, bank.hash)),
  )

/** The values that were given, else those that log and list lead to. Refuses unless they hash to what was quoted. */
const valuesOf = (of: Question, logged: Values | null, entries: readonly ImaEntry[] | null): Values | null => {
  if (of.pcrValues !== undefined) {
    const given = readPcrValues(of.pcrValues, of.bank)
    return fits(of, given) ? given : fail('quote.digest')
  }
  if (logged === null && entries === null) return null
  const base = logged ?? new Map<number, Uint8Array>()
  if (entries === null || !of.bank.pcrs.includes(imaPcr)) return fits(of, base) ? base : fail('log.replay.mismatch')
  const reached = progressOf(entries, of.bank.hash).find((value) => fits(of, new Map([...base, [imaPcr, value]])))
  return reached === undefined ? fail('ima.no-prefix', 'no part of the list leads to the quoted digest') : new Map([...base, [imaPcr, reached]])
}

/** PCRs that only firmware extends: without an event they are as after the reset. */
const firmwarePcrs: readonly number[] = [0, 1, 2, 3, 4, 5, 6, 7]

const checkAgainst = (values: Values, logged: Values, bank: PcrBank, hasIma: boolean): void => {
  for (const pcr of bank.pcrs) {
    const replayed = logged.get(pcr) ?? (firmwarePcrs.includes(pcr) ? resetValue(pcr, bank.hash) : undefined)
    if (replayed === undefined || (pcr === imaPcr && hasIma)) continue
    if (!sameBytes(replayed, values.get(pcr) ?? resetValue(pcr, bank.hash))) fail('log.replay.mismatch', `PCR ${pcr}`)
  }
}

const checkIma = (of: Question, entries: readonly ImaEntry[], values: Values): OfflineMeasured['ima'] => {
  const quoted = values.get(imaPcr)
  if (quoted === undefined || !of.bank.pcrs.includes(imaPcr)) return fail('quote.selection.missing', 'an IMA list needs PCR 10 in the quote')
  const measured = parsed('ima.malformed', () =>
    replayIma(entries, { quoted, hash: of.bank.hash, boot: new Map([[of.bank.hash, values]]), allowViolations: of.policy.ima.violations }),
  )
  const pending = entries.length - measured.length
  if (pending > 0 && of.policy.ima.complete) fail('ima.tail', `${pending} entries`)
  const { files } = of.policy.ima
  if (files !== undefined)
    for (const { path, digest: own } of measuredFiles(entries, measured))
      if (!Object.hasOwn(files, path) || files[path]?.includes(Buffer.from(own).toString('hex')) !== true) fail('ima.file', path.slice(0, 200))
  return { proven: measured.length, pending }
}

const readLog = (log: Uint8Array | undefined): readonly Event[] | null =>
  log === undefined ? null : parsed('log.malformed', () => parseEventLog(log, logLimits))

const checkFirmwarePart = ({ bank, policy }: Question, events: readonly Event[]): void => {
  if (policy.separators === 'none') return
  const { required, closed } = separatorProfiles[policy.separators]
  const quoted = (pcrs: readonly number[]): readonly number[] => pcrs.filter((pcr) => bank.pcrs.includes(pcr))
  parsed('log.malformed', () => checkSeparators(events, { required: quoted(required), closed: quoted(closed) }, bank.hash))
}

/** PCR values, event log and IMA list, each held against the quote. */
export const measuredOffline = (of: Question): OfflineMeasured => {
  const { bank } = of
  const events = readLog(of.eventLog)
  const logged = events === null ? null : parsed('log.bank.missing', () => replay(events, bank.hash))
  const list = of.ima
  const entries = list === undefined ? null : parsed('ima.malformed', () => parseIma(list, imaLimits.offline))
  const values = valuesOf(of, logged, entries)
  if (values !== null && logged !== null) checkAgainst(values, logged, bank, entries !== null)
  if (events !== null) {
    checkData(events, bank.hash)
    checkFirmwarePart(of, events)
  }
  return {
    pcrs:
      values === null
        ? null
        : Object.fromEntries(bank.pcrs.map((pcr) => [String(pcr), Buffer.from(values.get(pcr) ?? resetValue(pcr, bank.hash)).toString('hex')])),
    events: events?.length ?? null,
    ima: entries === null ? null : checkIma(of, entries, values ?? new Map()),
  }
}
