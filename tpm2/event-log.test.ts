import { createHash } from 'node:crypto'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { ascii, concat, TpmFormatError } from './bytes.ts'
import { alg } from './constants.ts'
import { eventType, marshalEventLog, parseEventLog, pcrDigest, replay, resetValue, type Event } from './event-log.ts'
import { checkSeparators, knownData, separatorProfiles, type SeparatorProfile } from './event-log-rules.ts'
import { digest } from './kdf.ts'
import { le16, le32 } from './little-endian.ts'

const runs = process.env['FLEETKEY_LONG'] === '1' ? 20_000 : 300
const limits = { maxEvents: 100, maxBytes: 1 << 20 }
const hex = (bytes: Uint8Array | undefined): string => Buffer.from(bytes ?? []).toString('hex')
const reasonOf = (run: () => unknown): string | undefined => {
  try {
    run()
    return 'accepted'
  } catch (error) {
    if (error instanceof TpmFormatError) return error.reason
    throw error
  }
}

const zeros = new Uint8Array(4)
const measured = (pcr: number, data: Uint8Array, type: number = eventType.postCode, banks: readonly number[] = [alg.sha256]): Event => ({
  pcr,
  type,
  digests: new Map(banks.map((hash) => [hash, digest(hash, data)])),
  data,
})
const remark = (pcr: number, data: Uint8Array, banks: readonly number[] = [alg.sha256]): Event => ({
  pcr,
  type: eventType.noAction,
  digests: new Map(banks.map((hash) => [hash, new Uint8Array(digest(hash).length)])),
  data,
})
const locality = (value: number): Uint8Array => concat(ascii('StartupLocality\0'), Uint8Array.of(value))
const separator = (pcr: number, data: Uint8Array = zeros): Event => measured(pcr, data, eventType.separator)
const separators = Array.from({ length: 8 }, (_, pcr) => separator(pcr))
const booted: readonly Event[] = [measured(0, ascii('bootloader')), measured(1, ascii('config')), ...separators, measured(4, ascii('kernel'))]
const log = marshalEventLog(booted)
const parse = (bytes: Uint8Array) => parseEventLog(bytes, limits)

/** The header event with this Spec ID event in it. */
const header = (specId: Uint8Array, of: { pcr?: number; type?: number; hash?: Uint8Array } = {}): Uint8Array =>
  concat(le32(of.pcr ?? 0), le32(of.type ?? eventType.noAction), of.hash ?? new Uint8Array(20), le32(specId.length), specId)
const specId = (of: { signature?: string; version?: readonly number[]; count?: number; banks?: Uint8Array; vendor?: Uint8Array } = {}): Uint8Array =>
  concat(
    ascii(of.signature ?? 'Spec ID Event03\0'),
    le32(0),
    Uint8Array.from(of.version ?? [0, 2, 0, 2]),
    le32(of.count ?? 1),
    of.banks ?? concat(le16(alg.sha256), le16(32)),
    of.vendor ?? Uint8Array.of(0),
  )
const sha256Bank = (size: number): Uint8Array => concat(le16(alg.sha256), le16(size))
const event = (of: { pcr?: number; count?: number; digests?: Uint8Array; size?: number; data?: Uint8Array } = {}): Uint8Array =>
  concat(
    le32(of.pcr ?? 0),
    le32(eventType.postCode),
    le32(of.count ?? 1),
    of.digests ?? concat(le16(alg.sha256), new Uint8Array(32)),
    le32(of.size ?? of.data?.length ?? 0),
    of.data ?? new Uint8Array(0),
  )
const oneBank = header(specId())
const twoBanks = header(specId({ count: 2, banks: concat(le16(alg.sha1), le16(20), sha256Bank(32)) }))

