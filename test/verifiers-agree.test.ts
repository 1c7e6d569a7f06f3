import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import type { Attest } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { attestNonce, evidenceTranscript, qualifyingData } from '@fleetkey/protocol/transcript.ts'
import { appraiseOffline } from '@fleetkey/server/attestation/offline.ts'
import { OfflinePolicy } from '@fleetkey/server/attestation/offline-policy.ts'
import { reattest, type AskedOf } from '@fleetkey/server/attestation/reattest.ts'
import { marshalAttest, marshalSignature, parseAttest, parseSignature } from '@fleetkey/tpm2/attest.ts'
import { alg, handle } from '@fleetkey/tpm2/constants.ts'
import { eventType, marshalEventLog, parseEventLog, type Event } from '@fleetkey/tpm2/event-log.ts'
import { nameOf, qualifiedName } from '@fleetkey/tpm2/names.ts'
import { marshalPublic, parsePublic, type EccPublic } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { flip, impostor, quoteBy, zeros } from './evidence.ts'

/** The same evidence before the verifier of the server and before the one that works without it (`attest verify`): the same reason, or none from both. */
const vector = JSON.parse(readFileSync(new URL('vectors/event-logs/ovmf.json', import.meta.url), 'utf8')) as {
  log: string
  pcrs: { sha256: Record<string, string> }
}
const genuineLog = new Uint8Array(Buffer.from(vector.log, 'base64'))
const pcrs = [0, 1, 2, 3, 4, 5, 7]
const bank = { hash: alg.sha256, pcrs }
const ak = impostor()
const { x, y } = parsePublic(impostor().public) as EccPublic
const ek = marshalPublic({ ...templates.ekEcc, x, y })
const asked: AskedOf = {
  tenant: 'plant',
  device: 'gw-1',
  exporter: new Uint8Array(32).fill(1),
  session: new Uint8Array(16).fill(2),
  attest: {
    type: 'attest',
    challenge: new Uint8Array(16).fill(3),
    random: new Uint8Array(32).fill(4),
    selection: [{ hash: 'sha256', pcrs }],
    ima: null,
    firmware: null,
    expires: 1,
  } as Attest,
  ak: ak.public,
  srk: zeros,
  last: null,
  list: null,
}

interface Evidence {
  readonly quote: Uint8Array
  readonly signature: Uint8Array
  readonly eventLog: Uint8Array
}
const nonceFor = (eventLog: Uint8Array): Uint8Array => {
  const { challenge, random } = asked.attest
  return qualifyingData('quote', attestNonce({ ...asked, challenge, random }), evidenceTranscript({ eventLog, ima: null, recipient: null }))
}
const pcrDigest = new Uint8Array(pcrs.reduce((hash, pcr) => hash.update(Buffer.from(vector.pcrs.sha256[pcr] ?? '', 'hex')), createHash('sha256')).digest())
/** A quote of this log by whoever has the AK, with whatever in it. */
const evidence = (of: { readonly eventLog?: Uint8Array; readonly quote?: Parameters<typeof quoteBy>[1] } = {}): Evidence => {
  const eventLog = of.eventLog ?? genuineLog
  return { ...quoteBy(ak, { extraData: nonceFor(eventLog), selection: [bank], pcrDigest, ...of.quote }), eventLog }
}
/** The statement's bytes changed, and signed again. */
const resigned = (change: (quote: Uint8Array) => Uint8Array, from = evidence()): Evidence => {
  const quote = change(from.quote)
  return { ...from, quote, signature: ak.sign(quote) }
}

const online = ({ quote, signature, eventLog }: Evidence): string => {
  try {
    reattest({ type: 'evidence', challenge: asked.attest.challenge, quote: { attest: quote, signature }, eventLog, ima: null, recipient: null }, asked)
    return 'accepted'
  } catch (thrown) {
    if (thrown instanceof Problem && thrown.code === 'attestation-failed') return thrown.reason ?? 'no reason'
    throw thrown
  }
}
const offline = ({ quote, signature, eventLog }: Evidence): string => {
  const nonce = nonceFor(eventLog)
  const policy = OfflinePolicy.parse({ separators: 'pcClient' })
  return appraiseOffline({ ak: ak.public, quote, signature, nonce, selection: bank, eventLog, ek, policy }, Date.UTC(2027, 0, 1)).reason ?? 'accepted'
}

const events = (change: (all: readonly Event[]) => readonly Event[]): Uint8Array => {
  const read = parseEventLog(genuineLog, { maxEvents: 4096, maxBytes: 1 << 20 })
  return marshalEventLog(change(read), [...(read.find(({ digests }) => digests.size > 0)?.digests.keys() ?? [])])
}
const ecdsa = (signature: Uint8Array) => parseSignature(signature) as Extract<ReturnType<typeof parseSignature>, { r: Uint8Array }>
const safe = { clock: 1_000n, resetCount: 5, restartCount: 1, safe: false }
const certify = (): Evidence => resigned((quote) => marshalAttest({ ...parseAttest(quote), type: 'certify', name: zeros, qualifiedName: zeros } as never))

