import { createHash, randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { progressAfter, catchUpLimits, checkIma, fromBoot, type FileList, type ImaAnswer, type ImaProgress } from '@fleetkey/server/attestation/ima.ts'
import type { ImaClaims } from '@fleetkey/server/attestation/claims.ts'
import { quotedDigest, readLog } from '@fleetkey/server/attestation/event-log.ts'
import type { Quote } from '@fleetkey/server/attestation/quote.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { imaEntry, imaLimits, marshalIma, parseIma, type ImaEntry } from '@fleetkey/tpm2/ima.ts'
import { afterEntry } from '@fleetkey/tpm2/ima-replay.ts'
import { imaPart } from '@fleetkey/tpm2/ima-part.ts'

interface List {
  readonly binary: string
  readonly pcr10: Readonly<Record<string, string>>
}
const vector = (name: string): { readonly log: string; readonly ima: List; readonly violated: List } =>
  JSON.parse(readFileSync(new URL(`vectors/event-logs/${name}.json`, import.meta.url), 'utf8')) as ReturnType<typeof vector>
const base64 = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, 'base64'))
const hex = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, 'hex'))

/** A real boot: OVMF, Linux 6.1, ima_policy=tcb. */
const boot = vector('ovmf')
const pcrs = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
const bank = { hash: alg.sha256, pcrs }
const logged = readLog(base64(boot.log), bank)
const entriesOf = (list: List): readonly ImaEntry[] => parseIma(base64(list.binary), imaLimits.wire)
const clean = entriesOf(boot.ima)
const violated = entriesOf(boot.violated)

/** A quote of that boot with this PCR 10. */
const quoteOf = (pcr10: Uint8Array, counters = { resetCount: 7, restartCount: 0 }): Quote => ({
  type: 'quote',
  qualifiedSigner: new Uint8Array(34),
  extraData: new Uint8Array(32),
  clockInfo: { ...counters, clock: 1n, safe: true },
  firmwareVersion: 1n,
  selection: [bank],
  pcrDigest: quotedDigest(alg.sha256, pcrs, (pcr) => (pcr === 10 ? pcr10 : logged.valueOf(pcr))),
})
const after = (list: List): Uint8Array => hex(list.pcr10['sha256'] ?? '')

interface Round {
  readonly list: readonly ImaEntry[] | Uint8Array
  readonly pcr10: Uint8Array
  readonly progress?: ImaProgress
  readonly release?: FileList | null
  readonly counters?: { resetCount: number; restartCount: number }
}
const round = ({ list, pcr10, progress = fromBoot, release = null, counters }: Round): ImaAnswer =>
  checkIma({
    list: list instanceof Uint8Array ? list : marshalIma(list),
    quote: quoteOf(pcr10, counters),
    signedWith: alg.sha256,
    logged,
    progress,
    release,
  })
const claims = (answer: ImaAnswer): ImaClaims => {
  if (!answer.reached) throw new Error('not reached')
  return answer.claims
}
const progress = (answer: ImaAnswer): ImaProgress => {
  if (answer.reached) throw new Error('reached')
  return answer.progress
}
const reasonOf = (run: () => unknown): string | undefined => {
  try {
    run()
  } catch (error) {
    if (error instanceof Problem) return error.reason
    throw error
  }
  return undefined
}
/** Asks again and again, as the server does; the device always sends this. */
const reasonInTheEnd = (list: readonly ImaEntry[], pcr10: Uint8Array): string | undefined =>
  reasonOf(() => {
    for (let now = fromBoot, sent = false; ; sent = true) now = progress(round({ list: sent ? [] : list, pcr10, progress: now }))
  })
const digestOf = (entry: ImaEntry | undefined): string => Buffer.from(entry?.digest ?? []).toString('hex')