describe('refused by name', () => {
  test.each<[string, Uint8Array, string]>([
    ['nothing', new Uint8Array(0), 'log.truncated'],
    ['case 41: cut inside an event', log.subarray(0, -1), 'log.truncated'],
    ['case 41: cut inside the header', log.subarray(0, 40), 'log.truncated'],
    ['case 41: data longer than the log', concat(oneBank, event({ size: 5, data: new Uint8Array(4) })), 'log.truncated'],
    [
      'a log of TPM 1.2',
      concat(header(ascii('Spec ID Event00\0'), { hash: new Uint8Array(20).fill(1) }), header(ascii('BIOS'), { type: 1 })),
      'log.sha1-format',
    ],
    [
      'another signature',
      concat(header(specId({ signature: 'Spec ID Event04\0' })), event({ digests: concat(le16(alg.sha256), new Uint8Array(32).fill(0xff)) })),
      'log.header',
    ],
    ['no header', concat(le32(77), le32(1), new Uint8Array(20), le32(0)), 'log.header'],
    ['a header that measures', header(specId(), { hash: new Uint8Array(20).fill(1) }), 'log.header'],
    ['a header in another PCR', header(specId(), { pcr: 1 }), 'log.header'],
    ['another version', header(specId({ version: [0, 1, 2, 2] })), 'log.header'],
    ['another integer size', header(specId({ version: [0, 2, 0, 3] })), 'log.header'],
    ['bytes after the header', header(concat(specId(), Uint8Array.of(0))), 'log.header'],
    ['a huge header', concat(le32(0), le32(3), new Uint8Array(20), le32(0x7fff_ffff)), 'log.header'],
    ['no bank', header(specId({ count: 0, banks: new Uint8Array(0) })), 'log.bank.count'],
    ['case 46: four thousand million banks', header(specId({ count: 0xffff_ffff })), 'log.bank.count'],
    ['a bank twice', header(specId({ count: 2, banks: concat(sha256Bank(32), sha256Bank(32)) })), 'log.bank.duplicate'],
    ['case 46: a digest size that is not the algorithm’s', header(specId({ banks: sha256Bank(20) })), 'log.digest.size'],
    ['case 46: a digest size of zero', header(specId({ banks: concat(le16(0x12), le16(0)) })), 'log.digest.size'],
    ['case 46: a digest of a bank that was not announced', concat(oneBank, event({ digests: concat(le16(alg.sha1), new Uint8Array(20)) })), 'log.bank.unknown'],
    ['case 46: fewer digests than banks', concat(twoBanks, event()), 'log.digest.count'],
    ['case 46: four thousand million digests', concat(oneBank, event({ count: 0xffff_ffff })), 'log.digest.count'],
    [
      'two digests of a bank',
      concat(twoBanks, event({ count: 2, digests: concat(le16(alg.sha256), new Uint8Array(32), le16(alg.sha256), new Uint8Array(32)) })),
      'log.bank.duplicate',
    ],
    ['PCR 24', concat(oneBank, event({ pcr: 24 })), 'log.pcr'],
    ['PCR 4294967295', concat(oneBank, event({ pcr: 0xffff_ffff })), 'log.pcr'],
    ['case 46: four gigabytes of data', concat(oneBank, event({ size: 0xffff_ffff })), 'log.limit.event'],
    ['case 46: more data than any event has', concat(oneBank, event({ data: new Uint8Array((64 << 10) + 1) })), 'log.limit.event'],
    ['case 45: an EV_NO_ACTION with a digest', marshalEventLog([{ ...measured(4, ascii('kernel')), type: eventType.noAction }]), 'log.no-action.digest'],
    ['a startup locality of another PCR', marshalEventLog([remark(1, locality(3))]), 'log.startup-locality'],
    ['a startup locality that is none', marshalEventLog([remark(0, locality(1))]), 'log.startup-locality'],
    ['a startup locality of two bytes', marshalEventLog([remark(0, concat(locality(3), Uint8Array.of(0)))]), 'log.startup-locality'],
    ['a startup locality of no byte', marshalEventLog([remark(0, ascii('StartupLocality\0'))]), 'log.startup-locality'],
    ['two startup localities', marshalEventLog([remark(0, locality(3)), remark(0, locality(3))]), 'log.startup-locality'],
    ['a startup locality after a measurement', marshalEventLog([measured(0, ascii('x')), remark(0, locality(3))]), 'log.startup-locality'],
  ])('%s', (_, bytes, reason) => expect(reasonOf(() => parse(bytes))).toBe(reason))

  test('case 46: too many events, too many bytes', () => {
    expect(reasonOf(() => parseEventLog(log, { ...limits, maxEvents: booted.length }))).toBe('accepted')
    expect(reasonOf(() => parseEventLog(log, { ...limits, maxEvents: booted.length - 1 }))).toBe('log.limit.events')
    expect(reasonOf(() => parseEventLog(log, { ...limits, maxBytes: log.length - 1 }))).toBe('log.limit.bytes')
  })

  test('case 46: a bank of the quote that the log lacks', () => {
    const events = parse(log)
    for (const hash of [alg.sha1, alg.sha384, alg.sha512]) expect(reasonOf(() => replay(events, hash))).toBe('log.bank.missing')
  })
})

