import { createPublicKey, generateKeyPairSync, randomBytes, randomInt, sign } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { beforeAll, describe, expect, test } from 'vitest'
import { ekCertificate, makeEkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { idevidCertificate, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { chunkFrameMax, reassembler, split } from '@fleetkey/protocol/chunks.ts'
import { DeviceId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body, Envelope, Hello } from '@fleetkey/protocol/messages.ts'
import { derSignature, keyId, rawSignature, readMessage, signMessage, type Signer } from '@fleetkey/protocol/signed.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { makeCsr } from '@fleetkey/protocol/x509/csr.ts'
import { judgeRequest, plainRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { requestOfFile } from '@fleetkey/protocol/x509/request/structure.ts'
import { defaultProfiles, requestPolicyOf } from '@fleetkey/server/ca/profiles.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { checkIdevidCertificate } from '@fleetkey/server/attestation/idevid-certificate.ts'
import { checkSoftwareKey } from '@fleetkey/server/attestation/software-keys.ts'
import { marshalAttest, marshalSignature, parseAttest, parseSignature, type Attest } from '@fleetkey/tpm2/attest.ts'
import { concat } from '@fleetkey/tpm2/bytes.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { eventType, marshalEventLog, parseEventLog, replay, type Event } from '@fleetkey/tpm2/event-log.ts'
import { checkSeparators, knownData, separatorProfiles } from '@fleetkey/tpm2/event-log-rules.ts'
import { imaLimits, marshalIma, parseIma } from '@fleetkey/tpm2/ima.ts'
import { measuredFiles, replayIma } from '@fleetkey/tpm2/ima-replay.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { marshalPublic, parsePublic, spkiOf, type EccPublic } from '@fleetkey/tpm2/structures.ts'
import { mismatch, templates } from '@fleetkey/tpm2/templates.ts'
import { further, generated, honest, p384Request } from './hostile-requests.ts'
import { allocated, outcome, survey } from './mutations.ts'

// Every parser that a peer without identity reaches, under a million hostile inputs each (`npm run test:long`) or a fiftieth of that (`npm test`).
const count = process.env['FLEETKEY_LONG'] === '1' ? 1_000_000 : 20_000
const seed = Number(process.env['FLEETKEY_SEED'] ?? randomInt(1_000_000_000))
process.stdout.write(`mutations: ${count} for each parser from seed ${seed} (FLEETKEY_SEED=${seed} runs them again)\n`)

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
const utf8 = (text: string): Uint8Array => new TextEncoder().encode(text)
const hostile = (bytes: Uint8Array, again: Uint8Array): void => {
  if (Buffer.compare(bytes, again) !== 0) throw new Error(`read as ${hex(again)}`)
}

const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
const signRaw = async (data: Uint8Array): Promise<Uint8Array> => new Uint8Array(sign('sha256', data, { key: privateKey, dsaEncoding: 'ieee-p1363' }))
const signer: Signer = { kid: keyId(spki), sign: signRaw }
const jwk = publicKey.export({ format: 'jwk' })
const point = { x: new Uint8Array(Buffer.from(jwk.x ?? '', 'base64url')), y: new Uint8Array(Buffer.from(jwk.y ?? '', 'base64url')) }
const publicOf = (template: unknown): Uint8Array => marshalPublic({ ...(template as EccPublic), ...point })
const publics = [templates.ekEcc, templates.ak, templates.srk, templates.ldevid, templates.recipient].map(publicOf)
const rsa = marshalPublic(templates.ekRsa)

const statement = {
  qualifiedSigner: randomBytes(34),
  extraData: randomBytes(32),
  clockInfo: { clock: 1n, resetCount: 2, restartCount: 3, safe: true },
  firmwareVersion: 4n,
}
const attests: readonly Attest[] = [
  { type: 'quote', ...statement, selection: [{ hash: alg.sha256, pcrs: [0, 1, 2, 3, 4, 7, 11] }], pcrDigest: randomBytes(32) },
  { type: 'certify', ...statement, name: randomBytes(34), qualifiedName: randomBytes(34) },
]
const ecdsa = concat(Uint8Array.of(0, 0x18, 0, 0x0b, 0, 32), randomBytes(32), Uint8Array.of(0, 32), randomBytes(32))
const rsassa = concat(Uint8Array.of(0, 0x14, 0, 0x0b, 1, 0), randomBytes(256))

const vector = (name: string): { log: string; ima?: { binary: string; ascii: string; pcr10: Record<string, string> } } =>
  JSON.parse(readFileSync(new URL(`vectors/event-logs/${name}.json`, import.meta.url), 'utf8')) as ReturnType<typeof vector>
const base64 = (text: string | undefined): Uint8Array => new Uint8Array(Buffer.from(text ?? '', 'base64'))
const measured = (pcr: number, data: Uint8Array, type: number): Event => ({ pcr, type, digests: new Map([[alg.sha256, digest(alg.sha256, data)]]), data })
const board = marshalEventLog([
  measured(0, utf8('bootloader'), eventType.postCode),
  ...Array.from({ length: 8 }, (_, pcr) => measured(pcr, new Uint8Array(4), eventType.separator)),
  measured(4, utf8('kernel'), eventType.postCode),
])
const startup = concat(utf8('StartupLocality\0'), Uint8Array.of(3))
const remark: Event = { pcr: 0, type: eventType.noAction, digests: new Map([[alg.sha256, new Uint8Array(32)]]), data: startup }
const log = (bytes: Uint8Array): void => {
  const events = parseEventLog(bytes, { maxEvents: 64, maxBytes: 1 << 20 })
  replay(events)
  for (const event of events) knownData(event)
  checkSeparators(events, separatorProfiles.board)
}

const list = vector('ovmf-ima-sig').ima
const plain = vector('ovmf').ima
const firmware = new Map([[alg.sha256, replay(parseEventLog(base64(vector('ovmf-ima-sig').log), { maxEvents: 64, maxBytes: 1 << 20 }))]])
const quoted = new Uint8Array(Buffer.from(list?.pcr10['sha256'] ?? '', 'hex'))
const ima = (bytes: Uint8Array): void => {
  const entries = parseIma(bytes, imaLimits.wire)
  if ((bytes[0] ?? 0) < 0x20) hostile(bytes, marshalIma(entries))
  measuredFiles(entries, replayIma(entries, { quoted, boot: firmware }))
}

const ekCa = makeEkCa(Date.UTC(2026, 0, 1))
const certificates = [ekCa.certificate, ekCertificate(ekCa, spki, Date.UTC(2026, 0, 1))]
const envelope = (body: Body): Envelope => ({
  v: 1,
  tenant: TenantId.parse('plant'),
  device: DeviceId.parse('gw-1'),
  from: 'device',
  id: randomBytes(16),
  seq: 1,
  body,
})
const hello: Hello = {
  type: 'hello',
  serial: 'GW-1',
  purpose: 'enrol',
  presented: {
    method: 'tpm2',
    ekCertificate: certificates[1] ?? null,
    ek: publics[0] ?? rsa,
    ak: publics[1] ?? rsa,
    srk: publics[2] ?? rsa,
    ldevid: publics[3] ?? rsa,
  },
  random: randomBytes(32),
  agent: 'test',
}

const idevid = idevidCertificate(makeIdevidCa(Date.UTC(2026, 0, 1)), spki, 'SE-1', Date.UTC(2026, 0, 1))
const others: readonly Hello['presented'][] = [
  { method: 'idevid', chain: [idevid, ekCa.certificate], ldevid: spki, recipient: spki },
  { method: 'token', token: randomBytes(16), ldevid: spki, recipient: spki },
]

const parts = split(randomBytes(300), randomBytes(16))
const frames = (bytes: Uint8Array): void => {
  const transfer = reassembler({ max: 1 << 20 })
  transfer.begin(parts.manifest)
  transfer.add(bytes)
  if (transfer.pending > parts.manifest.length) throw new Error('holds more than was announced')
}

let messages: readonly Uint8Array[] = []
let requests: readonly Uint8Array[] = []
beforeAll(async () => {
  const hellos = [hello, ...others.map((presented) => ({ ...hello, presented }))]
  messages = await Promise.all([...hellos, parts.manifest].map(async (body) => await signMessage(envelope(body), signer)))
  requests = [await makeCsr({ subject: 'gw-1', spki, sign: signRaw })]
})

/** Everything that a profile could admit: the rarely used parts of the reader are reached. */
const widePolicy = {
  ...plainRequest,
  ...requestPolicyOf(defaultProfiles['device-tls'], { tenant: 'default', subject: 'gw-1' }),
  keys: ['p256', 'p384'] as const,
}
const pem = new TextEncoder().encode(toPem('CERTIFICATE REQUEST', honest(true)))
const wishes: readonly Uint8Array[] = [
  honest(),
  honest(true),
  p384Request(),
  pem,
  // Hostile ones bred with honest ones; those that cost seconds to make are left out.
  ...[...generated, ...further]
    .filter(({ reason }) => !/^csr\.(rsa|size)/.test(reason))
    .map(({ make }) => make())
    .filter(({ length }) => length < 4096),
].map((one) => new Uint8Array(one))

type Row = readonly [string, (bytes: Uint8Array) => unknown, () => readonly Uint8Array[]]
const parsers: readonly Row[] = [
  [
    'TPMT_PUBLIC',
    (bytes) => {
      hostile(bytes, marshalPublic(parsePublic(bytes)))
      mismatch(bytes, 'ak')
      spkiOf(bytes)
    },
    () => [...publics, rsa],
  ],
  ['TPMS_ATTEST', (bytes) => hostile(bytes, marshalAttest(parseAttest(bytes))), () => attests.map(marshalAttest)],
  ['TPMT_SIGNATURE', (bytes) => hostile(bytes, marshalSignature(parseSignature(bytes))), () => [ecdsa, rsassa]],
  ['event log of a board', log, () => [board, marshalEventLog([remark, ...parseEventLog(board, { maxEvents: 64, maxBytes: 1 << 20 })])]],
  ['event log of a real machine', log, () => [base64(vector('ovmf').log), base64(vector('u-boot').log)]],
  ['measurement list, binary', ima, () => [base64(list?.binary), base64(plain?.binary)]],
  ['measurement list, ASCII', ima, () => [utf8(list?.ascii ?? ''), utf8(plain?.ascii ?? '')]],
  ['certificate', parseCertificate, () => certificates],
  ['certification request', (bytes) => judgeRequest(bytes), () => requests],
  [
    'certification request with wishes, DER or PEM',
    (bytes) => {
      const { spki } = judgeRequest(requestOfFile(bytes), widePolicy)
      // What is accepted is a key that OpenSSL reads, in the one encoding.
      hostile(spki, createPublicKey({ key: Buffer.from(spki), format: 'der', type: 'spki' }).export({ format: 'der', type: 'spki' }))
    },
    () => wishes,
  ],
  ['IDevID certificate', checkIdevidCertificate, () => [idevid]],
  ['key in software', (bytes) => checkSoftwareKey('ldevid', bytes), () => [spki]],
  [
    'DER signature',
    (bytes) => rawSignature(bytes),
    () => [derSignature(randomBytes(64)), derSignature(Buffer.concat([Buffer.alloc(32, 0xff), Buffer.alloc(32, 1)]))],
  ],
  ['CBOR', (bytes) => decode(bytes, { useMaps: true }), () => [...parts.frames, ...messages.map((one) => one.subarray(1))]],
  ['signed message', (bytes) => readMessage(bytes, { max: chunkFrameMax }), () => messages],
  ['frame', frames, () => parts.frames],
]

describe.each(parsers)('%s', (name, parse, inputs) => {
  test(`${count} mutants: typed refusals, bounded time and memory`, { timeout: 1_800_000 }, () => {
    const { accepted, refused, slowest } = survey(parse, inputs(), { count, seed })
    const reasons = [...refused].toSorted(([, one], [, other]) => other - one).map(([reason, times]) => `${reason} ${times}`)
    process.stdout.write(`${name}: accepted ${accepted}, slowest ${slowest.toFixed(1)} ms, ${reasons.slice(0, 12).join(', ')}\n`)
    expect(accepted + [...refused.values()].reduce((sum, times) => sum + times, 0)).toBe(count)
    expect(refused.size).toBeGreaterThan(0)
    expect(accepted).toBeLessThan(count)
  })
})

describe('what is announced is not allocated', () => {
  const ff = (length: number): Uint8Array => new Uint8Array(length).fill(0xff)
  const logHeader = marshalEventLog([])
  const quote = marshalAttest(attests[0] as Attest)
  const rows: readonly (readonly [string, (bytes: Uint8Array) => unknown, Uint8Array, string])[] = [
    ['header of an event log', log, concat(logHeader.subarray(0, 28), ff(4)), 'log.header'],
    ['banks of an event log', log, concat(logHeader.subarray(0, 56), ff(4), logHeader.subarray(60)), 'log.bank.count'],
    ['digests of an event', log, concat(logHeader, new Uint8Array(8), ff(4)), 'log.digest.count'],
    ['data of an event', log, concat(marshalEventLog([measured(0, new Uint8Array(0), 1)]).subarray(0, -4), ff(4)), 'log.limit.event'],
    ['template name of a measurement', ima, concat(base64(plain?.binary).subarray(0, 24), ff(4)), 'ima.template'],
    ['data of a measurement', ima, concat(base64(plain?.binary).subarray(0, 34), ff(4)), 'ima.limit.entry'],
    ['buffer of a TPMS_ATTEST', (bytes) => parseAttest(bytes), concat(quote.subarray(0, 6), ff(2)), 'TpmFormatError'],
    ['selections of a quote', (bytes) => parseAttest(bytes), concat(quote.subarray(0, 6 + 36 + 34 + 17 + 8), ff(4)), 'quote.selection.size'],
    ['buffer of a TPMT_SIGNATURE', (bytes) => parseSignature(bytes), concat(ecdsa.subarray(0, 4), ff(2)), 'TpmFormatError'],
    ['policy of a TPMT_PUBLIC', (bytes) => parsePublic(bytes), concat(rsa.subarray(0, 8), ff(2)), 'TpmFormatError'],
    ['DER element of four gigabytes', parseCertificate, concat(Uint8Array.of(0x30, 0x84), ff(4)), 'x509.der'],
    ['DER element of 16 megabytes', (bytes) => judgeRequest(bytes), concat(Uint8Array.of(0x30, 0x83), ff(3)), 'csr.der'],
    ['CBOR bytes', (bytes) => decode(bytes), concat(Uint8Array.of(0x5a), ff(4)), 'cbor.invalid'],
    ['CBOR text', (bytes) => decode(bytes), concat(Uint8Array.of(0x7b, 0), ff(7)), 'cbor.invalid'],
    ['CBOR array', (bytes) => decode(bytes), concat(Uint8Array.of(0x9a), ff(4)), 'cbor.invalid'],
    ['CBOR map', (bytes) => decode(bytes), concat(Uint8Array.of(0xba), ff(4)), 'cbor.invalid'],
    ['array of a message', (bytes) => readMessage(bytes, { max: chunkFrameMax }), concat(Uint8Array.of(0xd2, 0x9a), ff(4)), 'cbor.invalid'],
    ['data of a frame', frames, concat(Uint8Array.of(0x83, 0x50), randomBytes(16), Uint8Array.of(0, 0x5a), ff(4)), 'cbor.invalid'],
  ]
  test.each(rows)('%s', (_, parse, bytes, reason) => {
    expect(outcome(parse, bytes)).toBe(reason)
    const before = allocated()
    for (let times = 0; times < 50; times++) outcome(parse, bytes)
    expect(allocated() - before).toBeLessThan(8 << 20)
  })
})

describe('the survey itself finds', () => {
  const held: Uint8Array[] = []
  const rows: readonly (readonly [string, (bytes: Uint8Array) => unknown, RegExp])[] = [
    ['an error that is no refusal', () => JSON.parse('{'), /no typed refusal/],
    ['a parser that takes its time', () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300), /ms for/],
    ['a parser that believes a length', () => held.push(new Uint8Array(64 << 20)), /bytes for/],
  ]
  test.each(rows)('%s', (_, parse, what) => expect(() => survey(parse, [board], { count: 1, seed })).toThrow(what))

  test('the same run again from its seed', () => {
    const one = survey(log, [board], { count: 500, seed: 7 })
    const other = survey(log, [board], { count: 500, seed: 7 })
    expect([other.accepted, other.refused]).toEqual([one.accepted, one.refused])
  })
})