describe('the list of a real boot', () => {
  test('leads to what was quoted', () => {
    expect(claims(round({ list: clean, pcr10: after(boot.ima) }))).toEqual({
      entries: clean.length,
      value: boot.ima.pcr10['sha256'],
      pending: 0,
      violations: 0,
      comparedWith: null,
      unlisted: 0,
      firstUnlisted: null,
    })
  })

  test('longer than what was quoted: the part that leads there counts, the rest is pending', () => {
    expect(claims(round({ list: violated, pcr10: after(boot.ima) }))).toMatchObject({
      entries: clean.length,
      pending: violated.length - clean.length,
      violations: 0,
    })
  })

  test('the next attestation of the same boot goes on where the last ended', () => {
    const ima = claims(round({ list: clean, pcr10: after(boot.ima) }))
    const known = progressAfter({ pcrs: {}, events: 0, resetCount: 7, restartCount: 0, clockSafe: true, clock: 1n, firmwareVersion: 1n, ima })
    expect(known.entries).toBe(clean.length)
    expect(claims(round({ list: [], pcr10: after(boot.ima), progress: known }))).toEqual(ima)
    expect(claims(round({ list: violated.slice(clean.length), pcr10: after(boot.violated), progress: known }))).toMatchObject({
      entries: violated.length,
      violations: 1,
    })
  })

  test.each([
    ['resetCount', { resetCount: 8, restartCount: 0 }],
    ['restartCount', { resetCount: 7, restartCount: 1 }],
  ])('another %s: everything is asked for again', (_name, counters) => {
    const known = { ...fromBoot, boot: { resetCount: 7, restartCount: 0 }, value: after(boot.ima), entries: clean.length }
    const next = progress(round({ list: violated.slice(clean.length), pcr10: after(boot.violated), progress: known, counters }))
    expect(next).toMatchObject({ entries: 0, value: null, boot: null })
    expect(claims(round({ list: violated, pcr10: after(boot.violated), progress: next, counters })).entries).toBe(violated.length)
  })

  test('in as many parts as it takes; nothing counts before the quoted value is reached', () => {
    const parts = [clean.slice(0, 2), clean.slice(2, 3), clean.slice(3)]
    let known = fromBoot
    // Of a list that was cut: a short one has ended, and must explain the quote before it.
    for (const part of parts.slice(0, -1)) known = { ...progress(round({ list: part, pcr10: after(boot.ima), progress: known })), awaited: null }
    expect(claims(round({ list: parts.at(-1) ?? [], pcr10: after(boot.ima), progress: known })).entries).toBe(clean.length)
  })

  test('a machine that never holds still: each list explains the quote before it', () => {
    const later = [...clean, imaEntry('/a', new Uint8Array(32)), imaEntry('/b', new Uint8Array(32))]
    let value: Uint8Array = new Uint8Array(32)
    const values = later.map((entry) => (value = afterEntry(value, entry, alg.sha256)))
    // What was quoted is always one entry ahead of what was read.
    const known = progress(round({ list: clean.slice(0, -1), pcr10: values[clean.length - 1] ?? value }))
    expect(claims(round({ list: later.slice(clean.length - 1, -1), pcr10: value, progress: known }))).toMatchObject({ entries: clean.length, pending: 1 })
    // And one that explains both counts to the newer.
    expect(claims(round({ list: later.slice(clean.length - 1), pcr10: value, progress: known }))).toMatchObject({ entries: later.length, pending: 0 })
  })

  test('files are compared with what the release lists, by digest alone', () => {
    const files = new Set(clean.slice(1).map(digestOf))
    const release = { id: 'gateway/1.0.0', files }
    expect(claims(round({ list: clean, pcr10: after(boot.ima), release }))).toMatchObject({ comparedWith: 'gateway/1.0.0', unlisted: 0 })
    const gone = digestOf(clean.at(-1))
    files.delete(gone)
    expect(claims(round({ list: clean, pcr10: after(boot.ima), release }))).toMatchObject({
      unlisted: 1,
      firstUnlisted: expect.stringMatching(`^${gone} called`) as string,
    })
    // Without a list nothing is compared.
    expect(claims(round({ list: clean, pcr10: after(boot.ima), release: { id: 'gateway/1.0.0', files: null } }))).toMatchObject({ unlisted: 0 })
  })

  test('what was compared with another release is compared again, from the beginning', () => {
    const known = { ...fromBoot, boot: { resetCount: 7, restartCount: 0 }, value: after(boot.ima), entries: clean.length, comparedWith: 'gateway/1.0.0' }
    expect(progress(round({ list: [], pcr10: after(boot.ima), progress: known, release: { id: 'gateway/2.0.0', files: null } })).entries).toBe(0)
  })
})