describe('leads to other PCRs', () => {
  const quoted = hex(pcrDigest(replay(booted), [0, 1, 4, 7]))
  const changes: readonly [string, readonly Event[]][] = [
    ['case 42: the last event dropped', booted.slice(0, -1)],
    ['case 42: all but the header dropped', []],
    ['case 43: an event appended', [...booted, measured(7, ascii('more'))]],
    ['case 45: a measurement renamed to EV_NO_ACTION, its digest taken away', [remark(0, ascii('bootloader')), ...booted.slice(1)]],
    ['two events of one PCR exchanged', [...booted.slice(0, -1), measured(4, ascii('kernel')), separator(4)]],
    ['a startup locality added', [remark(0, locality(3)), ...booted]],
  ]
  test.each(changes)('%s', (_, events) => expect(hex(pcrDigest(replay(parse(marshalEventLog(events))), [0, 1, 4, 7]))).not.toBe(quoted))

  test('case 45: any other type is extended as ever', () => {
    for (const type of [0x2, 0x0, 0x12, 0xdead_beef]) {
      const renamed = booted.map((one) => ({ ...one, type }))
      expect(hex(pcrDigest(replay(parse(marshalEventLog(renamed))), [0, 1, 4, 7]))).toBe(quoted)
    }
  })
})

describe('where PCRs start', () => {
  test.each([
    [0, 0],
    [3, 3],
    [4, 4],
  ])('PCR 0 after TPM2_Startup at locality %i', (at, last) => {
    const values = replay(parse(marshalEventLog([remark(0, locality(at)), measured(0, ascii('bootloader'))])))
    const start = concat(new Uint8Array(31), Uint8Array.of(last))
    expect(hex(values.get(0))).toBe(hex(digest(alg.sha256, start, digest(alg.sha256, ascii('bootloader')))))
  })

  test('a startup locality alone is the value of PCR 0', () =>
    expect(hex(replay(parse(marshalEventLog([remark(0, locality(3))]))).get(0))).toBe(`${'00'.repeat(31)}03`))

  test('PCRs 17 to 22 are ones, zeros after a dynamic launch', () => {
    for (let pcr = 0; pcr < 24; pcr++) {
      const dynamic = pcr >= 17 && pcr <= 22
      expect(hex(resetValue(pcr))).toBe((dynamic ? 'ff' : '00').repeat(32))
      expect(hex(resetValue(pcr, alg.sha1, { dynamic: true }))).toBe('00'.repeat(20))
      expect(hex(pcrDigest(new Map(), [pcr]))).toBe(createHash('sha256').update(resetValue(pcr)).digest('hex'))
      const values = replay([measured(pcr, ascii('x'))], alg.sha256, { dynamic: true })
      expect(hex(values.get(pcr))).toBe(hex(digest(alg.sha256, new Uint8Array(32), digest(alg.sha256, ascii('x')))))
    }
  })
})