const table: readonly (readonly [string, () => Evidence])[] = [
  ['accepted', () => evidence()],
  ['quote.signature', () => ((of) => ({ ...of, quote: flip(of.quote) }))(evidence())],
  ['quote.signature', () => ((of) => ({ ...of, signature: impostor().sign(of.quote) }))(evidence())],
  ['quote.signature.malformed', () => ((of) => ({ ...of, signature: Uint8Array.from([...of.signature, 0]) }))(evidence())],
  ['quote.signature.scheme', () => ((of) => ({ ...of, signature: marshalSignature({ ...ecdsa(of.signature), hash: alg.sha1 }) }))(evidence())],
  ['quote.signature.range', () => ((of) => ({ ...of, signature: marshalSignature({ ...ecdsa(of.signature), r: zeros }) }))(evidence())],
  ['quote.statement', () => resigned((quote) => Uint8Array.from([...quote, 0]))],
  ['quote.magic', () => resigned((quote) => flip(quote, 0))],
  ['quote.type', () => resigned((quote) => Uint8Array.from([...quote.subarray(0, 4), 0x80, 0x14, ...quote.subarray(6)]))],
  ['quote.type', certify],
  ['quote.nonce', () => evidence({ quote: { extraData: new Uint8Array() } })],
  ['quote.nonce', () => evidence({ quote: { extraData: nonceFor(genuineLog.subarray(1)) } })],
  ['quote.signer', () => evidence({ quote: { qualifiedSigner: qualifiedName(handle.owner, nameOf(ak.public)) } })],
  ['quote.selection.missing', () => evidence({ quote: { selection: [{ hash: alg.sha256, pcrs: [0, 1] }] } })],
  ['quote.selection.resettable', () => evidence({ quote: { selection: [{ hash: alg.sha256, pcrs: [16, 23] }] } })],
  ['quote.selection.bank', () => evidence({ quote: { selection: [{ hash: alg.sha1, pcrs }] } })],
  ['quote.selection.extra-bank', () => evidence({ quote: { selection: [bank, { hash: alg.sha1, pcrs }] } })],
  ['quote.selection.extra', () => evidence({ quote: { selection: [{ hash: alg.sha256, pcrs: [...pcrs, 8] }] } })],
  ['quote.selection.empty', () => evidence({ quote: { selection: [] } })],
  ['quote.selection.duplicate', () => evidence({ quote: { selection: [bank, bank] } })],
  ['quote.clock.unsafe', () => evidence({ quote: { clockInfo: safe } })],
  ['log.replay.mismatch', () => evidence({ quote: { pcrDigest: zeros } })],
  ['log.replay.mismatch', () => evidence({ eventLog: events((all) => all.slice(0, -6)) })],
  ['log.truncated', () => evidence({ eventLog: genuineLog.subarray(0, -3) })],
  ['log.header', () => evidence({ eventLog: flip(genuineLog, 33) })],
  ['log.limit.bytes', () => evidence({ eventLog: new Uint8Array((1 << 20) + 1) })],
  [
    'log.data.mismatch',
    () => evidence({ eventLog: events((all) => all.map((event) => (event.type === 0x8000_0001 ? { ...event, data: flip(event.data) } : event))) }),
  ],
  ['log.no-action.digest', () => evidence({ eventLog: events((all) => all.map((event, at) => (at === 3 ? { ...event, type: eventType.noAction } : event))) })],
]

describe('online and offline verifier', () => {
  test.each(table.map(([want, make], at) => [`${at}: ${want}`, want, make] as const))('%s', (_, want, make) => {
    const of = make()
    expect({ online: online(of), offline: offline(of) }).toEqual({ online: want, offline: want })
  })

  /** Which reasons were met: a property that only ever sees one says little. */
  const agree = (mutated: (at: number, bit: number) => Evidence, length: number): ReadonlySet<string> => {
    const met = new Set<string>()
    fc.assert(
      fc.property(fc.nat(length - 1), fc.nat(7), (at, bit) => {
        const of = mutated(at, bit)
        const reason = online(of)
        met.add(reason)
        expect(offline(of)).toBe(reason)
      }),
      { numRuns: 400 },
    )
    return met
  }
  const flipBit = (bytes: Uint8Array, at: number, bit: number): Uint8Array => bytes.map((byte, index) => (index === at ? byte ^ (1 << bit) : byte))

  test('any bit of a statement, signed again', () => {
    const { quote } = evidence()
    expect(agree((at, bit) => resigned((bytes) => flipBit(bytes, at, bit)), quote.length).size).toBeGreaterThan(6)
  })
  test('any bit of a log, quoted with it', () => {
    expect(agree((at, bit) => evidence({ eventLog: flipBit(genuineLog, at, bit) }), genuineLog.length).size).toBeGreaterThan(2)
  })
  test('any bit of a signature', () => {
    const from = evidence()
    expect(agree((at, bit) => ({ ...from, signature: flipBit(from.signature, at, bit) }), from.signature.length).size).toBeGreaterThan(1)
  })
})