describe('refused', () => {
  const ima = after(boot.ima)
  const changed = (at: number, change: (entry: ImaEntry) => ImaEntry): readonly ImaEntry[] =>
    clean.map((entry, index) => (index === at ? change(entry) : entry))
  const other = imaEntry('/bin/busybox', new Uint8Array(32).fill(7))

  test('ima.no-prefix: an entry edited with its template hash, removed, inserted, or two exchanged', () => {
    for (const list of [
      changed(2, () => other),
      clean.toSpliced(2, 1),
      clean.toSpliced(2, 0, other),
      [...clean.slice(0, 2), clean[3], clean[2], ...clean.slice(4)],
    ])
      expect(reasonInTheEnd(list as readonly ImaEntry[], ima)).toBe('ima.no-prefix')
  })

  test('ima.no-prefix: a list without an end is not waited for', () => {
    expect(reasonInTheEnd(clean.slice(0, -1), ima)).toBe('ima.no-prefix')
    expect(reasonInTheEnd([], ima)).toBe('ima.no-prefix')
  })

  test('ima.template-hash: the fields of another file under the measurement of this one', () => {
    expect(reasonOf(() => round({ list: changed(2, (entry) => ({ ...entry, templateData: other.templateData })), pcr10: ima }))).toBe('ima.template-hash')
  })

  test('ima.boot-aggregate: the list of another boot, or without its beginning', () => {
    expect(reasonOf(() => round({ list: clean.slice(1), pcr10: ima }))).toBe('ima.boot-aggregate')
    expect(reasonOf(() => round({ list: changed(0, () => imaEntry('boot_aggregate', new Uint8Array(32))), pcr10: ima }))).toBe('ima.boot-aggregate')
  })

  test('ima.boot-aggregate: a log that only the last answer has', () => {
    const known = progress(round({ list: clean.slice(0, 2), pcr10: ima }))
    const lied = { ...known, aggregate: { path: 'boot_aggregate', violation: false, hash: alg.sha256, digest: new Uint8Array(32) } }
    expect(reasonOf(() => round({ list: clean.slice(2), pcr10: ima, progress: lied }))).toBe('ima.boot-aggregate')
  })

  test('ima.truncated, ima.template, ima.pcr: what is no list of these templates', () => {
    const bytes = base64(boot.ima.binary)
    expect(reasonOf(() => round({ list: bytes.subarray(0, -1), pcr10: ima }))).toBe('ima.truncated')
    const template = Uint8Array.from(bytes)
    template.set(Buffer.from('ima-xx'), 28)
    expect(reasonOf(() => round({ list: template, pcr10: ima }))).toBe('ima.template')
    expect(reasonOf(() => round({ list: Uint8Array.of(11, ...bytes.subarray(1)), pcr10: ima }))).toBe('ima.pcr')
  })

  test('ima.limit.entries: a list without end', () => {
    const full = marshalIma(Array.from({ length: 12_000 }, (_, at) => imaEntry(`/usr/share/${'x'.repeat(60)}/${at}`, new Uint8Array(32).fill(at))))
    expect(full.length).toBeGreaterThan(imaLimits.wire.maxBytes / 2)
    const started = progress(round({ list: clean, pcr10: hex('00'.repeat(32)) }))
    const never = hex('00'.repeat(32))
    const next = progress(round({ list: full, pcr10: never, progress: started }))
    expect([next.entries, next.rounds]).toEqual([clean.length + 12_000, 2])
    expect(reasonOf(() => round({ list: full, pcr10: never, progress: { ...next, entries: catchUpLimits.entries } }))).toBe('ima.limit.entries')
    expect(reasonOf(() => round({ list: full, pcr10: never, progress: { ...next, rounds: catchUpLimits.rounds } }))).toBe('ima.limit.entries')
  })
})

describe('the part of a list that an agent sends', () => {
  const bytes = base64(boot.ima.binary)
  async function* inPieces(of: Uint8Array, size: number) {
    for (let at = 0; at < of.length; at += size) yield of.subarray(at, at + size)
  }
  const read = async (of: Uint8Array, from: number, max = 1 << 20, size = 7) => await imaPart(inPieces(of, size), from, max)

  test('is whole entries from the one that is asked for, whatever pieces it comes in', async () => {
    for (const size of [1, 7, 64, 1 << 20])
      for (const from of [0, 1, 4, clean.length, clean.length + 5]) {
        const part = await read(bytes, from, 1 << 20, size)
        expect(part.ended).toBe(true)
        expect(Buffer.compare(part.list, marshalIma(clean.slice(from)))).toBe(0)
      }
  })

  test('is no longer than what a message holds, and no entry is cut', async () => {
    for (const max of [200, 500, 1000]) {
      let got: readonly ImaEntry[] = []
      for (let rounds = 0; rounds < 100; rounds++) {
        const part = await read(bytes, got.length, max)
        expect(part.list.length).toBeLessThanOrEqual(max)
        got = [...got, ...parseIma(part.list, imaLimits.wire)]
        if (part.ended) break
      }
      expect(Buffer.compare(marshalIma(got), bytes)).toBe(0)
    }
  })

  test('of something that cannot be cut into entries is what stands there: the verifier says what it is', async () => {
    const foreign = new Uint8Array(randomBytes(300)).fill(0xee, 0, 4)
    const part = await read(Buffer.concat([bytes, foreign]), 2)
    expect(part.ended).toBe(false)
    const known = { ...fromBoot, boot: { resetCount: 7, restartCount: 0 }, value: after(boot.ima), entries: 2 }
    expect(reasonOf(() => round({ list: part.list, pcr10: after(boot.violated), progress: known }))).toBe('ima.pcr')
  })
})

test('what a simulated kernel writes is what a real one does', () => {
  const file = clean[2]
  const made = imaEntry(file?.path ?? '', file?.digest ?? new Uint8Array())
  expect(Buffer.compare(marshalIma([made]), marshalIma(clean.slice(2, 3)))).toBe(0)
  expect(createHash('sha1').update(made.templateData).digest()).toEqual(Buffer.from(file?.templateHash ?? []))
})