describe('separators', () => {
  const pc: SeparatorProfile = separatorProfiles.pcClient
  const without = (pcr: number): readonly Event[] => booted.filter((one) => !(one.pcr === pcr && one.type === eventType.separator))
  const instead = (pcr: number, other: Event): readonly Event[] => booted.map((one) => (one.pcr === pcr && one.type === eventType.separator ? other : one))

  test('of this boot are all there', () => {
    expect(reasonOf(() => checkSeparators(booted, pc))).toBe('accepted')
    expect(reasonOf(() => checkSeparators(booted, separatorProfiles.board))).toBe('accepted')
  })

  test.each<[string, readonly Event[], string]>([
    ['case 46: missing in PCR 7', without(7), 'log.separator.missing'],
    ['case 46: an empty log', [], 'log.separator.missing'],
    ['case 46: renamed to EV_NO_ACTION', instead(0, remark(0, zeros)), 'log.separator.missing'],
    ['case 46: twice in PCR 2', [...booted, separator(2)], 'log.separator.duplicate'],
    ['case 46: twice, zeros and ones', [...booted, separator(2, new Uint8Array(4).fill(0xff))], 'log.separator.duplicate'],
    ['case 46: twice, the second under another type', [...booted, measured(2, zeros)], 'log.separator.duplicate'],
    ['firmware says that it failed', instead(3, separator(3, Uint8Array.of(1, 0, 0, 0))), 'log.separator.value'],
    ['something else calls itself a separator', instead(3, separator(3, ascii('an option ROM'))), 'log.separator.value'],
    ['right data under another digest', instead(3, { ...separator(3, ascii('an option ROM')), data: zeros }), 'log.separator.value'],
    ['case 46: firmware after its separator', [...booted, measured(0, ascii('more firmware'))], 'log.after-separator'],
  ])('%s', (_, events, reason) => expect(reasonOf(() => checkSeparators(parse(marshalEventLog(events)), pc))).toBe(reason))

  test('ones are a separator', () => expect(reasonOf(() => checkSeparators(instead(3, separator(3, new Uint8Array(4).fill(0xff))), pc))).toBe('accepted'))

  test('a separator is one under any type: only its digest is authentic', () =>
    expect(reasonOf(() => checkSeparators(instead(3, measured(3, zeros)), pc))).toBe('accepted'))

  test('where it is repeatable, the first one still ends the firmware', () => {
    const profile = { ...pc, repeatable: [0] }
    expect(reasonOf(() => checkSeparators([...booted, separator(0)], profile))).toBe('accepted')
    expect(reasonOf(() => checkSeparators([...booted, measured(0, ascii('x')), separator(0)], profile))).toBe('log.after-separator')
  })

  test('boot loaders come after it', () => {
    for (const pcr of [4, 5, 7]) expect(reasonOf(() => checkSeparators([...booted, measured(pcr, ascii('x'))], pc))).toBe('accepted')
  })

  test('the quoted bank decides', () => expect(reasonOf(() => checkSeparators(booted, pc, alg.sha1))).toBe('log.separator.value'))
})

describe('event data', () => {
  test('is what was measured, or nothing', () => {
    expect(hex(knownData(measured(4, ascii('kernel'))))).toBe(hex(ascii('kernel')))
    expect(knownData({ ...measured(4, ascii('kernel')), data: ascii('kernel 2') })).toBeUndefined()
    expect(knownData(measured(4, ascii('kernel')), alg.sha1)).toBeUndefined()
    expect(knownData(remark(0, ascii('remark')))).toBeUndefined()
  })

  test('is known per bank', () => {
    const both = measured(4, ascii('kernel'), eventType.ipl, [alg.sha1, alg.sha256])
    const forged = { ...both, digests: new Map([...both.digests, [alg.sha1, digest(alg.sha1, ascii('other'))]]) }
    expect([knownData(forged, alg.sha1), hex(knownData(forged, alg.sha256))]).toEqual([undefined, hex(ascii('kernel'))])
  })
})

describe('any log', () => {
  const banksOf = fc.uniqueArray(fc.constantFrom(alg.sha1, alg.sha256, alg.sha384, alg.sha512), { minLength: 1, maxLength: 4 })
  const some = fc.record({
    pcr: fc.integer({ min: 0, max: 23 }),
    type: fc.oneof(fc.nat(0x12), fc.nat(0xffff_ffff)).filter((type) => type !== eventType.noAction),
    data: fc.uint8Array({ maxLength: 40 }),
  })
  const logs = banksOf.chain((banks) =>
    fc.array(some, { maxLength: 12 }).map((events) => ({ banks, events: events.map(({ pcr, type, data }) => measured(pcr, data, type, banks)) })),
  )

  test('parse and marshal are inverse', () =>
    fc.assert(
      fc.property(logs, ({ banks, events }) => {
        const bytes = marshalEventLog(events, banks)
        expect(parse(bytes)).toEqual(events)
        expect(hex(marshalEventLog(parse(bytes), banks))).toBe(hex(bytes))
      }),
      { numRuns: runs },
    ))

  test('replays each bank to the extends written out', () =>
    fc.assert(
      fc.property(logs, ({ banks, events }) => {
        for (const hash of banks)
          for (const [pcr, value] of replay(events, hash)) {
            const own = events.filter((one) => one.pcr === pcr).map((one) => one.digests.get(hash) ?? new Uint8Array(0))
            expect(hex(value)).toBe(hex(own.reduce((before, extend) => digest(hash, before, extend), resetValue(pcr, hash))))
          }
      }),
      { numRuns: runs },
    ))
})
