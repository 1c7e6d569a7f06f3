import { createHash, createPublicKey, generateKeyPairSync, randomInt, checkPrimeSync } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { rootCertificates } from 'node:tls'
import { beforeAll, describe, expect, test } from 'vitest'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { createBoard, install, type Board } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeEkCa, type EkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { buildRelease, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import type { AnswerOf, BodyOf, HelloOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Claims } from '@fleetkey/server/attestation/claims.ts'
import { continuity, type TpmRecord } from '@fleetkey/server/attestation/continuity.ts'
import { checkEk } from '@fleetkey/server/attestation/ek-template.ts'
import { checkKey } from '@fleetkey/server/attestation/keys.ts'
import { methodOf, type AttestationPolicy } from '@fleetkey/server/attestation/methods.ts'
import { appraiseOffline, type OfflineEvidence } from '@fleetkey/server/attestation/offline.ts'
import { OfflinePolicy } from '@fleetkey/server/attestation/offline-policy.ts'
import { isRoca } from '@fleetkey/protocol/x509/request/roca.ts'
import { marshalAttest, marshalSignature, parseAttest, parseSignature } from '@fleetkey/tpm2/attest.ts'
import { alg, attribute } from '@fleetkey/tpm2/constants.ts'
import { openDeviceKeys, provision, type DeviceKeyBlobs, type DeviceKeys, type KeyBlob } from '@fleetkey/tpm2/device-keys.ts'
import { eventType, marshalEventLog, parseEventLog, type Event } from '@fleetkey/tpm2/event-log.ts'
import { imaLimits, marshalIma, parseIma } from '@fleetkey/tpm2/ima.ts'
import { marshalPublic, parsePublic, type EccPublic, type RsaPublic } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { caseTitles, flip, impostor, nonce, quoteBy, random, zeros, type Impostor } from './evidence.ts'

const now = Date.UTC(2027, 0, 1)
const refusedFor = (reason: string): Problem => expect.objectContaining({ code: 'attestation-failed', reason }) as Problem

type Row = readonly [number, string, () => unknown]
/** One test for each: its number and the reason. What is called must refuse for exactly this reason. */
const numbered = (rows: readonly Row[]): void => {
  const titles = caseTitles(rows)
  test.each(rows.map(([, reason, work], at) => [titles[at], reason, work] as const))('%s', async (_, reason, work) => {
    await expect((async () => await work())()).rejects.toThrow(refusedFor(reason))
  })
}
/** Offline: a verdict instead of a throw. */
const offline = (change: Partial<OfflineEvidence>, ak: Impostor = impostor(), quote = quoteBy(ak)): void => {
  const verdict = appraiseOffline({ ak: ak.public, ...quote, nonce, selection: { hash: alg.sha256, pcrs: [0, 1, 2] }, ...change }, now)
  if (verdict.verdict === 'refused') throw new Problem('attestation-failed', verdict.detail, { reason: verdict.reason })
}

describe('public areas', () => {
  const { fixedTPM, fixedParent, sensitiveDataOrigin, restricted, decrypt, encryptedDuplication, userWithAuth } = attribute
  const without = (bits: number): number => templates.ak.attributes & ~bits
  const ak = (change: Partial<EccPublic>) => (): void => offline({ ak: impostor(change).public })
  const strict = (role: 'ak' | 'srk' | 'ldevid' | 'recipient', change: Partial<EccPublic>, policy?: Uint8Array) => (): void =>
    void checkKey(role, impostor({ ...templates[role], ...change, x: point.x, y: point.y }).public, policy)
  const point = parsePublic(impostor().public) as EccPublic
  const ekOf = (change: Partial<RsaPublic>) => (): void => {
    const jwk = rsa.export({ format: 'jwk' })
    checkEk(marshalPublic({ ...templates.ekRsa, modulus: new Uint8Array(Buffer.from(jwk.n ?? '', 'base64url')), ...change }))
  }
  const rsa = generateKeyPairSync('rsa', { modulusLength: 2048 }).publicKey
  const eccEk = (change: Partial<EccPublic>) => (): void => void checkEk(marshalPublic({ ...templates.ekEcc, x: point.x, y: point.y, ...change }))

  numbered([
    [7, 'ek.attributes.not-restricted', eccEk({ attributes: templates.ekEcc.attributes & ~restricted })],
    [7, 'ek.attributes.user-with-auth', eccEk({ attributes: templates.ekEcc.attributes | userWithAuth })],
    [7, 'ek.policy', eccEk({ authPolicy: zeros })],
    [7, 'ek.symmetric', eccEk({ symmetric: null })],
    [8, 'ek.exponent', ekOf({ exponent: 3 })],
    [8, 'ek.key-size', ekOf({ keyBits: 1024, modulus: new Uint8Array(128).fill(0xff) })],
    [8, 'ek.curve', eccEk({ curve: 0x0010 })],
    [8, 'ek.point', eccEk({ y: flip(point.y) })],
    [8, 'ek.roca', ekOf({ modulus: rocaModulus() })],
    [11, 'ak.attributes.not-fixed-tpm', ak({ attributes: without(fixedTPM) })],
    [12, 'ak.attributes.not-fixed-parent', ak({ attributes: without(fixedParent) })],
    [13, 'ak.attributes.not-sensitive-data-origin', ak({ attributes: without(sensitiveDataOrigin) })],
    [14, 'ak.attributes.not-restricted', ak({ attributes: without(restricted) })],
    [15, 'ak.attributes.decrypt', ak({ attributes: templates.ak.attributes | decrypt })],
    [15, 'ak.attributes.not-sign', ak({ attributes: without(attribute.sign) })],
    [16, 'ak.attributes.encrypted-duplication', ak({ attributes: templates.ak.attributes | encryptedDuplication })],
    [16, 'ak.attributes.admin-with-policy', ak({ attributes: templates.ak.attributes | attribute.adminWithPolicy })],
    [16, 'ak.attributes.reserved', ak({ attributes: templates.ak.attributes | (1 << 30) })],
    [16, 'ak.policy', strict('ak', { authPolicy: zeros })],
    [17, 'ak.scheme', ak({ scheme: null })],
    [17, 'ak.scheme', ak({ scheme: { scheme: alg.ecdsa, hash: alg.sha1 } })],
    [17, 'ak.name-algorithm', ak({ nameAlg: alg.sha1 })],
    [17, 'ak.curve', ak({ curve: 0x0001 })],
    [17, 'ak.curve', ak({ curve: 0x0010 })],
    [17, 'ak.curve', strict('ak', { curve: 0x0004 })],
    [20, 'ak.malformed', () => offline({ ak: Uint8Array.from([...impostor().public, 0]) })],
    [21, 'ldevid.attributes.restricted', strict('ldevid', { attributes: templates.ldevid.attributes | restricted })],
    [21, 'ldevid.attributes.not-fixed-tpm', strict('ldevid', { attributes: templates.ldevid.attributes & ~fixedTPM })],
    [21, 'ldevid.attributes.user-with-auth', strict('ldevid', { authPolicy: zeros }, zeros)],
    [23, 'recipient.attributes.user-with-auth', strict('recipient', { authPolicy: zeros }, zeros)],
    [22, 'srk.attributes.not-restricted', strict('srk', { attributes: templates.srk.attributes & ~restricted })],
    [22, 'srk.attributes.not-fixed-tpm', strict('srk', { attributes: templates.srk.attributes & ~fixedTPM })],
    [22, 'srk.attributes.not-decrypt', strict('srk', { attributes: templates.srk.attributes & ~decrypt })],
    [23, 'recipient.policy', strict('recipient', { authPolicy: random(32), attributes: templates.recipient.attributes & ~userWithAuth }, zeros)],
    [23, 'recipient.point', () => checkKey('recipient', marshalPublic({ ...templates.recipient, x: point.x, y: flip(point.y) }))],
  ])
  test('case 17: ak.key-size', () => {
    const jwk = generateKeyPairSync('rsa', { modulusLength: 1024 }).publicKey.export({ format: 'jwk' })
    const modulus = new Uint8Array(Buffer.from(jwk.n ?? '', 'base64url'))
    const area = marshalPublic({
      ...templates.ekRsa,
      attributes: templates.ak.attributes,
      authPolicy: new Uint8Array(),
      symmetric: null,
      scheme: { scheme: alg.rsassa, hash: alg.sha256 },
      keyBits: 1024,
      modulus,
    })
    expect(() => offline({ ak: area })).toThrow(refusedFor('ak.key-size'))
  })
  test('a key under its policy is accepted with that policy and no other', () => {
    const area = { ...templates.recipient, authPolicy: zeros, attributes: templates.recipient.attributes & ~userWithAuth, x: point.x, y: point.y }
    expect(checkKey('recipient', marshalPublic(area), zeros).name).toHaveLength(34)
    expect(() => checkKey('recipient', marshalPublic(area))).toThrow(refusedFor('recipient.attributes.not-user-with-auth'))
  })
  test('no public RSA key of a well-known CA has the fingerprint of case 8', () => {
    const keys = rootCertificates.map((pem) => createPublicKey(pem)).filter(({ asymmetricKeyType }) => asymmetricKeyType === 'rsa')
    expect(keys.length).toBeGreaterThan(30)
    for (const key of keys) expect(isRoca(new Uint8Array(Buffer.from(key.export({ format: 'jwk' }).n ?? '', 'base64url')))).toBe(false)
  })
})

/** A modulus of two primes k·M + (65537^a mod M), as the broken library made them (1024 bits each, M of the first 126 primes). */
function rocaModulus(): Uint8Array {
  const primes: bigint[] = []
  for (let candidate = 2n; primes.length < 126; candidate++) if (primes.every((prime) => candidate % prime !== 0n)) primes.push(candidate)
  const m = primes.reduce((product, prime) => product * prime, 1n)
  const power = (base: bigint, exponent: number): bigint => {
    let result = 1n
    for (let bit = exponent, square = base; bit > 0; bit = Math.floor(bit / 2), square = (square * square) % m)
      if (bit % 2 === 1) result = (result * square) % m
    return result
  }
  const prime = (): bigint => {
    for (;;) {
      const start = (3n << 1022n) / m + BigInt(randomInt(1 << 20))
      const candidate = start * m + power(65_537n, randomInt(2 ** 40))
      if (candidate.toString(2).length === 1024 && checkPrimeSync(candidate)) return candidate
    }
  }
  return new Uint8Array(Buffer.from((prime() * prime()).toString(16), 'hex'))
}

describe('statements', () => {
  const of =
    (change: Parameters<typeof quoteBy>[1], more: Partial<OfflineEvidence> = {}) =>
    (): void => {
      const ak = impostor()
      offline(more, ak, quoteBy(ak, change))
    }
  const signed = (bytes: (quote: Uint8Array) => Uint8Array) => (): void => {
    const ak = impostor()
    const quote = bytes(quoteBy(ak).quote)
    offline({}, ak, { quote, signature: ak.sign(quote) })
  }
  const signature = (change: (of: Extract<ReturnType<typeof parseSignature>, { r: Uint8Array }>) => Parameters<typeof marshalSignature>[0]) => (): void => {
    const ak = impostor()
    const quote = quoteBy(ak)
    offline({}, ak, {
      ...quote,
      signature: marshalSignature(change(parseSignature(quote.signature) as Extract<ReturnType<typeof parseSignature>, { r: Uint8Array }>)),
    })
  }
  const order = Buffer.from('ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551', 'hex')
  const bank = { hash: alg.sha256, pcrs: [0, 1, 2] }

  test('the quote that all of these differ from is accepted', () => expect(() => offline({})).not.toThrow())
  numbered([
    [20, 'quote.statement', signed((quote) => Uint8Array.from([...quote, 0]))],
    [26, 'quote.magic', signed((quote) => Uint8Array.from([0x00, ...quote.subarray(1)]))],
    [27, 'quote.type', signed((quote) => Uint8Array.from([...quote.subarray(0, 4), 0x80, 0x14, ...quote.subarray(6)]))],
    [
      27,
      'quote.type',
      () => {
        const ak = impostor()
        const attest = parseAttest(quoteBy(ak).quote)
        const quote = marshalAttest({ ...attest, type: 'certify', name: zeros, qualifiedName: zeros } as never)
        offline({}, ak, { quote, signature: ak.sign(quote) })
      },
    ],
    [28, 'quote.nonce', of({ extraData: new Uint8Array() })],
    [28, 'quote.nonce', of({ extraData: Uint8Array.from([...nonce, 0]) })],
    [34, 'quote.selection.empty', of({ selection: [] })],
    [34, 'quote.selection.empty', of({ selection: [{ hash: alg.sha256, pcrs: [] }] })],
    [
      34,
      'quote.selection.size',
      signed((quote) => {
        const at = Buffer.from(quote).indexOf(Buffer.from('00000001000b03', 'hex'))
        return Uint8Array.from([...quote.subarray(0, at + 6), 4, ...quote.subarray(at + 7, at + 10), 0, ...quote.subarray(at + 10)])
      }),
    ],
    [34, 'quote.selection.duplicate', of({ selection: [bank, bank] })],
    [35, 'quote.digest', of({}, { pcrValues: [0, 1, 2].map((pcr) => `${pcr} ${String(pcr).repeat(64)}`).join('\n') })],
    [38, 'quote.clock.unsafe', of({ clockInfo: { clock: 1_000n, resetCount: 5, restartCount: 1, safe: false } })],
    [38, 'tpm.restart-count.lower', of({}, { policy: OfflinePolicy.parse({ last: { resetCount: 5, restartCount: 2 } }) })],
    [39, 'tpm.firmware.denied', of({}, { policy: OfflinePolicy.parse({ endorsement: { deny: [{ manufacturer: '*', firmware: '7.85' }] } }) })],
    [40, 'quote.signature.scheme', signature(({ r, s }) => ({ scheme: alg.ecdsa, hash: alg.sha1, r, s }))],
    [40, 'quote.signature.scheme', signature(({ r }) => ({ scheme: alg.rsassa, hash: alg.sha256, signature: r }))],
    [40, 'quote.signature.range', signature((from) => ({ ...from, r: zeros }))],
    [40, 'quote.signature.range', signature((from) => ({ ...from, s: new Uint8Array(order) }))],
    [40, 'quote.signature.range', signature((from) => ({ ...from, s: Uint8Array.from([1, ...from.s]) }))],
  ])
  test('a clock that is not safe, and a reboot that explains it', () =>
    expect(
      of({ clockInfo: { clock: 1_000n, resetCount: 5, restartCount: 1, safe: false } }, { policy: OfflinePolicy.parse({ last: { resetCount: 4 } }) }),
    ).not.toThrow())
})

describe('continuity', () => {
  const record: TpmRecord = { srk: zeros, resetCount: 7, release: 'r1', quoted: { restartCount: 3, clock: 10_000_000n, clockSafe: true, firmwareVersion: 5n } }
  const claims = { srkPublic: zeros as Uint8Array, resetCount: 8, restartCount: 0, clock: 11_000_000n, clockSafe: true, firmwareVersion: 5n, release: 'r1' }
  const judge = (change: Partial<typeof claims>, updates: { from: string; to: string }[] = []) => continuity(record, { ...claims, ...change }, { updates })
  test.each([
    ['rebooted', {}],
    ['rebooted into another release', { release: 'r2' }],
    ['power was cut: the clock fell within its grace', { clockSafe: false, clock: 6_000_000n }],
    ['within one boot', { resetCount: 7, restartCount: 3, clock: 10_000_001n }],
    ['cleared', { srkPublic: random(32), resetCount: 0, clock: 1n }],
  ])('%s', (_, change) => expect(typeof judge(change)).toBe('string'))
  test('a recorded update of the TPM', () => expect(judge({ firmwareVersion: 6n }, [{ from: '0.0.0.5', to: '0.0.0.6' }])).toBe('same SRK'))
  numbered([
    [38, 'tpm.reset-count.lower', () => judge({ resetCount: 6 })],
    [38, 'tpm.reset-count.unchanged', () => judge({ resetCount: 7, restartCount: 3, release: 'r2' })],
    [38, 'tpm.restart-count.lower', () => judge({ resetCount: 7, restartCount: 2 })],
    [38, 'tpm.clock.back', () => judge({ resetCount: 7, restartCount: 3, clock: 9_000_000n })],
    [38, 'tpm.clock.back', () => judge({ clock: 5_000_000n })],
    [38, 'quote.clock.unsafe', () => judge({ resetCount: 7, restartCount: 3, clockSafe: false })],
    [38, 'quote.clock.unsafe', () => continuity(null, { ...claims, clockSafe: false }, { updates: [] })],
    [39, 'tpm.firmware.changed', () => judge({ firmwareVersion: 6n })],
    [39, 'tpm.firmware.changed', () => judge({ firmwareVersion: 6n }, [{ from: '0.0.0.4', to: '0.0.0.6' }])],
  ])
})

interface Vector {
  readonly log: string
  readonly pcrs: Readonly<Record<string, Readonly<Record<string, string>>>>
  readonly ima?: { readonly binary: string; readonly pcr10: Readonly<Record<string, string>> }
  readonly violated?: { readonly binary: string; readonly pcr10: Readonly<Record<string, string>> }
}
const vector = (name: string): Vector => JSON.parse(readFileSync(new URL(`vectors/event-logs/${name}.json`, import.meta.url), 'utf8')) as Vector
const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, 'base64'))

/** Logs and lists of real boots; the quote is made over the PCRs that their TPM had. */
describe('logs of real boots', () => {
  const firmware = [0, 1, 2, 3, 4, 5, 7]
  const judged = (name: string, change: (log: Uint8Array) => Uint8Array = (log) => log, separators: 'pcClient' | 'none' = 'pcClient'): void => {
    const { log, pcrs } = vector(name)
    const ak = impostor()
    const digest = createHash('sha256')
    for (const pcr of firmware) digest.update(Buffer.from(pcrs['sha256']?.[pcr] ?? '', 'hex'))
    const quote = quoteBy(ak, { selection: [{ hash: alg.sha256, pcrs: firmware }], pcrDigest: new Uint8Array(digest.digest()) })
    offline({ eventLog: change(bytes(log)), selection: { hash: alg.sha256, pcrs: firmware }, policy: OfflinePolicy.parse({ separators }) }, ak, quote)
  }
  const events =
    (change: (events: readonly Event[]) => readonly Event[]) =>
    (log: Uint8Array): Uint8Array => {
      const read = parseEventLog(log, { maxEvents: 4096, maxBytes: 1 << 20 })
      return marshalEventLog(change(read), [...(read.find(({ digests }) => digests.size > 0)?.digests.keys() ?? [])])
    }
  const extra: Event = { pcr: 4, type: eventType.ipl, digests: new Map(), data: zeros }
  const like = (of: Event): Event => ({ ...extra, digests: new Map([...of.digests].map(([hash, value]) => [hash, new Uint8Array(value.length).fill(7)])) })
  const first = (of: readonly Event[], type: number): number => of.findIndex((event) => event.type === type)

  test.each([
    ['ovmf', 'pcClient'],
    ['ovmf-ima-sig', 'pcClient'],
    ['u-boot', 'pcClient'],
    ['laptop', 'none'],
  ] as const)('%s is accepted', (name, separators) => expect(() => judged(name, undefined, separators)).not.toThrow())
  numbered([
    [41, 'log.truncated', () => judged('ovmf', (log) => log.subarray(0, -3))],
    [
      42,
      'log.replay.mismatch',
      () =>
        judged(
          'ovmf',
          events((all) => all.slice(0, -6)),
        ),
    ],
    [42, 'log.replay.mismatch', () => judged('ovmf', () => bytes(vector('u-boot').log))],
    [
      43,
      'log.replay.mismatch',
      () =>
        judged(
          'ovmf',
          events((all) => [...all, like(all[3] ?? extra)]),
        ),
    ],
    [
      44,
      'log.data.mismatch',
      () =>
        judged(
          'ovmf',
          events((all) => all.map((event, at) => (at === first(all, 0x8000_0001) ? { ...event, data: flip(event.data) } : event))),
        ),
    ],
    [
      45,
      'log.no-action.digest',
      () =>
        judged(
          'ovmf',
          events((all) => all.map((event, at) => (at === 3 ? { ...event, type: eventType.noAction } : event))),
        ),
    ],
    [
      45,
      'log.replay.mismatch',
      () =>
        judged(
          'ovmf',
          events((all) =>
            all.map((event, at) =>
              at === 3
                ? { ...event, type: eventType.noAction, digests: new Map([...event.digests].map(([hash, value]) => [hash, new Uint8Array(value.length)])) }
                : event,
            ),
          ),
        ),
    ],
    [46, 'log.limit.bytes', () => judged('ovmf', () => new Uint8Array((1 << 20) + 1))],
    [46, 'log.header', () => judged('ovmf', (log) => flip(log, 33))],
    [46, 'log.bank.missing', () => judged('ovmf', () => marshalEventLog([{ ...extra, digests: new Map([[alg.sha1, new Uint8Array(20)]]) }], [alg.sha1]))],
  ])
  /** A boot that was made up: its own quote fits it. */
  const madeUp = (separators: readonly number[], after: readonly number[] = []): void => {
    const event = (pcr: number, data: Uint8Array, type: number): Event => ({
      pcr,
      type,
      data,
      digests: new Map([[alg.sha256, new Uint8Array(createHash('sha256').update(data).digest())]]),
    })
    const all = [...separators.map((pcr) => event(pcr, new Uint8Array(4), eventType.separator)), ...after.map((pcr) => event(pcr, nonce, eventType.ipl))]
    const values = [0, 1, 2].map((pcr) =>
      all
        .filter((one) => one.pcr === pcr)
        .reduce(
          (value, one) =>
            createHash('sha256')
              .update(value)
              .update(one.digests.get(alg.sha256) ?? zeros)
              .digest(),
          Buffer.alloc(32),
        ),
    )
    const ak = impostor()
    const quote = quoteBy(ak, { pcrDigest: new Uint8Array(createHash('sha256').update(Buffer.concat(values)).digest()) })
    offline({ eventLog: marshalEventLog(all), policy: OfflinePolicy.parse({ separators: 'pcClient' }) }, ak, quote)
  }
  numbered([
    [46, 'log.separator.missing', () => madeUp([0, 1])],
    [46, 'log.separator.duplicate', () => madeUp([0, 1, 2, 2])],
    [46, 'log.after-separator', () => madeUp([0, 1, 2], [0])],
  ])

  const measured = (
    change: (list: ReturnType<typeof parseIma>) => ReturnType<typeof parseIma>,
    policy: object = {},
    keep = (list: Uint8Array): Uint8Array => list,
    of: 'ima' | 'violated' = 'ima',
  ): void => {
    const { log, pcrs, ima: clean, violated } = vector('ovmf')
    const ima = of === 'violated' ? violated : clean
    const pcrValues = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10].map((pcr) => `${pcr} ${pcr === 10 ? ima?.pcr10['sha256'] : pcrs['sha256']?.[pcr]}`).join('\n')
    const selection = { hash: alg.sha256, pcrs: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10] }
    const ak = impostor()
    const digest = createHash('sha256')
    for (const line of pcrValues.split('\n')) digest.update(Buffer.from(line.split(' ')[1] ?? '', 'hex'))
    const list = keep(marshalIma(change(parseIma(bytes(ima?.binary ?? ''), imaLimits.offline))))
    offline(
      { eventLog: bytes(log), ima: list, pcrValues, selection, policy: OfflinePolicy.parse({ ima: policy }) },
      ak,
      quoteBy(ak, { selection: [selection], pcrDigest: new Uint8Array(digest.digest()) }),
    )
  }
  test('a measurement list, and one that went on after the quote', () => {
    expect(() => measured((list) => list)).not.toThrow()
    expect(() => measured((list) => [...list, ...list.slice(-1)])).not.toThrow()
  })
  numbered([
    [48, 'ima.template-hash', () => measured((list) => list.map((entry, at) => (at === 1 ? { ...entry, templateHash: new Uint8Array(20).fill(1) } : entry)))],
    [48, 'ima.boot-aggregate', () => measured((list) => list.slice(1))],
    [48, 'ima.no-prefix', () => measured((list) => list.slice(0, -1))],
    [
      48,
      'ima.truncated',
      () =>
        measured(
          (list) => list,
          {},
          (list) => list.subarray(0, -2),
        ),
    ],
    [48, 'ima.tail', () => measured((list) => [...list, ...list.slice(-1)], { complete: true })],
    [48, 'ima.file', () => measured((list) => list, { files: { '/init': ['00'.repeat(32)] } })],
    [
      48,
      'ima.violation',
      () =>
        measured(
          (list) => list,
          {},
          (list) => list,
          'violated',
        ),
    ],
  ])
})

/** The software TPM and the agent's own code, judged by the method as the server calls it. */
describe('enrolment evidence', () => {
  const release = buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('gateway/1.0.0', new TextEncoder().encode('agent')))
  interface Machine {
    readonly board: Board
    readonly blobs: DeviceKeyBlobs
    readonly keys: DeviceKeys
  }
  let ca: EkCa
  let mine: Machine
  let other: Machine
  let third: Machine
  const make = async (): Promise<Machine> => {
    const tpm = createSoftwareTpm({ random, now: () => now })
    await personalise(tpm, ca, { random, now })
    const board = createBoard({ serial: 'GW-1', tpm, flash: new Flash() })
    install(board, release)
    board.boot()
    const client = new Tpm(board.transport(), { random })
    const blobs = await provision(client)
    return { board, blobs, keys: await openDeviceKeys(client, blobs) }
  }
  beforeAll(async () => {
    ca = makeEkCa(now)
    mine = await make()
    other = await make()
    third = await make()
  })

  interface Change {
    readonly keys?: DeviceKeys
    readonly presented?: (of: HelloOf<'tpm2'>['presented']) => HelloOf<'tpm2'>['presented']
    readonly proven?: (of: AnswerOf<'tpm2'>['proven']) => AnswerOf<'tpm2'>['proven']
    readonly answer?: (of: BodyOf<'answer'>) => BodyOf<'answer'>
    readonly tenant?: string
    readonly exporter?: Uint8Array
    readonly secret?: Uint8Array
    readonly policy?: Partial<AttestationPolicy>
  }
  /** The same area around a key that is in no TPM. */
  const elsewhere = (area: Uint8Array): Uint8Array => {
    const { x, y } = parsePublic(impostor().public) as EccPublic
    return marshalPublic({ ...(parsePublic(area) as EccPublic), x, y })
  }
  /** The key that approves firmware, as the TPM would load it. */
  const approving = elsewhere(marshalPublic(templates.ldevid))
  /** One enrolment from hello to claims; what the server computes stays the server's. */
  const enrol = async (change: Change = {}): Promise<Claims> => {
    const keys = change.keys ?? mine.keys
    const attester = tpm2Attester(keys)
    const made = await attester.hello({ serial: 'GW-1', purpose: 'enrol', random: random(32), agent: 'test' })
    const hello = { ...made, presented: change.presented?.(made.presented) ?? made.presented }
    const method = methodOf(hello.presented)
    const policy: AttestationPolicy = { requireEkCertificate: true, ...change.policy }
    const endorsements = [{ certificate: ca.certificate, subject: 'simulator', test: true }]
    method.present(hello, endorsements, policy, now)
    const secret = random(32)
    const challenge: BodyOf<'challenge'> = {
      type: 'challenge',
      challenge: random(16),
      hello: random(32),
      random: random(32),
      demanded: method.demand(hello, {
        share: () => new Secret(secret),
        random,
        selection: [{ hash: 'sha256', pcrs: [0, 1, 2, 3, 4, 5, 7, 11] }],
        firmware: { signer: approving, ref: random(32) },
      }),
      expires: now,
    }
    const tls = newTlsKey()
    const exporter = random(32)
    const around = { tenant: 'plant', hello, helloBytes: random(100), challenge, challengeBytes: random(100), exporter }
    const answered = await attester.answer({ ...around, eventLog: mine.board.eventLog(), tls: { spki: tls.spki, csr: await tlsCsr(tls, 'GW-1') } })
    const proven = { ...answered, proven: change.proven?.(answered.proven) ?? answered.proven }
    const evidence = { ...around, answer: change.answer?.(proven) ?? proven }
    const expected = { tenant: change.tenant ?? 'plant', exporter: change.exporter ?? exporter, secret: new Secret(change.secret ?? secret), policy }
    return method.verify(evidence, expected, endorsements, now)
  }
  const guessing =
    (keys: DeviceKeys): DeviceKeys['activate'] =>
    async (credential) => {
      await expect(keys.activate(credential)).rejects.toThrow()
      return random(32)
    }
  const publics = (change: Partial<DeviceKeys['publics']>): DeviceKeys => ({ ...mine.keys, publics: { ...mine.keys.publics, ...change } })
  const software = (role: 'srk' | 'ldevid'): Uint8Array => elsewhere(marshalPublic(templates[role]))
  /** The board is power-cycled after the quote, and its keys are opened again for the certifications. */
  const resetBetween = (): DeviceKeys => {
    let after: DeviceKeys | undefined
    return {
      ...third.keys,
      async quote(selection, data) {
        const quote = await third.keys.quote(selection, data)
        third.board.boot()
        after = await openDeviceKeys(new Tpm(third.board.transport(), { random }), third.blobs)
        return quote
      },
      certify: async (role, data) => await (after ?? third.keys).certify(role, data),
      sign: async (data) => await (after ?? third.keys).sign(data),
    }
  }
  /** The recipient key is in software; the AK certifies the one that the TPM made in its place. */
  const softwareRecipient = (): DeviceKeys => {
    let inTpm: KeyBlob | undefined
    return {
      ...mine.keys,
      async make(policy) {
        const made = await mine.keys.make(policy)
        inTpm = made.recipient
        return { ...made, recipient: { ...made.recipient, public: elsewhere(made.recipient.public) } }
      },
      certify: async (key, data) => await mine.keys.certify(typeof key === 'string' ? key : (inTpm ?? key), data),
    }
  }
  const csrOf = async (): Promise<Uint8Array> => await tlsCsr(newTlsKey(), 'GW-1')

  test('a genuine device is proven', async () => expect(await enrol()).toMatchObject({ assurance: 'simulated', manufacturer: 'id:464B534D', clockSafe: true }))
  numbered([
    [1, 'ek.cert.missing', async () => await enrol({ presented: (of) => ({ ...of, ekCertificate: null }) })],
    [3, 'ek.cert.other-key', async () => await enrol({ keys: { ...mine.keys, ekCertificate: other.keys.ekCertificate } })],
    [18, 'credential.proof', async () => await enrol({ secret: random(32) })],
    [18, 'credential.proof', async () => await enrol({ proven: (of) => ({ ...of, proof: random(32) }) })],
    [
      19,
      'credential.proof',
      async () =>
        await enrol({
          keys: {
            ...other.keys,
            publics: { ...other.keys.publics, ek: mine.keys.publics.ek },
            ekName: mine.keys.ekName,
            ekCertificate: mine.keys.ekCertificate,
            activate: guessing(mine.keys),
          },
        }),
    ],
    [19, 'credential.proof', async () => await enrol({ keys: { ...publics({ ak: other.keys.publics.ak }), activate: guessing(mine.keys) } })],
    [
      21,
      'ldevid.nonce',
      async () => await enrol({ keys: { ...mine.keys, certify: async (role, data) => await mine.keys.certify(role, role === 'ldevid' ? random(32) : data) } }),
    ],
    [21, 'ldevid.nonce', async () => await enrol({ proven: (of) => ({ ...of, certify: { ...of.certify, ldevid: of.certify.recipient } }) })],
    [21, 'csr.ldevid', async () => await enrol({ keys: { ...mine.keys, sign: async () => random(64) } })],
    [
      27,
      'ldevid.type',
      async () =>
        await enrol({
          keys: {
            ...mine.keys,
            certify: async (role, data) =>
              role === 'ldevid' ? await mine.keys.quote([{ hash: 'sha256', pcrs: [0] }], data) : await mine.keys.certify(role, data),
          },
        }),
    ],
    [
      21,
      'ldevid.name',
      async () => await enrol({ keys: { ...mine.keys, certify: async (key, data) => await mine.keys.certify(key === 'ldevid' ? 'srk' : key, data) } }),
    ],
    [21, 'csr.tls.binding', async () => await enrol({ answer: (of) => ({ ...of, binding: flip(of.binding) }) })],
    [22, 'key.parent-not-certified', async () => await enrol({ keys: publics({ srk: software('srk') }) })],
    [
      22,
      'key.parent-not-certified',
      async () => await enrol({ keys: { ...mine.keys, certify: async (key, data) => await mine.keys.certify(key === 'srk' ? 'ldevid' : key, data) } }),
    ],
    [23, 'recipient.name', async () => await enrol({ keys: softwareRecipient() })],
    [23, 'recipient.point', async () => await enrol({ proven: (of) => ({ ...of, recipient: flip(of.recipient) }) })],
    [36, 'quote.signature', async () => await enrol({ keys: { ...mine.keys, quote: other.keys.quote } })],
    [38, 'tpm.reset-count.changed', async () => await enrol({ keys: resetBetween() })],
    [
      39,
      'tpm.firmware.below-floor',
      async () =>
        await enrol({ policy: { endorsement: { deny: [], floors: [{ manufacturer: 'id:464B534D', minimum: '60000.0' }], updates: [], manufacturers: null } } }),
    ],
    [51, 'credential.proof', async () => await enrol({ exporter: random(32) })],
    [51, 'credential.proof', async () => await enrol({ tenant: 'another' })],
  ])
  test('case 21: csr.ldevid.other-key', async () => {
    const csr = await csrOf()
    // The transcript covers the request: the proof of activation is made over the exchanged one, as an attacker who owns the agent would.
    const attack = enrol({ answer: (of) => ({ ...of, csr: { ...of.csr, ldevid: csr } }) })
    await expect(attack).rejects.toThrow(refusedFor('credential.proof'))
    const { checkRequests } = await import('@fleetkey/server/attestation/requests.ts')
    const answer = { csr: { ldevid: csr, tls: csr }, challenge: random(16), binding: random(64) } as unknown as BodyOf<'answer'>
    expect(() => checkRequests(answer, checkKey('ldevid', mine.keys.publics.ldevid), 'plant')).toThrow(refusedFor('csr.ldevid.other-key'))
  })
})
